"""Pictures of one batch with settings of their own, and how one came about as a GIF: python examples/rows.py"""

from __future__ import annotations

from pathlib import Path

import muse
from muse.pipeline import Row


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        Row(prompt='a cat, noto style', seed=1),
        Row(prompt='a cat, noto style', seed=2, guidance_scale=6.0),
        Row(prompt='a cat, noto style', seed=2, negative_prompt='a dog'),
    ]
    for index, drawn in enumerate(model.draw(rows, model.settings(steps=12))):
        drawn.image.save(out / f'rows_{index}.png')
        frames = model.frames(drawn)
        frames[0].save(out / f'rows_{index}.gif', save_all=True, append_images=frames[1:], duration=120, loop=0)


if __name__ == '__main__':
    main(muse.load(), Path('out'))
