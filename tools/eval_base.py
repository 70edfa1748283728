"""Measures a base transformer on held-out pictures: masked loss under the right caption, a wrong one and none.

    python tools/eval_base.py --data=EMOJI_FOLDER [--model=RELEASE_FOLDER] [--split=heldout_pairs] [--num=1000]
    python tools/eval_base.py --model=RELEASE_FOLDER --config=configs/own_data/base.py \
        --config.data.kind=folder --config.data.path=PICTURES

Each emoji stands alone on white under 'a red apple, noto style'; with --config the pictures are those of its `data`, of
the split 'heldout' where `data.heldout_share` makes one. Pictures and captions are encoded by the release's own nets.
Prints one JSON line, described in `muse.evals.masked.summary`. Computes in float32.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import muse
from muse.config import DataConfig
from muse.data.examples import BadExample, Source
from muse.data.sources import open_source
from muse.data.splits import HELDOUT_PAIRS
from muse.errors import UserError, warn
from muse.evals import masked
from muse.evals.judged import heldout_data
from muse.jobs.command_line import guarded
from muse.release.format import Part, graphdef_and_template, load_part, shipped
from muse.train.command_line import parse_config_flags

FLAGS = flags.FLAGS


def examples(model: muse.Muse, source: Source, number: int, seed: int):
    """Tokens `[N, T]`, text states `[N, S, D]`, lengths `[N]` and captions of up to `number` pictures of a source."""
    tokens, states, lengths, captions = [], [], [], []
    for record in np.random.default_rng(seed).permutation(len(source)):
        if len(tokens) == number:
            break
        try:
            example = source.example(int(record), np.random.default_rng((seed, int(record))))
        except BadExample as error:
            warn(f'{error}; it is left out')
            continue
        caption = example['caption']
        txt_SD, length = model.cascade.texts([caption])[caption]
        tokens.append(model.encode(Image.fromarray(example['img'])).reshape(-1))
        states.append(np.asarray(txt_SD))
        lengths.append(length)
        captions.append(caption)
    if len(tokens) < 2:
        raise UserError(f'{len(tokens)} pictures can be used: give at least 2, with different captions')
    return np.stack(tokens), np.stack(states), np.array(lengths, np.int32), captions


def wanted(model: muse.Muse) -> DataConfig:
    """The pictures that the flags name, at the size of the model's base."""
    side = model.grid[0] * model.release.tokenizer.config.factor
    if FLAGS.config is None:
        split = FLAGS.split or HELDOUT_PAIRS
        return DataConfig(kind='scenes', path=FLAGS.data, split=split, image_size=side)
    return heldout_data(FLAGS.config.to_dict(), FLAGS.split, side)


def measure(
    model: muse.Muse, base: Part, data: DataConfig, *, number: int, seed: int, masks: int, batch_size: int
) -> dict:
    """The numbers of `masked.summary` of the weights `base`, and what they were taken on."""
    tok_NT, txt_NSD, len_N, captions = examples(model, open_source(data), number, seed)
    config = dataclasses.replace(base.config, dtype='float32', attention='xla')
    losses = masked.masked_losses(
        graphdef_and_template('base', config)[0],
        base.params,
        tok_NT,
        txt_NSD,
        len_N,
        masked.wrong_rows(captions, seed),
        seed=seed,
        masks=masks,
        batch_size=min(batch_size, len(tok_NT)),
    )
    about = {'pictures': len(tok_NT), 'masks': masks, 'split': data.split, 'model': model.release.name}
    return masked.summary(losses, tok_NT) | about


def main(_: list[str]) -> None:
    for name, value in {'num': FLAGS.num, 'masks': FLAGS.masks, 'batch_size': FLAGS.batch_size}.items():
        if value < 1:
            raise UserError(f'--{name}={value}: give 1 or more')
    logging.set_verbosity(logging.WARNING)
    model = muse.load(FLAGS.model or None)
    result = measure(
        model,
        load_part(FLAGS.model or shipped(), 'base'),
        wanted(model),
        number=FLAGS.num,
        seed=FLAGS.seed,
        masks=FLAGS.masks,
        batch_size=FLAGS.batch_size,
    )
    print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the emoji data; the sample in the package when empty')
    config_flags.DEFINE_config_file('config', None, 'a config whose `data` are the pictures, in place of --data')
    flags.DEFINE_string('split', '', "split to measure on; empty: 'heldout_pairs', or with --config what is held out")
    flags.DEFINE_integer('num', 1000, 'pictures to measure on, at most')
    flags.DEFINE_integer('masks', 4, 'masks a picture')
    flags.DEFINE_integer('batch_size', 8, 'pictures at a time')
    flags.DEFINE_integer('seed', 0, 'of the masks and the wrong captions')
    app.run(guarded(main), flags_parser=parse_config_flags)
