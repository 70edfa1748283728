"""Grows a picture to the right, and on all sides: python examples/outpaint.py"""

from __future__ import annotations

from pathlib import Path

import muse


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    [picture] = model.generate('a red apple, noto style', seed=0)
    wide = model.outpaint(picture, 'a red apple left of a pizza, noto style', right=picture.width, seed=0)
    wide.save(out / 'outpaint_right.png')
    rim = picture.width // 4
    around = model.outpaint(picture, 'a red apple, noto style', left=rim, top=rim, right=rim, bottom=rim)
    around.save(out / 'outpaint_around.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
