"""Where training examples come from: each `DataConfig.kind` behind one small interface, `muse.data.examples.Source`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from muse.config import DataConfig
from muse.data import precomputed, scenes
from muse.data.examples import BadExample, Source, make_example
from muse.data.folder import index_folder
from muse.data.splits import HELDOUT, TRAIN, unit_hash
from muse.data.sprites import Sprites, load_sprites
from muse.errors import UserError, nearest

_UNSPLIT = ('folder', 'webdataset', 'parquet')


def open_source(data: DataConfig) -> Source:
    """Opens the source that a config names.

    Raises:
        UserError: it does not exist, is empty, or a setting does not fit its kind.
    """
    if data.image_size < 1 or data.max_objects not in (1, 2, 3) or data.text_length < 1:
        raise UserError('data.image_size and data.text_length must be at least 1 and data.max_objects 1, 2 or 3')
    if data.min_side < 0:
        raise UserError(f'data.min_side is {data.min_side}: it must be 0 (no limit) or more')
    if not 0 <= data.max_unread <= 1:
        raise UserError(f'data.max_unread is {data.max_unread}: give a share from 0 to 1')
    _check_split(data)
    if data.kind != 'scenes' and not data.path:
        raise UserError(f"data.path is empty: kind '{data.kind}' needs a folder")
    match data.kind:
        case 'scenes':
            if data.random_flip:
                raise UserError("data.random_flip does not fit kind 'scenes': its captions say left and right")
            sprites = load_sprites(data.path, data.split, data.image_size)
            source = _Scenes(sprites, data) if data.split == TRAIN else _Plain(sprites, data)
        case 'tfds':
            source = _Tfds(data)
        case 'folder':
            source = _Folder(data)
        case 'webdataset':
            from muse.data.webdataset import WebDataset

            source = WebDataset(data)
        case 'parquet':
            from muse.data.parquet import Parquet

            source = Parquet(data)
        case 'precomputed':
            source = _Precomputed(data)
    if data.kind in _UNSPLIT and data.heldout_share:
        source = _Side(source, data)
    if len(source) == 0:
        raise UserError(f"the split '{data.split}' of '{data.path}' is empty: choose another split")
    return source


def _check_split(data: DataConfig) -> None:
    if not 0 <= data.heldout_share < 1:
        raise UserError(f'data.heldout_share is {data.heldout_share}: give a share from 0 to below 1')
    if data.kind not in _UNSPLIT or data.split in ('', TRAIN):
        return
    if data.split != HELDOUT:
        raise UserError(
            f"data.split is '{data.split}', but kind '{data.kind}' has no splits but '{TRAIN}' and '{HELDOUT}'"
        )
    if not data.heldout_share:
        raise UserError(
            f"data.split is '{HELDOUT}', but data.heldout_share is 0: set it to a share such as 0.02, or give held-out "
            'pictures a folder of their own'
        )


class _Side(Source):
    """The records of one side of a source without splits, decided by their names, as order and place may change."""

    def __init__(self, source: Source, data: DataConfig):
        held = (unit_hash(HELDOUT, source.name(record)) < data.heldout_share for record in range(len(source)))
        is_held = np.fromiter(held, bool, len(source))
        self._heldout = data.split == HELDOUT
        self._source, self._records = source, np.flatnonzero(is_held if self._heldout else ~is_held)
        if not len(self._records):
            raise UserError(
                f"data.heldout_share {data.heldout_share} of {len(source)} pictures leaves none in '{data.split}': "
                'change the share'
            )

    def __len__(self) -> int:
        return len(self._records)

    def name(self, record: int) -> str:
        return self._source.name(int(self._records[record]))

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        return self._source.example(int(self._records[record]), rng)

    def skipped(self) -> Iterator[tuple[str, str]]:
        return iter(()) if self._heldout else self._source.skipped()  # named once


class _Scenes(Source):
    """Random scenes; record i appears in the scene of record i."""

    def __init__(self, sprites: Sprites, data: DataConfig):
        self._sprites, self._data = sprites, data

    def __len__(self) -> int:
        return len(self._sprites)

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        img, caption, _ = scenes.compose(self._sprites, record, rng, self._data.image_size, self._data.max_objects)
        return {'img': img, 'caption': caption}


class _Plain(Source):
    """Each sprite in the evaluation form."""

    def __init__(self, sprites: Sprites, data: DataConfig):
        self._sprites, self._data = sprites, data

    def __len__(self) -> int:
        return len(self._sprites)

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        del rng
        img, caption = scenes.plain(self._sprites, record, self._data.image_size)
        return {'img': img, 'caption': caption}


class _Folder(Source):
    """Pictures with a captions file."""

    def __init__(self, data: DataConfig):
        (self._rows, self._skipped), self._data = index_folder(Path(data.path), bool(data.caption_key)), data

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, record: int) -> str:
        return self._rows[record][0].relative_to(self._data.path).as_posix()

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        path, caption = self._rows[record]
        return make_example(path, caption, str(path), self._data, rng)

    def skipped(self) -> Iterator[tuple[str, str]]:
        return iter(self._skipped)


class _Tfds(Source):
    """Any TFDS dataset with a picture and a caption."""

    def __init__(self, data: DataConfig):
        import tensorflow_datasets as tfds

        if not data.name:
            raise UserError("data.name is empty: kind 'tfds' needs a dataset, e.g. 'coco_captions'")
        try:
            builder: Any = tfds.builder(data.name, data_dir=data.path)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            message = str(error).splitlines()[0]
            raise UserError(f"'{data.name}' was not found in {data.path} ({message}): check data.name") from None
        if not builder.is_prepared():
            way = f'tfds build {data.name} --data_dir={data.path} --file_format=array_record'
            raise UserError(f'{data.name} is not prepared in {data.path}: run `{way}`')
        if data.split not in builder.info.splits:
            raise UserError(f"data.split '{data.split}' does not exist{nearest(data.split, builder.info.splits)}")
        for key in (data.image_key, data.caption_key.split('/')[0]):
            if key not in builder.info.features:
                raise UserError(f"{data.name} has no feature '{key}'{nearest(key, builder.info.features)}")
        is_file = isinstance(builder.info.features[data.image_key], tfds.features.Image)
        try:
            self._records: Any = builder.as_data_source(
                split=data.split, decoders={data.image_key: tfds.decode.SkipDecoding()} if is_file else None
            )
        except NotImplementedError as error:
            raise UserError(f'{data.name} cannot be read at random ({str(error).splitlines()[0]})') from None
        self._data = data
        if len(self._records) and _caption(self._records[0], data.caption_key, np.random.default_rng(0)) is None:
            raise UserError(
                f"data.caption_key '{data.caption_key}' leads to no text in {data.name}, whose features are "
                f'{" ".join(str(builder.info.features).split())}: name one of Text, inside others as captions/text'
            )

    def __len__(self) -> int:
        return len(self._records)

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        row, name = self._records[record], f'record {record} of {self._data.name}'
        if (caption := _caption(row, self._data.caption_key, rng)) is None:
            raise BadExample(name, f"it has no text at '{self._data.caption_key}'")
        return make_example(row[self._data.image_key], caption, name, self._data, rng)


class _Precomputed(Source):
    """Records of tools/precompute.py."""

    def __init__(self, data: DataConfig):
        import grain

        files = precomputed.record_files(Path(data.path), data.split)
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource(files)
        except RuntimeError as error:
            raise UserError(
                f"the shards of '{data.split}' in {data.path} are damaged ({error}): copy them again"
            ) from None
        self._data = data

    def __len__(self) -> int:
        return len(self._records)

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        del rng
        try:
            return precomputed.decode_record(self._records[record], self._data.text_length)
        except (RuntimeError, ValueError, KeyError, struct.error) as error:  # ArrayRecord's checksums, or what it says
            reason = (str(error).splitlines() or [type(error).__name__])[0].split(' (')[0]
            raise BadExample(f'record {record} of {self._data.path}', f'it cannot be read: {reason}') from None


def _caption(row: Any, key: str, rng: np.random.Generator) -> str | None:
    """The caption under a key such as 'captions/text', of several one by chance; None: there is no text."""
    value: Any = row
    for part in key.split('/'):
        try:
            value = [item[part] for item in value] if isinstance(value, list) else value[part]
        except (KeyError, TypeError, IndexError):
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        value = value[int(rng.integers(len(value)))] if value else ''
    text = value.decode(errors='replace') if isinstance(value, bytes) else value
    return text if isinstance(text, str) else None
