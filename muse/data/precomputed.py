"""Pre-tokenised training examples: picture tokens and text states, in sharded ArrayRecord files.

The tokenizer and the text encoder are frozen while the base model trains (§2.1, §2.2), so both can run once. A record
is a safetensors file in bytes: `tok` [T], `txt` [len, D] bfloat16 (its real length, without pads) and the caption; for
the super-res (§2.4) also `low` [T2], the base's tokens of the same picture at the base's size.
meta.json says which tokenizer and text encoder made them, <split>.split.json what a split holds. `muse.data.shards`
writes them.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from muse.errors import UserError

_DTYPES = {'U16': np.dtype(np.uint16), 'I32': np.dtype(np.int32), 'BF16': np.dtype(ml_dtypes.bfloat16)}
SPLIT_ENDING = '.split.json'


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What made the records of a folder."""

    tokenizer_hash: str
    text_encoder_hash: str
    grid: tuple[int, int]
    text_width: int
    low_tokenizer_hash: str | None = None  # None: the records hold no low-res tokens
    low_grid: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a split was made of and, once all its shards are there, what they hold."""

    plan: dict[str, Any]  # settings that decide every record; a run goes on only where they are the same
    shards: int
    sizes: list[int] | None = None  # bytes of each shard; None: the split is not finished
    records: int = 0
    rejected: int = 0  # examples that gave no record; named in <split>.rejects.jsonl
    skipped: int = 0  # of the source, found unusable when it was opened; named there too
    without_text: int = 0
    full_text: int = 0  # as long as a text may be: longer ones were cut there
    cut: list[list[str]] = field(default_factory=list)  # the first few of those: how they begin, where the lost begins


def shard_file(folder: Path, split: str, number: int, shards: int) -> Path:
    """The name of one shard."""
    return folder / f'{split}-{number:05d}-of-{shards:05d}.array_record'


def encode_record(tok_T: np.ndarray, txt_SD: np.ndarray, caption: str, low_T: np.ndarray | None = None) -> bytes:
    """One record.

    Args:
        tok_T: integer [T], 0 <= id < 2^31; stored as uint16 where that holds them.
        txt_SD: [len, D], the text states without pads (len 0 is no text); stored as bfloat16.
        caption: kept for reading; training does not use it.
        low_T: ids of the low-res tokens, as `tok_T`; None: the record is for the base.
    """
    tensors = {'tok': _small(tok_T), 'txt': np.ascontiguousarray(txt_SD, ml_dtypes.bfloat16)}
    if low_T is not None:
        tensors['low'] = _small(low_T)
    return safetensors.numpy.save(tensors, {'caption': caption})


def _small(tok_T: np.ndarray) -> np.ndarray:
    fits = tok_T.size == 0 or int(tok_T.max()) < 2**16
    return np.ascontiguousarray(tok_T, np.uint16 if fits else np.int32)


def decode_record(record: bytes, text_length: int) -> dict[str, Any]:
    """Reads one record.

    Args:
        record: bytes from `encode_record`.
        text_length: the length to cut the text to.

    Returns:
        'tok' int32 [T], 'txt' bfloat16 [len, D] (a view of the record, not padded), 'len' int32 scalar; 'low' int32
        [T2] where it is stored.
    """
    tensors = _parse(record)
    txt_SD = tensors['txt'][:text_length]
    tokens = {name: tensors[name].astype(np.int32) for name in ('tok', 'low') if name in tensors}
    return {**tokens, 'txt': txt_SD, 'len': np.int32(len(txt_SD))}


class TextPadder:
    """Puts the pads into the texts of batches.

    Padded states are large (533 MB a batch of 512 at T5-XXL's width), and memory fresh from the system costs several
    times what filling it does. So an array is filled again once nobody else holds it: neither the caller nor a device
    that is still reading it.
    """

    def __init__(self, text_length: int):
        self._text_length = text_length
        self._arrays: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []  # of the texts that each array was last filled with

    def __call__(self, packed_ND: np.ndarray, len_B: np.ndarray) -> np.ndarray:
        """Texts one after another → [B, S, D] with zeros from each one's length on."""
        i = self._free((len(len_B), self._text_length, packed_ND.shape[1]), packed_ND.dtype)
        before_B, self._lengths[i] = self._lengths[i], np.array(len_B)
        starts = np.cumsum(len_B) - len_B
        for txt_SD, start, length, before in zip(self._arrays[i], starts, len_B, before_B, strict=True):
            txt_SD[:length] = packed_ND[start : start + length]
            txt_SD[length:before] = 0
        return self._arrays[i]

    def _free(self, shape: tuple[int, ...], dtype: np.dtype) -> int:
        for i in range(len(self._arrays)):
            unheld = sys.getrefcount(self._arrays[i]) <= 2  # this list and the call's argument; a view counts as well
            if unheld and self._arrays[i].shape == shape and self._arrays[i].dtype == dtype:
                return i
        self._arrays.append(np.zeros(shape, dtype))
        self._lengths.append(np.zeros(shape[0], np.int32))
        return len(self._arrays) - 1


def _parse(record: bytes) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, views of its bytes: the package's own reader copies them."""
    (length,) = struct.unpack_from('<Q', record)
    header = json.loads(record[8 : 8 + length])
    del header['__metadata__']  # the caption
    tensors = {}
    for name, spec in header.items():
        dtype, (begin, end) = _DTYPES[spec['dtype']], spec['data_offsets']
        flat = np.frombuffer(record, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
        tensors[name] = flat.reshape(spec['shape'])
    return tensors


def read_meta(folder: Path) -> Meta:
    """The meta.json of a folder.

    Raises:
        UserError: none there, or not readable.
    """
    try:
        values = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        low_grid = values.get('low_grid')
        return Meta(**values | {'grid': tuple(values['grid']), 'low_grid': tuple(low_grid) if low_grid else None})
    except OSError:
        raise UserError(f'{folder} holds no meta.json: make it with tools/precompute.py') from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{folder / "meta.json"} is damaged ({error}): make the folder again') from None


def read_splits(folder: Path) -> dict[str, Split]:
    """The splits of a folder by name, finished or not. Raises UserError when a description of one is damaged."""
    splits = {}
    for file in sorted(folder.glob(f'*{SPLIT_ENDING}')):
        try:
            splits[file.name.removesuffix(SPLIT_ENDING)] = Split(**json.loads(file.read_text(encoding='utf-8')))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f'{file} is damaged ({error}): make the split again') from None
    return splits


def record_files(folder: Path, split: str) -> list[str]:
    """The shards of a finished split in order, all of them whole.

    Raises:
        UserError: no such split, it is not finished, or a shard is missing or truncated.
    """
    read_meta(folder)
    splits = read_splits(folder)
    if split not in splits:
        raise UserError(f"{folder} has no split '{split}', only {', '.join(splits) or 'none'}: set data.split")
    sizes = splits[split].sizes
    if sizes is None:
        raise UserError(f"{folder}: the split '{split}' is not finished: run its tools/precompute.py command again")
    files = [shard_file(folder, split, i, len(sizes)) for i in range(len(sizes))]
    for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if not file.exists():
            raise UserError(f"{folder}: shard {i} of {len(sizes)} of '{split}' is missing: copy the folder again")
        if file.stat().st_size != size:  # ArrayRecord reads a truncated file as an empty one
            raise UserError(f'{file} has {file.stat().st_size} bytes instead of {size}: copy it again')
    return [str(file) for file in files]
