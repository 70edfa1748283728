"""Pre-tokenised training examples: picture tokens and text states, in sharded ArrayRecord files.

The tokenizer and the text encoder are frozen while the base model trains (§2.1, §2.2), so both can run once. A record
is a safetensors file in bytes: `tok` [T], `txt` [len, D] bfloat16 (its real length, without pads) and the caption.
meta.json says which tokenizer and text encoder made them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from muse.errors import UserError

_DTYPES = {'U16': np.dtype(np.uint16), 'I32': np.dtype(np.int32), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_SHARD = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.array_record')


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What made the records of a folder."""

    tokenizer_hash: str
    text_encoder_hash: str
    grid: tuple[int, int]
    text_width: int
    counts: dict[str, int] = field(default_factory=dict)  # split -> records


def encode_record(tok_T: np.ndarray, txt_SD: np.ndarray, caption: str) -> bytes:
    """One record.

    Args:
        tok_T: integer [T], 0 <= id < 2^31; stored as uint16 where that holds them.
        txt_SD: [len, D], the text states without pads (len 0 is no text); stored as bfloat16.
        caption: kept for reading; training does not use it.
    """
    small = tok_T.size == 0 or int(tok_T.max()) < 2**16
    tensors = {
        'tok': np.ascontiguousarray(tok_T, np.uint16 if small else np.int32),
        'txt': np.ascontiguousarray(txt_SD, ml_dtypes.bfloat16),
    }
    return safetensors.numpy.save(tensors, {'caption': caption})


def decode_record(record: bytes, text_length: int) -> dict[str, Any]:
    """Reads one record.

    Args:
        record: bytes from `encode_record`.
        text_length: S, the length to pad or cut the text to.

    Returns:
        'tok' int32 [T], 'txt' bfloat16 [S, D] with zeros from 'len' on, 'len' int32 scalar.
    """
    tensors, _ = _parse(record)
    stored_SD = tensors['txt'][:text_length]
    txt_SD = np.zeros((text_length, stored_SD.shape[1]), ml_dtypes.bfloat16)
    txt_SD[: len(stored_SD)] = stored_SD
    return {'tok': tensors['tok'].astype(np.int32), 'txt': txt_SD, 'len': np.int32(len(stored_SD))}


def record_caption(record: bytes) -> str:
    """The caption of one record."""
    return _parse(record)[1]['caption']


def _parse(record: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (views of the bytes) and metadata of a safetensors file; the package's own reader drops the metadata."""
    (length,) = struct.unpack_from('<Q', record)
    header = json.loads(record[8 : 8 + length])
    metadata = header.pop('__metadata__')
    tensors = {}
    for name, spec in header.items():
        dtype, (begin, end) = _DTYPES[spec['dtype']], spec['data_offsets']
        flat = np.frombuffer(record, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
        tensors[name] = flat.reshape(spec['shape'])
    return tensors, metadata


class Writer:
    """Writes the records of one split; used with `with`. Files appear under their names only when all are whole."""

    def __init__(self, folder: Path, split: str, meta: Meta, *, shards: int = 8, shard: int | None = None):
        """Args:
            folder: made if missing; may hold other splits made with the same models.
            split: name of the split, the beginning of the file names.
            meta: what makes the records; `counts` is kept up by the writer.
            shards: number of files.
            shard: write this one of them alone; its records are added to the count of the split.

        Raises:
            UserError: the folder cannot be written, holds this split already, or was made with other models.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'cannot write to {folder} ({error.strerror}): choose another folder') from None
        if shard is None and any(folder.glob(f'{split}-*-of-*.array_record')):
            raise UserError(f"{folder} already holds the split '{split}': delete its files or choose another folder")
        known = read_meta(folder) if (folder / 'meta.json').exists() else meta
        if dataclasses.replace(known, counts={}) != dataclasses.replace(meta, counts={}):
            raise UserError(f'{folder} was made with another tokenizer or text encoder: choose another folder')
        self._folder, self._split, self._meta = folder, split, meta
        files = [folder / f'{split}-{i:05d}-of-{shards:05d}.array_record' for i in range(shards)]
        self._files = files if shard is None else [files[shard]]
        self._adds = shard is not None
        self._written = 0
        self._writers: list[Any] = []

    def __enter__(self) -> Writer:
        from array_record.python.array_record_module import ArrayRecordWriter

        # group_size 1: records are read one by one in random order.
        self._writers = [ArrayRecordWriter(f'{file}.partial', 'group_size:1') for file in self._files]
        return self

    def write(self, record: bytes) -> None:
        """Adds one record from `encode_record`; shards take turns."""
        self._writers[self._written % len(self._writers)].write(record)
        self._written += 1

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for writer in self._writers:
            writer.close()
        for file in self._files:
            partial = Path(f'{file}.partial')
            if kind is None:
                partial.replace(file)
            else:
                partial.unlink(missing_ok=True)
        if kind is None:
            # Read again here: another split may have been finished meanwhile.
            known = read_meta(self._folder).counts if (self._folder / 'meta.json').exists() else {}
            count = self._written + (known.get(self._split, 0) if self._adds else 0)
            meta = dataclasses.replace(self._meta, counts=known | {self._split: count})
            partial = self._folder / 'meta.json.partial'
            partial.write_text(json.dumps(dataclasses.asdict(meta), indent=1) + '\n', encoding='utf-8')
            partial.replace(self._folder / 'meta.json')


def read_meta(folder: Path) -> Meta:
    """The meta.json of a folder.

    Raises:
        UserError: none there, or not readable.
    """
    try:
        values = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        return Meta(**values | {'grid': tuple(values['grid'])})
    except OSError:
        raise UserError(f'{folder} holds no meta.json: make it with tools/precompute.py') from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{folder / "meta.json"} is damaged ({error}): make the folder again') from None


def record_files(folder: Path, split: str) -> list[str]:
    """The shards of a split in order, all of them present.

    Raises:
        UserError: no such split, or a shard is missing.
    """
    meta = read_meta(folder)
    found = {}
    for file in folder.glob('*.array_record'):
        match = _SHARD.fullmatch(file.name)
        if match and match[1] == split:
            found[int(match[2])] = (str(file), int(match[3]))
    if not found:
        raise UserError(f"{folder} has no split '{split}', only {', '.join(meta.counts) or 'none'}: set data.split")
    expected = next(iter(found.values()))[1]
    missing = sorted(set(range(expected)) - set(found))
    if missing:
        raise UserError(f"{folder}: shard {missing[0]} of {expected} of '{split}' is missing: copy the folder again")
    return [found[i][0] for i in range(expected)]
