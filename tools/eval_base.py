"""Measures a base transformer on held-out pictures: masked loss under the right caption, a wrong one and none.

    python tools/eval_base.py --data=EMOJI_FOLDER [--model=RELEASE_FOLDER] [--split=heldout_pairs] [--num=1000]

Each picture stands alone on white under 'a red apple, noto style'. Prints one JSON line, described in
`muse.evals.masked.summary`. Computes in float32.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import muse
from muse.data import scenes
from muse.data.splits import HELDOUT_PAIRS, SPLITS
from muse.data.sprites import load_sprites
from muse.errors import UserError, main_guard
from muse.evals import masked
from muse.release.format import graphdef_and_template

FLAGS = flags.FLAGS


def examples(model: muse.Muse, data: str, split: str, number: int, seed: int):
    """Tokens `[N, T]`, text states `[N, S, D]`, lengths `[N]` and captions of up to `number` pictures of a split."""
    sprites = load_sprites(data, split, model.size[0])
    chosen = np.random.default_rng(seed).permutation(len(sprites))[:number]
    tokens, states, lengths, captions = [], [], [], []
    for index in chosen:
        img_HWC, caption = scenes.plain(sprites, int(index), model.size[0])
        txt_SD, length = model.cascade.texts([caption])[caption]
        tokens.append(model.encode(Image.fromarray(img_HWC)).reshape(-1))
        states.append(np.asarray(txt_SD))
        lengths.append(length)
        captions.append(caption)
    return np.stack(tokens), np.stack(states), np.array(lengths, np.int32), captions


def measure(model: muse.Muse, data: str, split: str, *, number: int, seed: int, masks: int, batch_size: int) -> dict:
    """The numbers of `masked.summary` and what they were taken on."""
    tok_NT, txt_NSD, len_N, captions = examples(model, data, split, number, seed)
    base = model.release.base
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
    about = {'pictures': len(tok_NT), 'masks': masks, 'split': split, 'model': model.release.name}
    return masked.summary(losses, tok_NT) | about


def main(_: list[str]) -> None:
    with main_guard():
        for name, value in {'num': FLAGS.num, 'masks': FLAGS.masks, 'batch_size': FLAGS.batch_size}.items():
            if value < 1:
                raise UserError(f'--{name}={value}: give 1 or more')
        result = measure(
            muse.load(FLAGS.model or None),
            FLAGS.data,
            FLAGS.split,
            number=FLAGS.num,
            seed=FLAGS.seed,
            masks=FLAGS.masks,
            batch_size=FLAGS.batch_size,
        )
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the emoji data; the sample in the package when empty')
    flags.DEFINE_enum('split', HELDOUT_PAIRS, SPLITS, 'split to measure on')
    flags.DEFINE_integer('num', 1000, 'pictures to measure on, at most')
    flags.DEFINE_integer('masks', 4, 'masks a picture')
    flags.DEFINE_integer('batch_size', 8, 'pictures at a time')
    flags.DEFINE_integer('seed', 0, 'of the masks and the wrong captions')
    app.run(main)
