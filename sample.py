"""Draws pictures from prompts: python sample.py --prompt='a red apple, noto style' --out=out/

Each picture is written as <index>_<prompt>.png with prompt, seed, model and settings in its PNG text, and as a .json
beside it. Wrong input stops with one line and exit code 2 before anything is drawn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import muse
from muse.errors import UserError, main_guard
from muse.evals.grids import grid

MAX_PROMPTS_FILE = 64 * 2**20
FLAGS = flags.FLAGS
flags.DEFINE_multi_string('prompt', [], 'What to draw; give it several times for several prompts.')
flags.DEFINE_string('prompts_file', None, 'Text file with one prompt a line; blank lines are skipped.')
flags.DEFINE_string('model', None, 'Release folder; default: the model that comes with the package.')
flags.DEFINE_integer('num_images', 1, 'Pictures a prompt.')
flags.DEFINE_integer('batch_size', 8, 'Pictures at a time on an accelerator.')
flags.DEFINE_integer('seed', 0, 'The same seed gives the same pictures.')
flags.DEFINE_integer('steps', None, "Decoding steps; default: the model's.")
flags.DEFINE_float('guidance_scale', None, "How closely to follow the prompt, 0: no guidance; default: the model's.")
flags.DEFINE_string('negative_prompt', None, 'What to stay away from.')
flags.DEFINE_float('temperature', None, "Of the token sampling; default: the model's.")
flags.DEFINE_bool('grid', False, 'Also write grid.png with all the pictures.')
flags.DEFINE_string('out', 'out', 'Folder for the pictures; made when missing.')


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """The prompts of the flags, then those of the file."""
    prompts = list(prompts)
    if file is not None:
        path = Path(file)
        try:
            if path.stat().st_size > MAX_PROMPTS_FILE:
                raise UserError(f"prompts file '{file}' is over 64 MB: split it")
            lines = path.read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError:
            raise UserError(f"prompts file '{file}' is not UTF-8 text: save it as UTF-8, one prompt a line") from None
        except OSError as error:
            raise UserError(f"prompts file '{file}' cannot be read ({error.strerror}): check the path") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"prompts file '{file}' holds no prompt: write one a line")
        prompts += found
    if not prompts:
        raise UserError("no prompt was given: add --prompt='a red apple' or --prompts_file=FILE")
    return prompts


def open_folder(out: str) -> Path:
    """Makes the output folder and tries that files can be written into it."""
    if not out:
        raise UserError('--out is empty: name a folder')
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder '{out}' cannot be written ({error.strerror}): choose another --out") from None
    return folder


def file_stem(index: int, prompt: str) -> str:
    """'0003_a-red-apple': at most 60 letters and digits of the prompt behind the picture's index."""
    slug = re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60].strip('-')
    return f'{index:04d}_{slug or "picture"}'


def write(folder: Path, stem: str, image: Image.Image, about: dict) -> None:
    """Writes PNG and JSON, each beside its place and then moved, so that none is ever half-written."""
    text = PngInfo()
    for key, value in about.items():
        text.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    tmp = folder / f'.{stem}.{os.getpid()}.tmp'
    try:
        image.save(tmp, format='PNG', pnginfo=text)
        os.replace(tmp, folder / f'{stem}.png')
        tmp.write_text(json.dumps(about, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(tmp, folder / f'{stem}.json')
    except OSError as error:
        raise UserError(f"'{folder / stem}.png' cannot be written ({error.strerror}): free some space") from None
    finally:
        tmp.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"argument '{argv[1]}' is not behind a flag: write --prompt='{argv[1]}'")
    prompts = read_prompts(FLAGS.prompt, FLAGS.prompts_file)
    model = muse.load(FLAGS.model)
    settings = model.settings(FLAGS.seed, FLAGS.steps, FLAGS.guidance_scale, FLAGS.temperature, FLAGS.negative_prompt)
    pictures = model.stream(prompts, settings, num_images=FLAGS.num_images, batch_size=FLAGS.batch_size)
    folder = open_folder(FLAGS.out)

    total, drawn = len(prompts) * FLAGS.num_images, []
    for index, image in enumerate(tqdm(pictures, total=total, unit='picture', disable=None)):
        prompt = prompts[index // FLAGS.num_images]
        about = {
            'prompt': prompt,
            'index': index,
            'model': model.release.name,
            **dataclasses.asdict(settings),
            'muse_version': muse.__version__,
        }
        write(folder, file_stem(index, prompt), image, about)
        if FLAGS.grid:
            drawn.append(np.asarray(image))
    if FLAGS.grid:
        columns = FLAGS.num_images if FLAGS.num_images > 1 else min(total, 4)
        about = {'prompts': prompts, 'model': model.release.name, **dataclasses.asdict(settings)}
        captions = [prompt for prompt in prompts for _ in range(FLAGS.num_images)]
        write(folder, 'grid', grid(np.stack(drawn), columns=columns, captions=captions), about)
    print(f'{total} picture{"s" * (total > 1)} in {folder}/')


def parse(argv: list[str]) -> list[str]:
    """absl's parser with its errors as one line and exit code 2."""
    with main_guard():
        try:
            return FLAGS(argv)
        except flags.Error as error:
            raise UserError(' '.join(str(error).split())) from None


def guarded(argv: list[str]) -> None:
    with main_guard():
        main(argv)


if __name__ == '__main__':
    app.run(guarded, argv=sys.argv, flags_parser=parse)
