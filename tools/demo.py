"""What `make demo` draws: a grid of 8 prompts and one inpainting, from the model that comes with the package."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import muse
from muse.errors import UserError
from muse.evals.grids import grid
from muse.jobs.command_line import guarded, parse_only_flags

FLAGS = flags.FLAGS
flags.DEFINE_string('out', 'out', 'Folder for the pictures; made when missing.')
flags.DEFINE_string('model', None, 'Release folder; default: the model that comes with the package.')
flags.DEFINE_integer('seed', 0, 'The same seed gives the same pictures.')

PROMPTS = (
    'a green apple, noto style',
    'two strawberries, noto style',
    'a butterfly, twemoji style',
    'a mushroom, noto style',
    'a crescent moon, twemoji style',
    'a panda, fluent 3d style',
    'a sunflower, noto style, on a light blue ground',
    'a red heart left of a blue heart, noto style',
)
REPAINTED = 7  # this picture's right half is painted anew …
NEW_PROMPT = 'a red heart left of a strawberry, noto style'  # … under this prompt


def main(argv: list[str]) -> None:
    del argv
    start = time.perf_counter()
    folder = Path(FLAGS.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder '{folder}' cannot be made ({error.strerror}): choose another --out") from None

    model = muse.load(FLAGS.model)
    stream = model.stream(PROMPTS, model.settings(seed=FLAGS.seed))
    images = list(tqdm(stream, total=len(PROMPTS), unit='picture', disable=None))
    pictures = np.stack([np.asarray(image) for image in images])
    grid(pictures, columns=4, captions=PROMPTS).save(folder / 'demo.png')

    before = images[REPAINTED]
    mask = Image.new('L', before.size)
    ImageDraw.Draw(mask).rectangle((before.width // 2, 0, before.width, before.height), fill=255)
    after = model.inpaint(before, mask, NEW_PROMPT, seed=FLAGS.seed)
    shown = np.stack([np.asarray(image.convert('RGB')) for image in (before, mask, after)])
    captions = (PROMPTS[REPAINTED], 'white: to be painted anew', NEW_PROMPT)
    grid(shown, columns=3, captions=captions).save(folder / 'inpainting.png')

    print(f'{len(images)} prompts  {(folder / "demo.png").resolve()}')
    print(f'inpainting {(folder / "inpainting.png").resolve()}')
    print(f'{time.perf_counter() - start:.0f} s with {model.release.name}')


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
