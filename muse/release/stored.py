"""Tensors that still lie in a checkpoint's files, and their way into sharded arrays a piece at a time.

A checkpoint larger than the host's memory is loaded by copying, for each device, the part it holds out of the file into
a buffer of that part's size. The safetensors package maps whole files into memory instead, which counts twice while
the arrays are made; so their header is read here, and their data with plain reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from muse.errors import UserError

FLOATS = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_OTHERS = {'F64': 8, 'I64': 8, 'U64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2, 'I8': 1, 'U8': 1, 'BOOL': 1}
BLOCK_BYTES = 2**20  # read at a time by each thread
_TILE = 128  # rows and columns transposed at a time, which a cache holds

Index = tuple[slice, ...]


class Stored(Protocol):
    """A tensor in a file, under the shape that the model wants."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        """Fills `out` with `tensor[index]`, cast to `out`'s type. Slices have a start and a stop, and no step."""
        ...

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in the order of the file, some of it at a time."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """Floats in C order at an offset of a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) for all from `start` to `stop`."""
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        step = max(1, BLOCK_BYTES // max(1, width * self.dtype.itemsize))
        for row in range(start, stop, step):
            count = min(step, stop - row)
            offset = self.offset + row * width * self.dtype.itemsize
            flat = np.fromfile(self.path, self.dtype, count * width, offset=offset)
            if flat.size != count * width:
                raise UserError(f"weights file '{self.path}' became shorter while it was read: copy it again")
            yield row, flat.reshape(count, *self.shape[1:])

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        rows = index[0]
        for row, block in self._rows(rows.start, rows.stop):
            here = out[row - rows.start : row - rows.start + len(block)]
            _copy(here, block[(slice(None), *index[1:])].astype(out.dtype, copy=False))

    def blocks(self) -> Iterator[np.ndarray]:
        return (block for _, block in self._rows(0, self.shape[0]))


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`; tile by tile where it transposes, which numpy does several times slower at once."""
    if out.ndim != 2 or out.strides[1] == out.itemsize:
        out[...] = values
        return
    for row in range(0, out.shape[0], _TILE):
        for column in range(0, out.shape[1], _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            out[tile] = values[tile]


@dataclass(frozen=True)
class Transposed:
    """A stored matrix with rows and columns swapped."""

    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        self.stored.copy_into(out.T, index[::-1])

    def blocks(self) -> Iterator[np.ndarray]:
        return self.stored.blocks()


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape as one, along a new first axis. Raises UserError when their shapes differ."""

    parts: Sequence[Stored]

    def __post_init__(self) -> None:
        for number, part in enumerate(self.parts):
            if part.shape != self.parts[0].shape:
                raise UserError(
                    f'a tensor of layer {number} has the shape {part.shape}, layer 0 has {self.parts[0].shape}: the '
                    'checkpoint is damaged; copy it again'
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            work = [pool.submit(part.copy_into, out[i], index[1:]) for i, part in enumerate(self.parts[index[0]])]
            for done in work:
                done.result()

    def blocks(self) -> Iterator[np.ndarray]:
        return (block for part in self.parts for block in part.blocks())


@dataclass(frozen=True)
class InMemory:
    """A small tensor that came with a checkpoint's index."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        out[...] = self.values[index]

    def blocks(self) -> Iterator[np.ndarray]:
        yield self.values


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """The float tensors of a safetensors file by name; other types are left out. Only the header is read.

    Raises:
        UserError: the file is missing, truncated, or of another kind.
    """
    try:
        with path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), 'little')
            if length > size - 8:
                raise ValueError('its header is cut')
            header = json.loads(file.read(length))
        return {
            name: _entry(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != '__metadata__' and entry['dtype'] not in _OTHERS
        }
    except OSError as error:
        raise UserError(f"weights file '{path}' cannot be read ({error.strerror}): copy it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"weights file '{path}' is truncated or no safetensors file ({_first_line(error)}): copy it again"
        ) from None


def _entry(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> FileTensor:
    if entry['dtype'] not in FLOATS:
        raise ValueError(f"tensor '{name}' is {entry['dtype']}, which is not read here")
    dtype, shape, (begin, end) = FLOATS[entry['dtype']], tuple(entry['shape']), entry['data_offsets']
    if end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or begin < 0 or start + end > size:
        raise ValueError(f"tensor '{name}' is cut")
    return FileTensor(path, dtype, shape, start + begin)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_array(stored: Stored, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """The tensor as an array of `dtype`. The host holds one parameter's local shards at most."""
    shape = stored.shape

    def shard(index: Index | None) -> np.ndarray:
        slices = index or (slice(None),) * len(shape)
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape, strict=True))
        out = np.empty([s.stop - s.start for s in index], dtype)
        stored.copy_into(out, index)
        return out

    return jax.make_array_from_callback(shape, sharding, shard)


def stored_hash(tensors: Mapping[str, Stored]) -> str:
    """sha256 over names, types, shapes and values as they lie in the files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f'{name}|{stored.dtype.name}|{stored.shape}|'.encode())
        for block in stored.blocks():
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()
