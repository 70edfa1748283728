"""Tensors that still lie in safetensors files and checkpoints, and their way into sharded arrays a piece at a time.

A checkpoint larger than the host's memory is loaded by copying, for each device, the part it holds out of the file into
a buffer of that part's size. The safetensors package maps whole files into memory instead, which counts twice while
the arrays are made, and writes only what is in memory as a whole; so headers are read and written here, and data with
plain reads and writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from muse.config import Dtype
from muse.errors import UserError
from muse.mesh import shardings

FLOATS = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_INTEGERS = {f'{kind}{8 * size}': np.dtype(f'<{kind.lower()}{size}') for kind in 'IU' for size in (1, 2, 4, 8)}
_KINDS = FLOATS | _INTEGERS | {'F64': np.dtype('<f8'), 'BOOL': np.dtype(bool)}
BLOCK_BYTES = 2**20  # read at a time by each thread
_TILE = 128  # rows and columns transposed at a time, which a cache holds
_ALIGNMENT = 64  # bytes; a host buffer that starts at a multiple of it becomes a CPU array without a copy

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
    """Numbers in C order at an offset of a file."""

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
        if not self.shape:
            out, index = out.reshape(1), (slice(0, 1),)
        for here, block in self.read(out, index):
            _copy(here, block.astype(out.dtype, copy=False))

    def read(self, out: np.ndarray, index: Index) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows of `out`, what of `tensor[index]` belongs there, in the file's type), until all rows were named."""
        rows = index[0]
        for row, block in self._rows(rows.start, rows.stop):
            here = out[row - rows.start : row - rows.start + len(block)]
            yield here, block[(slice(None), *index[1:])]

    def blocks(self) -> Iterator[np.ndarray]:
        return (block for _, block in self._rows(0, self.shape[0] if self.shape else 1))


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
class Named:
    """A tensor by its name in the file, so that NaN and infinity are told when its blocks are read."""

    stored: Stored
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        self.stored.copy_into(out, index)

    def blocks(self) -> Iterator[np.ndarray]:
        for block in self.stored.blocks():
            if not all_finite(block):
                raise UserError(f"tensor '{self.name}' holds NaN or infinity: the weights are damaged; copy them again")
            yield block


def all_finite(values: np.ndarray) -> bool:
    """Whether no number is NaN or infinite. Two-byte floats are looked at as bits: numpy's own way is slow there."""
    if values.dtype.itemsize != 2 or values.dtype.kind in 'iu':
        return bool(np.isfinite(values).all())
    infinity = int(np.array(np.inf, values.dtype).view(np.uint16))
    return not values.size or int((values.view(np.uint16) & 0x7FFF).max()) < infinity


@dataclass(frozen=True)
class Scaled:
    """Integers times float32 scales, of which there is one along an axis or as many as integers."""

    stored: FileTensor
    factors: FileTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.factors.dtype

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        scale = whole(self.factors)
        picked = tuple(i if side > 1 else slice(0, 1) for i, side in zip(index, scale.shape, strict=True))
        # The scale of each row of `out`, without a copy of it.
        scale = np.broadcast_to(scale[picked], out.shape)
        row = 0
        for here, block in self.stored.read(out, index):
            here[...] = block.astype(np.float32) * scale[row : row + len(block)]
            row += len(block)

    def blocks(self) -> Iterator[np.ndarray]:
        yield from self.stored.blocks()
        yield from self.factors.blocks()


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
    """The tensors of a safetensors file by name. Only the header is read.

    Raises:
        UserError: the file is missing, truncated, of another kind, or has numbers of a type that is not read.
    """
    try:
        with path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), 'little')
            if length > size - 8:
                raise ValueError('its header is cut')
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != '__metadata__'}
        if strange := sorted(name for name, entry in entries.items() if entry['dtype'] not in _KINDS):
            kind = entries[strange[0]]['dtype']
            raise UserError(f"weights file '{path}': '{strange[0]}' is {kind}, which is not read: give another file")
        return {name: _entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    except OSError as error:
        reason = 'does not exist' if isinstance(error, FileNotFoundError) else f'cannot be read ({error.strerror})'
        raise UserError(f"weights file '{path}' {reason}: copy it again") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"weights file '{path}' is truncated or corrupted, or no safetensors file ({_first_line(error)}): copy it "
            'again'
        ) from None


def _entry(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> FileTensor:
    dtype, shape, (begin, end) = _KINDS[entry['dtype']], tuple(entry['shape']), entry['data_offsets']
    if any(side < 0 for side in shape) or begin < 0 or end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor '{name}' is of another size than its shape")
    if start + end > size:
        raise ValueError(f"tensor '{name}' is cut")
    return FileTensor(path, dtype, shape, start + begin)


def floats(tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Those that a model of others may have as weights: counters and quantised numbers are left out."""
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS.values()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def whole(stored: Stored) -> np.ndarray:
    """All of a tensor, in its own type."""
    out = np.empty(stored.shape, stored.dtype)
    stored.copy_into(out, tuple(slice(0, side) for side in stored.shape))
    return out


def load_array(stored: Stored, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """The tensor as an array of `dtype`; None: on the default device. The host holds its local shards at most."""
    shape = stored.shape

    def shard(index: Index | None) -> np.ndarray:
        slices = index or (slice(None),) * len(shape)
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape, strict=True))
        out = _aligned([s.stop - s.start for s in index], dtype)
        stored.copy_into(out, index)
        return out

    # Not jnp.asarray, which copies: on a CPU the parameter would be held twice.
    return jax.device_put(shard(None)) if sharding is None else jax.make_array_from_callback(shape, sharding, shard)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of whatever was in memory, which starts at a multiple of `_ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def load_params(tensors: Mapping[str, Stored], template: nnx.State, dtype: Dtype, mesh: Mesh | None) -> nnx.State:
    """The parameters of a template from tensors of their dotted names and shapes.

    Args:
        tensors: at least those that the template names.
        template: a state of shapes.
        dtype: of the parameters.
        mesh: what they are split over, as `muse.mesh` says; None: all on the default device.
    """
    params = []
    # The largest first: what the last one needs beside itself while it is made is then little.
    for route, variable in sorted(nnx.to_flat_state(template), key=lambda item: -math.prod(item[1].shape)):
        sharding = jax.tree.leaves(shardings(variable, mesh))[0] if mesh else None
        array = load_array(tensors['.'.join(map(str, route))], jnp.dtype(dtype), sharding)
        params.append((route, variable.replace(array)))
    return nnx.from_flat_state(params)


def write_safetensors(
    path: Path, kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a safetensors file from tensors that come one by one.

    Args:
        path: the file.
        kinds: type and shape of every tensor, by name.
        tensors: (name, values) of each of them, in any order.

    Raises:
        OSError: it cannot be written.
    """
    names = {dtype: name for name, dtype in _KINDS.items()}
    header, offset = {}, 0
    for name, (dtype, shape) in sorted(kinds.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {'dtype': names[dtype], 'shape': shape, 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # so that every tensor lies at a multiple of its type's size
    with path.open('wb') as out:
        out.write(len(text).to_bytes(8, 'little') + text)
        for name, values in tensors:
            out.seek(8 + len(text) + header[name]['data_offsets'][0])
            out.write(np.ascontiguousarray(values).view(np.uint8).data)


def stored_hash(tensors: Mapping[str, Stored]) -> str:
    """sha256 over names, types, shapes and values as they lie in the files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f'{name}|{stored.dtype.name}|{stored.shape}|'.encode())
        for block in stored.blocks():
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()
