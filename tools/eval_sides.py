"""Does the model draw the asked colour on the asked side? Counts it over pairs of prompts that trade two colours.

    python tools/eval_sides.py --out=DIR [--model=RELEASE_FOLDER] [--num_images=3] [--steps=12] [--seed=0]

"a red heart left of a blue heart, noto style" and "a blue heart left of a red heart, noto style" hold the same words: a
model that reads what belongs to what draws them differently. A side is right when the mean of its coloured pixels lies
nearer to the asked colour than to the other one. By chance that is half of the sides, and a quarter of the pictures
have both right. Writes a sheet of the pictures to DIR and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import muse
from muse.errors import UserError
from muse.evals.grids import grid
from muse.jobs.command_line import guarded, parse_only_flags

FLAGS = flags.FLAGS
COLOURS = {
    'red': (220, 40, 40),
    'orange': (245, 140, 30),
    'yellow': (250, 210, 60),
    'green': (90, 160, 60),
    'blue': (50, 110, 210),
    'purple': (140, 70, 180),
}
PAIRS = (  # colour, thing, colour, thing, style
    ('red', 'heart', 'blue', 'heart', 'noto'),
    ('green', 'apple', 'red', 'apple', 'noto'),
    ('blue', 'book', 'yellow', 'book', 'noto'),
    ('red', 'apple', 'blue', 'book', 'noto'),
    ('green', 'heart', 'yellow', 'heart', 'twemoji'),
    ('orange', 'book', 'green', 'book', 'noto'),
    ('blue', 'circle', 'red', 'circle', 'twemoji'),
    ('yellow', 'heart', 'purple', 'heart', 'fluent'),
)
_WHITE = 235  # a pixel whose least channel is above it is ground


def prompts() -> list[tuple[str, str, str]]:
    """(prompt, colour asked on the left, on the right): each pair, and with its colours traded."""
    found = []
    for first, thing, second, other, style in PAIRS:
        for left, right in ((first, second), (second, first)):
            found.append((f'{_a(left)} {thing} left of {_a(right)} {other}, {style} style', left, right))
    return found


def _a(word: str) -> str:
    return f'{"an" if word[0] in "aeiou" else "a"} {word}'


def sides(img_HWC: np.ndarray, left: str, right: str) -> tuple[bool, bool]:
    """Whether the left and the right half of a uint8 picture have their asked colour; an empty half has not."""
    halves = np.split(img_HWC.astype(np.float64), 2, axis=1)
    return _nearer(halves[0], left, right), _nearer(halves[1], right, left)


def _nearer(img_HWC: np.ndarray, asked: str, other: str) -> bool:
    pixels_N3 = img_HWC.reshape(-1, 3)
    coloured_N3 = pixels_N3[pixels_N3.min(axis=1) < _WHITE]
    if not len(coloured_N3):
        return False
    # Hue alone, so that a light or a dark red is red: both are taken as shares of the three channels.
    mean_3, asked_3, other_3 = (c / c.sum() for c in (coloured_N3.mean(axis=0), *map(_rgb, (asked, other))))
    return bool(np.linalg.norm(mean_3 - asked_3) < np.linalg.norm(mean_3 - other_3))


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float64)


def main(_: list[str]) -> None:
    out = Path(FLAGS.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be made a folder ({error.strerror}): choose another --out") from None
    model = muse.load(FLAGS.model or None)
    asked = [each for each in prompts() for _ in range(FLAGS.num_images)]
    images = model.generate(
        [prompt for prompt, _, _ in prompts()], num_images=FLAGS.num_images, steps=FLAGS.steps, seed=FLAGS.seed
    )
    pictures = [np.asarray(image) for image in images]
    right = np.array([sides(img_HWC, *each[1:]) for img_HWC, each in zip(pictures, asked, strict=True)])
    sheet = out / 'sides.png'
    grid(np.stack(pictures), columns=2 * FLAGS.num_images, captions=[each[0] for each in asked]).save(sheet)
    counts = {'pictures': len(right), 'both_right': int(right.all(axis=1).sum()), 'sides_right': int(right.sum())}
    print(json.dumps({**counts, 'sides': right.size, 'model': model.release.name, 'sheet': str(sheet)}))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder; the shipped one when empty')
    flags.DEFINE_string('out', None, 'folder for the sheet', required=True)
    flags.DEFINE_integer('num_images', 3, 'pictures a prompt', lower_bound=1)
    flags.DEFINE_integer('steps', 12, 'decoding steps', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'of the drawing')
    app.run(guarded(main), flags_parser=parse_only_flags)
