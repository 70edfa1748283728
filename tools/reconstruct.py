"""Passes pictures of any size through a tokenizer, whole, by overlapping tiles, and writes what comes back as PNG.

    python tools/reconstruct.py --out=out/ [--model=RELEASE_FOLDER] [--tile=512] [--overlap=128] photo.jpg scan.tif ...

--model is a release folder, a folder of diffusers' VQModel or a taming checkpoint; the shipped tokenizer when left out.
Memory grows with the tile, not with the picture. Sides that do not divide are padded and cropped back.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from PIL import Image

from muse import tiling
from muse.data.pictures import open_picture
from muse.errors import UserError, warn
from muse.jobs.command_line import guarded, parse
from muse.jobs.stores import open_folder
from muse.release.format import shipped
from muse.release.public_vq import load_tokenizer

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    paths, out = [Path(name) for name in arguments[1:]], Path(FLAGS.out)
    if not paths:
        raise UserError('no pictures given: name one or more picture files')
    if len({path.stem for path in paths}) < len(paths):
        raise UserError('two pictures have the same name, and would overwrite each other: rename one')
    open_folder(str(out))
    for path in paths:
        if os.path.exists(path) and (out / f'{path.stem}.png').resolve() == path.resolve():
            raise UserError(f"the reconstruction of '{path}' would overwrite it: choose another --out")
    part = load_tokenizer(FLAGS.model or shipped())
    tokenizer = tiling.tiled_tokenizer(part.config, part.params, tile=FLAGS.tile, overlap=FLAGS.overlap)
    left_out = [path for path in paths if not _reconstruct(tokenizer, path, out / f'{path.stem}.png')]
    if left_out:
        raise UserError(f'{len(left_out)} of {len(paths)} pictures could not be read: see the warnings above')


def _reconstruct(tokenizer: tiling.TiledTokenizer, path: Path, target: Path) -> bool:
    """Writes one picture; False, with a warning, when it cannot be read."""
    try:
        img_HWC = open_picture(path)
    except UserError as error:
        warn(str(error))
        return False
    made_HWC = tiling.reconstruct(tokenizer, img_HWC)
    error = np.mean(np.square(made_HWC.astype(np.float32) - img_HWC))
    Image.fromarray(made_HWC).save(target)
    decibels = 10 * np.log10(255**2 / max(error, 1e-6))
    print(f'{target}: {img_HWC.shape[1]}x{img_HWC.shape[0]}, PSNR {decibels:.2f} dB')
    return True


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'tokenizer; the shipped one when empty')
    flags.DEFINE_string('out', None, 'folder for the pictures', required=True)
    flags.DEFINE_integer('tile', 512, 'side of a tile in pixels')
    flags.DEFINE_integer('overlap', 128, 'least pixels that neighbouring tiles share')
    app.run(guarded(main), flags_parser=parse)
