"""Measures a tokenizer on held-out pictures: prints one JSON line and writes a sheet of pictures and reconstructions.

    python tools/eval_tokenizer.py --data=EMOJI_FOLDER --split=heldout_labels --num=1000 --out=DIR \\
        [--model=RELEASE_FOLDER] [--perceptual=FOLDER] [--features=FOLDER]

--perceptual (from tools/fetch_perceptual.py) adds lpips_vgg and lpips_alex, --features (from tools/fetch_features.py)
adds frechet_lite0: the Fréchet distance on EfficientNet-Lite0 features, not comparable with published FID.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags

from muse.config import DataConfig
from muse.data.pipeline import make_loader
from muse.errors import UserError, main_guard
from muse.evals import features, grids, reconstruction
from muse.models import perceptual
from muse.release.format import load_part, shipped

FLAGS = flags.FLAGS


def pictures(loader: Iterator, number: int) -> Iterator[np.ndarray]:
    """uint8 batches from a loader until `number` pictures are reached."""
    left = number
    for batch in loader:
        yield np.asarray(batch['img'])[:left]
        left -= len(batch['img'])
        if left <= 0:
            return


def sheet(run, img_NHWC: np.ndarray):
    """Pictures and their reconstructions side by side, four pairs a row."""
    made_NHWC = np.asarray(run(img_NHWC)[0])
    pairs = np.stack([img_NHWC, made_NHWC], axis=1).reshape(-1, *img_NHWC.shape[1:])
    return grids.grid(pairs, columns=8)


def _check_counts() -> None:
    counts = {'num': FLAGS.num, 'batch_size': FLAGS.batch_size, 'image_size': FLAGS.image_size}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f'--{name}={value}: give 1 or more')


def main(_: list[str]) -> None:
    with main_guard():
        _check_counts()
        out = Path(FLAGS.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to '{out}' ({error.strerror}): choose another --out") from None
        part = load_part(FLAGS.model or shipped(), 'tokenizer')
        judges, feature_net = {}, None
        if FLAGS.perceptual:
            judges = {f'lpips_{arch}': perceptual.load_lpips(FLAGS.perceptual, arch) for arch in ('vgg', 'alex')}
        if FLAGS.features:
            feature_net = features.load_features(FLAGS.features)
        data = DataConfig(kind=FLAGS.kind, path=FLAGS.data, split=FLAGS.split, image_size=FLAGS.image_size)
        loader = iter(make_loader(data, batch_size=min(FLAGS.batch_size, FLAGS.num), seed=FLAGS.seed, repeat=True))
        # The first batches are looked at twice: measured, and drawn.
        first = list(itertools.islice(loader, 1))
        batches = pictures(itertools.chain(first, loader), FLAGS.num)
        result = reconstruction.evaluate_tokenizer(
            part.config, part.params, batches, judges=judges, feature_net=feature_net
        )
        path = out / f'reconstructions_{FLAGS.split}.png'
        sheet(reconstruction.reconstruct(part.config, part.params), np.asarray(first[0]['img'])[:16]).save(path)
        about = {'tokenizer': part.hash[:12], 'split': FLAGS.split, 'grid': str(path)}
        print(json.dumps(result | about))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder with a tokenizer; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the data; the sample in the package when empty')
    flags.DEFINE_enum('kind', 'scenes', ['scenes', 'tfds', 'folder'], 'kind of data')
    flags.DEFINE_string('split', 'heldout_labels', 'split to measure on')
    flags.DEFINE_integer('num', 1000, 'pictures to measure on')
    flags.DEFINE_integer('batch_size', 16, 'pictures at a time')
    flags.DEFINE_integer('image_size', 256, 'side of the pictures')
    flags.DEFINE_integer('seed', 0, 'order of the pictures and composition of scenes')
    flags.DEFINE_string('perceptual', '', 'folder of LPIPS weights')
    flags.DEFINE_string('features', '', 'folder of the feature net')
    flags.DEFINE_string('out', None, 'folder for the sheet', required=True)
    app.run(main)
