"""The pictures of docs/sampling.md: what each knob of drawing does, drawn by a release (the shipped one by default).

    python tools/sampling_sheets.py --out=docs/images            # all sheets
    python tools/sampling_sheets.py --out=docs/images --sheet=guidance --sheet=steps

Each sheet is one WebP file, sampling_<name>.webp; every picture has the same seed, and none is picked but the
apple that is edited.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from absl import app, flags
from PIL import Image
from tqdm import tqdm

import muse
from muse.config import FreeEditConfig
from muse.evals.grids import grid
from muse.jobs.command_line import guarded, parse_only_flags
from muse.jobs.stores import open_folder
from muse.pipeline import Row, Settings

FLAGS = flags.FLAGS
SIDE = 144  # pixels of a picture in a sheet
QUALITY = 82
SUBJECT = 'a butterfly, twemoji style'
SUBJECTS = ('a green apple, noto style', SUBJECT, 'a panda, fluent 3d style')
APPLE, STRAWBERRY, APPLE_SEED = 'a red apple, noto style', 'a strawberry, noto style', 3
SCALES, TEMPERATURES = (0.0, 1.0, 3.0, 6.0, 12.0), (0.0, 0.5, 1.0, 1.5)
STEPS = (1, 2, 4, 8, 16, 32, 64)
ORDERS = ('confidence', 'halton', 'random')
SHOWN_STEPS = 8  # of a decode, in the sheet of its steps


def draw(model: muse.Muse, prompts: Sequence[str], settings: Settings) -> list[np.ndarray]:
    """One small picture a prompt, each with the picture index 0, uint8 [SIDE, SIDE, 3]."""
    rows = [Row(prompt=prompt) for prompt in prompts]
    return [small(drawn.image) for drawn in model.draw(rows, settings, batch_size=len(rows))]


def small(picture: Image.Image) -> np.ndarray:
    """The picture at the size that it has in a sheet."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def guidance(model: muse.Muse, seed: int) -> Image.Image:
    """A row for each temperature, a column for each guidance scale: one program serves them all."""
    settings = model.settings(seed)
    cells = [(temperature, scale) for temperature in TEMPERATURES for scale in SCALES]
    rows = [Row(prompt=SUBJECT, guidance_scale=scale, temperature=temperature) for temperature, scale in cells]
    drawn = model.draw(rows, settings, batch_size=len(rows))
    pictures = [small(each.image) for each in tqdm(drawn, total=len(rows), disable=None)]
    captions = [f'scale {scale:g}, temp. {temperature:g}' for temperature, scale in cells]
    return grid(np.stack(pictures), columns=len(SCALES), captions=captions)


def steps(model: muse.Muse, seed: int) -> Image.Image:
    """A row for each prompt, a column for each number of steps."""
    columns = [draw(model, SUBJECTS, model.settings(seed, count)) for count in tqdm(STEPS, disable=None)]
    pictures = [column[row] for row in range(len(SUBJECTS)) for column in columns]
    captions = [f'{count} step{"s" * (count > 1)}' for _ in SUBJECTS for count in STEPS]
    return grid(np.stack(pictures), columns=len(STEPS), captions=captions)


def orders(model: muse.Muse, seed: int) -> Image.Image:
    """A row for each order of filling, at 4 steps and at the release's number: with few steps it matters most."""
    pictures, captions = [], []
    usual = model.release.decode.steps
    for order in tqdm(ORDERS, disable=None):
        for count in (4, usual):
            config = dataclasses.replace(model.release.decode, order=order, steps=count)
            pictures += draw(model, SUBJECTS, model.settings(seed, decoding=config))
            captions += [f'{order}, {count} steps'] * len(SUBJECTS)
    return grid(np.stack(pictures), columns=2 * len(SUBJECTS), captions=captions)


def filling(model: muse.Muse, seed: int) -> Image.Image:
    """A row for each order of filling: which tokens are known after some of the steps."""
    pictures, captions = [], []
    for order in tqdm(ORDERS, disable=None):
        config = dataclasses.replace(model.release.decode, order=order)
        [drawn] = model.draw([Row(prompt=SUBJECT)], model.settings(seed, decoding=config), batch_size=1)
        frames = model.frames(drawn)
        for frame in np.linspace(0, len(frames) - 1, SHOWN_STEPS).round().astype(int):
            pictures.append(small(frames[frame]))
            captions.append(f'{order}, step {frame + 1}')
    return grid(np.stack(pictures), columns=SHOWN_STEPS, captions=captions)


def edits(model: muse.Muse, seed: int) -> Image.Image:
    """One picture and four edits of it."""
    [picture] = model.generate(APPLE, seed=APPLE_SEED)
    right_HW = np.zeros(picture.size[::-1], bool)
    right_HW[:, picture.width // 2 :] = True
    few, many = (FreeEditConfig(iterations=iterations) for iterations in (10, 40))
    shown = {
        APPLE: picture,
        'right half: a green apple': model.inpaint(picture, right_HW, 'a green apple, noto style', seed=seed),
        'variation, strength 0.5': model.variation(picture, APPLE, strength=0.5, seed=seed),
        'free: a strawberry, 10 iterations': model.edit(picture, STRAWBERRY, seed=seed, free=few),
        'free: a strawberry, 40 iterations': model.edit(picture, STRAWBERRY, seed=seed, free=many),
    }
    return grid(np.stack([small(image) for image in shown.values()]), columns=len(shown), captions=list(shown))


SHEETS = {'edits': edits, 'guidance': guidance, 'steps': steps, 'orders': orders, 'filling': filling}


def main(_: list[str]) -> None:
    out = open_folder(FLAGS.out)
    model = muse.load(FLAGS.model)
    for name in FLAGS.sheet or SHEETS:
        path = out / f'sampling_{name}.webp'
        SHEETS[name](model, FLAGS.seed).save(path, quality=QUALITY, method=6)
        print(f'{path}  {path.stat().st_size // 1000} kB')


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'folder for the sheets', required=True)
    flags.DEFINE_multi_enum('sheet', [], list(SHEETS), 'only these sheets')
    flags.DEFINE_string('model', None, 'release folder; the shipped one when not given')
    flags.DEFINE_integer('seed', 0, 'of every picture')
    app.run(guarded(main), flags_parser=parse_only_flags)
