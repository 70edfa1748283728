"""Paints half of a picture anew: python examples/inpaint.py"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

import muse


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    [picture] = model.generate('a red apple, noto style', seed=0)
    mask = Image.new('L', picture.size)  # black is kept …
    ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, picture.width, picture.height), fill=255)  # … white is not
    picture.save(out / 'inpaint_before.png')
    model.inpaint(picture, mask, 'a green apple, noto style', seed=0).save(out / 'inpaint_after.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
