"""Measures a tokenizer on held-out pictures: prints one JSON line and writes a sheet of pictures and reconstructions.

    python tools/eval_tokenizer.py --data=EMOJI_FOLDER --split=heldout_labels --num=1000 --out=DIR \\
        [--model=TOKENIZER] [--perceptual=FOLDER] [--features=FOLDER]
    python tools/eval_tokenizer.py --pictures=FOLDER [--whole] --out=DIR ...
    python tools/eval_tokenizer.py --config=configs/own_data/base.py --config.data.kind=webdataset \\
        --config.data.path=TARS --out=DIR ...

No picture counts twice: where there are fewer than --num, those are all. --pictures takes any folder of pictures: their
middle squares at --image_size or, with --whole, each picture at its own size by overlapping tiles, compared in squares
of --image_size. With --config the pictures are those that its `data`, a dataset of any kind, holds out.

--model is a release folder, a folder of diffusers' VQModel or a taming checkpoint. --perceptual (from
tools/fetch_perceptual.py) adds lpips_vgg and lpips_alex, --features (from tools/fetch_features.py) adds frechet_lite0:
the Fréchet distance on EfficientNet-Lite0 features, not comparable with published FID.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image

from muse import tiling
from muse.config import DataConfig
from muse.data.pictures import BadPicture, open_picture, picture_files, read_picture
from muse.data.splits import HELDOUT_LABELS
from muse.errors import UserError, warn
from muse.evals import features, grids, reconstruction
from muse.evals.judged import heldout_data
from muse.jobs.command_line import guarded
from muse.jobs.stores import open_folder
from muse.models import perceptual
from muse.release.format import Part, shipped
from muse.release.public_vq import load_tokenizer
from muse.train.command_line import parse_config_flags

FLAGS = flags.FLAGS
SIZE = 256


def wanted() -> DataConfig:
    """The dataset that the flags name."""
    if FLAGS.config is not None:
        return heldout_data(FLAGS.config.to_dict(), FLAGS.split, FLAGS.image_size)
    split = FLAGS.split or HELDOUT_LABELS
    return DataConfig(kind='scenes', path=FLAGS.data, split=split, image_size=FLAGS.image_size or SIZE)


def batches_of_data(data: DataConfig, number: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """uint8 batches of `number` pictures of a dataset, or of all it has; one that cannot be read is left out."""
    from muse.data.pipeline import make_loader
    from muse.data.sources import open_source

    left = min(number, len(open_source(data)))
    for batch in make_loader(data, batch_size=min(batch_size, left), seed=seed, repeat=True):
        good = np.asarray(batch['weight'])[:left] > 0  # another picture, seen twice then, is in a bad one's place
        if good.any():
            yield np.asarray(batch['img'])[:left][good]
        left -= len(batch['img'])
        if left <= 0:
            return


def side() -> int:
    """Side in pixels of a folder's pictures, or of the squares of them that are compared."""
    return FLAGS.image_size or SIZE


def squares_of_folder() -> Iterator[np.ndarray]:
    """uint8 batches of the middle squares of a folder's pictures; one that cannot be read is skipped with a warning."""
    batch = []
    for path in picture_files(FLAGS.pictures)[: FLAGS.num]:
        try:
            batch.append(read_picture(path, side()))
        except BadPicture as error:
            warn(f"'{path}' is left out ({error})")
        if len(batch) == FLAGS.batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def whole_pictures() -> Iterator[np.ndarray]:
    """A folder's pictures at their own size; those that cannot be read or are too small are skipped with a warning."""
    for path in picture_files(FLAGS.pictures)[: FLAGS.num]:
        try:
            img_HWC = open_picture(path)
        except UserError as error:
            warn(str(error))
            continue
        if min(img_HWC.shape[:2]) < side():
            warn(f"'{path}' is left out (a side is under --image_size={side()})")
            continue
        yield img_HWC


def judge_batches(part: Part, nets: dict[str, Any]) -> tuple[dict[str, float], Image.Image]:
    if FLAGS.pictures:
        batches = squares_of_folder()
    else:
        batches = batches_of_data(wanted(), FLAGS.num, FLAGS.batch_size, FLAGS.seed)
    first = next(batches, np.zeros((0, 1, 1, 3), np.uint8))  # looked at twice: measured, and drawn
    result = reconstruction.evaluate_tokenizer(
        part.config, part.params, itertools.chain([first], batches) if len(first) else [], **nets
    )
    made_NHWC = reconstruction.reconstruct(part.config, part.params)(first[:16])[0]
    return result, pairs(first[:16], np.asarray(made_NHWC))


def judge_whole(part: Part, nets: dict[str, Any]) -> tuple[dict[str, float], Image.Image]:
    tokenizer = tiling.tiled_tokenizer(part.config, part.params, tile=FLAGS.tile, overlap=FLAGS.overlap)
    result = reconstruction.evaluate_whole(tokenizer, whole_pictures(), piece=side(), **nets)
    few = list(itertools.islice(whole_pictures(), 4))
    middle = [tuple((pixels - side()) // 2 for pixels in img_HWC.shape[:2]) for img_HWC in few]
    cut = [slice(0, side())] * 2
    real = [img[top:, left:][*cut] for img, (top, left) in zip(few, middle, strict=True)]
    made = [tiling.reconstruct(tokenizer, img)[top:, left:][*cut] for img, (top, left) in zip(few, middle, strict=True)]
    return result, pairs(np.stack(real), np.stack(made))


def pairs(img_NHWC: np.ndarray, made_NHWC: np.ndarray) -> Image.Image:
    """Pictures and their reconstructions side by side, four pairs a row."""
    return grids.grid(np.stack([img_NHWC, made_NHWC], axis=1).reshape(-1, *img_NHWC.shape[1:]), columns=8)


def _check_flags() -> None:
    counts = {'num': FLAGS.num, 'batch_size': FLAGS.batch_size, 'image_size': FLAGS.image_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f'--{name}={value}: give 1 or more')
    if FLAGS.whole and not FLAGS.pictures:
        raise UserError('--whole judges pictures at their own size: name their folder with --pictures')
    given = [name for name in ('data', 'config', 'pictures') if FLAGS[name].value]
    if len(given) > 1:
        raise UserError(f'--{given[0]} and --{given[1]} both name pictures: give one of them')


def main(_: list[str]) -> None:
    _check_flags()
    out = open_folder(FLAGS.out)
    part = load_tokenizer(FLAGS.model or shipped())
    nets: dict[str, Any] = {'judges': {}, 'feature_net': None}
    if FLAGS.perceptual:
        nets['judges'] = {f'lpips_{a}': perceptual.load_lpips(FLAGS.perceptual, a) for a in ('vgg', 'alex')}
    if FLAGS.features:
        nets['feature_net'] = features.load_features(FLAGS.features)
    result, sheet = judge_whole(part, nets) if FLAGS.whole else judge_batches(part, nets)
    on = {'pictures_of': FLAGS.pictures} if FLAGS.pictures else {'split': wanted().split}
    path = out / f'reconstructions_{"folder" if FLAGS.pictures else on["split"]}.png'
    sheet.save(path)
    print(json.dumps(result | {'tokenizer': part.hash[:12] or FLAGS.model} | on | {'grid': str(path)}))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'tokenizer; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the data; the sample in the package when empty')
    config_flags.DEFINE_config_file('config', None, 'a config whose `data` are the pictures, in place of --data')
    flags.DEFINE_string('split', '', "split to measure on; empty: 'heldout_labels', or with --config what is held out")
    flags.DEFINE_string('pictures', '', 'any folder of pictures, in place of a dataset')
    flags.DEFINE_bool('whole', False, 'pictures at their own size, by tiles')
    flags.DEFINE_integer('tile', 512, 'with --whole: side of a tile in pixels')
    flags.DEFINE_integer('overlap', 128, 'with --whole: least pixels that neighbouring tiles share')
    flags.DEFINE_integer('num', 1000, 'pictures to measure on')
    flags.DEFINE_integer('batch_size', 16, 'pictures at a time')
    flags.DEFINE_integer(
        'image_size', None, f"side of the pictures, {SIZE} or --config's; or of the squares of --whole"
    )
    flags.DEFINE_integer('seed', 0, 'order of the pictures and composition of scenes')
    flags.DEFINE_string('perceptual', '', 'folder of LPIPS weights')
    flags.DEFINE_string('features', '', 'folder of the feature net')
    flags.DEFINE_string('out', None, 'folder for the sheet', required=True)
    app.run(guarded(main), flags_parser=parse_config_flags)
