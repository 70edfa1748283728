"""Doubles a picture's size: python examples/upscale.py RELEASE PICTURE (a release that holds a super-res)"""

from __future__ import annotations

import sys
from pathlib import Path

import muse
from muse.errors import UserError, main_guard


def main(model: muse.Muse, out: Path, picture: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.upscale(picture, seed=0).save(out / f'{picture.stem}_large.png')


if __name__ == '__main__':
    with main_guard():
        if len(sys.argv) != 3:
            raise UserError('give a release that holds a super-res, and a picture')
        main(muse.load(sys.argv[1]), Path('out'), Path(sys.argv[2]))
