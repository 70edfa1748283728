"""Looks at a picture's tokens and mixes two pictures: python examples/tokens.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import muse
from muse.pipeline import Row


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    settings = model.settings(seed=0, superres=False)
    apple, dog = (next(model.draw([Row(prompt=text)], settings)).image for text in ('an apple', 'a dog'))
    left, right = model.encode(apple), model.encode(dog)
    print(f'{left.shape[0]} × {left.shape[1]} tokens, {len(np.unique(left))} of them different')
    mixed = np.where(np.arange(left.shape[1]) < left.shape[1] // 2, left, right)
    model.decode(mixed).save(out / 'tokens_mixed.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
