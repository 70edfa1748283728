"""Draws pictures, and one prompt under several settings: python examples/generate.py"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import muse


def main(model: muse.Muse, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    images = model.generate(['a red apple, noto style', 'a dog, twemoji style'], num_images=2, seed=0)
    for index, image in enumerate(images):
        image.save(out / f'generate_{index}.png')

    # The other knobs of the decoding start from what the release came with.
    decoding = dataclasses.replace(model.release.decode, order='halton', top_p=0.9)
    [image] = model.generate('a red apple, noto style', negative_prompt='green', seed=0, decoding=decoding)
    image.save(out / 'generate_halton.png')


if __name__ == '__main__':
    main(muse.load(), Path('out'))
