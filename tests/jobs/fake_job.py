"""A job without a model: pictures that are a function of their number, drawn as slowly as wanted. As a script:

python fake_job.py OUT FORM PICTURES PER_UNIT SECONDS [PROCESS COUNT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from muse.jobs.plan import Item
from muse.jobs.run import open_store, picture_files, run


class Numbers:
    """A plan of so many pictures."""

    def __init__(self, pictures: int, per_unit: int, seed: int = 0):
        self._pictures, self._per_unit, self._seed = pictures, per_unit, seed
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return -(-self._pictures // self._per_unit)

    def items(self, unit: int) -> list[Item]:
        numbers = range(unit * self._per_unit, min((unit + 1) * self._per_unit, self._pictures))
        own = {'seed': self._seed, 'muse_version': '0'}
        return [Item(f'{n:04d}_x', {'prompt': f'number {n}', **own}, n) for n in numbers]

    @property
    def pictures(self) -> int:
        return self._pictures

    def draw(self, unit: int, items: list[Item], seconds: float = 0.0):
        del unit
        for item in items:
            time.sleep(seconds)
            self.drawn.append(item.task)
            noise_HWC = np.random.default_rng([self._seed, item.task]).integers(0, 256, (16, 16, 3), np.uint8)
            yield Image.fromarray(noise_HWC)


def pack(item: Item, image: Image.Image):
    return picture_files(image, item.about, item.about_json) | {'.gif': b'moving'}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == '__main__':
    out, form, pictures, per_unit, seconds, *processes = sys.argv[1:]
    process, count = map(int, processes or (0, 1))
    plan = Numbers(int(pictures), int(per_unit))
    store = open_store(out, form, ['.gif'], process, count)
    run(plan, store, lambda *args: plan.draw(*args, float(seconds)), pack, process=process, count=count)
