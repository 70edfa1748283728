"""Pictures more and more unlike a first one: python examples/variation.py"""

from __future__ import annotations

from pathlib import Path

import muse


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    [picture] = model.generate('a panda, fluent 3d style', seed=0)
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        varied = model.variation(picture, 'a panda, fluent 3d style', strength=strength, seed=1)
        varied.save(out / f'variation_{round(100 * strength):03d}.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
