"""Changes a picture by words alone, and watches: python examples/edit.py"""

from __future__ import annotations

from pathlib import Path

import muse
from muse.config import FreeEditConfig


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    [picture] = model.generate('a red apple, noto style', seed=0)
    free = FreeEditConfig(iterations=60)  # share 8 %, guidance 4, top-k 3: the paper's
    frames = model.edit_frames(picture, 'a green apple, noto style', [0, 15, 30, 60], free=free, seed=0)
    for index, frame in enumerate(frames):
        frame.save(out / f'edit_{index}.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
