"""Pictures with transparency that scenes are composed of, read quickly and at random.

They come from the sample in the package, from the dataset of `tools/make_emoji.py`, or from its sprite cache: one
memory-mapped array for each split, of premultiplied pixels at one size, shared by all worker processes.
"""

from __future__ import annotations

import importlib.resources
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muse.data.splits import SPLITS
from muse.errors import UserError, nearest, warn

CACHE_FOLDER = 'sprites_{side}'


@dataclass(frozen=True)
class Words:
    """What is known of one sprite."""

    key: str
    label: str
    style: str
    tags: tuple[str, ...]
    group: str


class Sprites:
    """A list of sprites: `words[i]`, `picture(i, side)` and, for each style, the indices of its sprites."""

    def __init__(self, words: list[Words], read: Callable[[int], Image.Image]):
        """`read(i)` gives sprite i as a square picture in mode RGBa (premultiplied) at its stored size."""
        self.words = words
        self.by_style: dict[str, list[int]] = {}
        for index, word in enumerate(words):
            self.by_style.setdefault(word.style, []).append(index)
        self._read = read

    def __len__(self) -> int:
        return len(self.words)

    def picture(self, index: int, side: int) -> Image.Image:
        """Sprite `index` in mode RGBA, side x side pixels."""
        stored = self._read(index)
        # Resized while premultiplied, so that no colour bleeds out of transparent pixels. Hamming does not overshoot.
        sized = stored if stored.size == (side, side) else stored.resize((side, side), Image.Resampling.HAMMING)
        return sized.convert('RGBA')


def decode_sprite(data: bytes) -> Image.Image:
    """A picture file as a square, premultiplied picture (mode RGBa)."""
    picture = Image.open(io.BytesIO(data)).convert('RGBA')
    if picture.width != picture.height:
        side = max(picture.size)
        square = Image.new('RGBA', (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return picture.convert('RGBa')


def load_sprites(path: str, split: str, image_size: int) -> Sprites:
    """Opens the sprites of a split.

    Args:
        path: the folder given to `tools/make_emoji.py --out`, or a version folder in it; '' is the sample.
        split: 'train', 'heldout_labels' or 'heldout_pairs'.
        image_size: side of the pictures to compose; a cache of at least this size is used when there is one.

    Raises:
        UserError: no dataset there, an unknown or an empty split.
    """
    if split not in SPLITS:
        raise UserError(f"the split '{split}' does not exist{nearest(split, SPLITS)}")
    if not path:
        return _sample_sprites(split)
    folder = find_dataset(Path(path))
    caches = sorted((int(c.name.split('_')[1]), c) for c in folder.glob(CACHE_FOLDER.format(side='[0-9]*')))
    for side, cache in caches:
        if side >= image_size and (cache / f'{split}.jsonl').is_file():
            return _cached_sprites(cache, split)
    warn(
        f'{folder} has no sprite cache of {image_size} px or more, so drawing is slow: '
        f'run tools/make_emoji.py --out={path} --cache_size={image_size}'
    )
    return _dataset_sprites(folder, split)


def find_dataset(path: Path) -> Path:
    """The version folder of the emoji dataset at or under `path`."""
    found = sorted(
        file.parent
        for pattern in ('', 'emoji_art/*/*/', '*/*/', '*/')
        for file in path.glob(f'{pattern}dataset_info.json')
        if 'emoji_art' in file.parts
    )
    if not found:
        raise UserError(f'{path} holds no emoji dataset: make it with tools/make_emoji.py --out={path}')
    if len(set(found)) > 1:
        raise UserError(f'{path} holds several datasets: give the folder of one, e.g. {found[0]}')
    return found[0]


def _sample_sprites(split: str) -> Sprites:
    folder = importlib.resources.files('muse') / 'assets' / 'sample_art'
    rows = [json.loads(line) for line in (folder / 'index.jsonl').read_text(encoding='utf-8').splitlines()]
    rows = [row for row in rows if row['split'] == split]
    return Sprites([_words(row) for row in rows], _Decoded([(folder / row['file']).read_bytes() for row in rows]))


class _Decoded:
    """Files held in memory, each decoded once."""

    def __init__(self, files: list[bytes]):
        self._files = files
        self._pictures: dict[int, Image.Image] = {}

    def __call__(self, index: int) -> Image.Image:
        if index not in self._pictures:
            self._pictures[index] = decode_sprite(self._files[index])
        return self._pictures[index]


def _words(row: dict[str, Any]) -> Words:
    return Words(row['key'], row['label'], row['style'], tuple(row['tags']), row['group'])


def _cached_sprites(cache: Path, split: str) -> Sprites:
    rows = [json.loads(line) for line in (cache / f'{split}.jsonl').read_text(encoding='utf-8').splitlines()]
    return Sprites([_words(row) for row in rows], _MemoryMapped(cache / f'{split}.npy'))


class _MemoryMapped:
    """Rows of a .npy file; each process opens its own map, for a pickled map would be a copy of the whole array."""

    def __init__(self, file: Path):
        self._file = file
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {'_file': self._file, '_rows': None}

    def __call__(self, index: int) -> Image.Image:
        rows = self._rows = np.load(self._file, mmap_mode='r') if self._rows is None else self._rows
        row = rows[index]
        return Image.frombuffer('RGBa', row.shape[:2], row.tobytes(), 'raw', 'RGBa', 0, 1)


class _DatasetFiles:
    """Pictures decoded from the records at each read."""

    def __init__(self, records: Any):
        self._records = records

    def __call__(self, index: int) -> Image.Image:
        return decode_sprite(self._records[index]['image'])


def _dataset_sprites(folder: Path, split: str) -> Sprites:
    records = open_records(folder, split)
    return Sprites([record_words(records[i]) for i in range(len(records))], _DatasetFiles(records))


def open_records(folder: Path, split: str) -> Any:
    """The records of a split through TFDS: a sequence of dicts, `image` as file bytes, texts as bytes."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(folder))
    return builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})


def record_words(record: dict[str, Any]) -> Words:
    """The words of one TFDS record."""
    key, label, style, tags, group = (record[name].decode() for name in ('key', 'label', 'style', 'tags', 'group'))
    return Words(key, label, style, tuple(filter(None, tags.split(','))), group)


def cache_index(folder: Path, split: str, side: int) -> Path:
    """The file that makes a sprite cache of a split complete."""
    return folder / CACHE_FOLDER.format(side=side) / f'{split}.jsonl'


def write_cache(folder: Path, split: str, side: int, pictures: Any, words: list[Words]) -> None:
    """Writes the sprite cache of one split.

    Args:
        folder: version folder of the dataset.
        split: name of the split.
        side: size of the stored sprites.
        pictures: iterable of uint8 arrays [side, side, 4], premultiplied, in the order of `words`.
        words: the words of each.
    """
    index = cache_index(folder, split, side)
    cache = index.parent
    cache.mkdir(exist_ok=True)
    index.unlink(missing_ok=True)
    shape = (len(words), side, side, 4)
    rows = np.lib.format.open_memmap(cache / f'{split}.npy', mode='w+', dtype=np.uint8, shape=shape)
    for row, picture in zip(rows, pictures, strict=True):
        row[:] = picture
    rows.flush()
    # The index comes last: a cache without it is not used.
    partial = index.with_suffix('.partial')
    partial.write_text(''.join(json.dumps(asdict(word)) + '\n' for word in words), encoding='utf-8')
    partial.replace(index)


def cache_row(data: bytes, side: int) -> np.ndarray:
    """One row of the cache, uint8 [side, side, 4], from a picture file."""
    picture = decode_sprite(data)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.HAMMING)
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(side, side, 4)
