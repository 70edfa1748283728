"""Pickled weights of others, read without running any of their code and without PyTorch.

A pickle is a program that may call anything by name. Here the names that plain tensors need are made by functions of
this file, the names of training callbacks become inert strings, and any other name ends the reading with an error.
"""

from __future__ import annotations

import collections
import io
import operator
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from muse.errors import UserError

Names = Mapping[tuple[str, str], Any]

NUMPY_NAMES: Names = {
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    # The name of before numpy 2; what it makes is an empty array for the pickle to fill.
    ('numpy.core.multiarray', '_reconstruct'): np.ndarray.__reduce__(np.zeros(0))[0],
}
_STORAGES = {
    'FloatStorage': np.dtype('<f4'), 'HalfStorage': np.dtype('<f2'), 'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
    'DoubleStorage': np.dtype('<f8'), 'LongStorage': np.dtype('<i8'), 'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'), 'CharStorage': np.dtype('i1'), 'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
}  # fmt: skip
_NUMBERS = (
    ('numpy.core.multiarray', 'scalar'),
    ('numpy._core.multiarray', 'scalar'),  # since numpy 2
    ('numpy', 'dtype'),
    ('_codecs', 'encode'),
)
_MOST_PICKLED = 256 * 2**20  # bytes; names and places of tensors take some hundred each
_INERT = ('pytorch_lightning.', 'lightning.')  # callbacks are keys of a training checkpoint's dicts, never called
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    zipfile.BadZipFile, NotImplementedError, RecursionError, MemoryError,
)  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Makes dicts, lists, numbers, strings and what `names` maps; any other name ends the reading.

    Raises:
        UserError: the pickle names something else (named).
    """

    def __init__(self, file: BinaryIO, names: Names, storage: Callable[[Any], Any] | None = None):
        super().__init__(file)
        self._names, self._storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if module.startswith(_INERT):
            return f'{module}.{name}'
        raise UserError(
            f"the weights file names '{module}.{name}', which plain tensors do not: it was not read; "
            'get the file from its maker again'
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError('tensor storage in a file of arrays')
        return self._storage(pid)


# Tuples, since a pickle can set the attributes of any other object that it has in hand.
class _Storage(NamedTuple):
    dtype: np.dtype
    size: int
    read: Callable[[], np.ndarray]


class StoredTensor(NamedTuple):
    """A tensor that still lies in the file; `read` brings it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    start: int
    storage: _Storage

    def read(self) -> np.ndarray:
        """The tensor in its stored type. Raises UserError when its storage is damaged."""
        values = self.storage.read()
        strides = tuple(s * values.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.start :], self.shape, strides, writeable=False)


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote (its zip format, or the one before), with a `StoredTensor` for each tensor.

    Raises:
        UserError: no such file, not of PyTorch, damaged, or it names anything but tensors (named).
    """
    try:
        with path.open('rb') as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path)
            file.seek(0)
            return _read_old(path, file)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    except OSError as error:
        raise UserError(f"cannot read weights '{path}' ({error.strerror}): give the path of a checkpoint") from None
    except _BROKEN as error:
        raise _damaged(path, (str(error).splitlines() or [''])[0] or type(error).__name__) from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is no PyTorch file, or a damaged one ({reason}): get it again")


def _torch_names() -> Names:
    """What files of tensors name. Made anew for each file: nothing that a pickle does to them can outlive it."""

    def rebuild(storage: Any, start: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        shape, strides = tuple(map(operator.index, shape)), tuple(map(operator.index, strides))
        last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if not isinstance(storage, _Storage) or min((start, *shape, *strides)) < 0:
            raise ValueError('a tensor without a storage')
        if last >= storage.size and 0 not in shape:
            raise ValueError('a tensor lies beyond its storage')
        return StoredTensor(shape, strides, start, storage)

    class Inert:
        """Whatever it is made of and told, it holds nothing."""

        def __init__(self, *_: Any):
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    return {
        ('collections', 'OrderedDict'): collections.OrderedDict,
        # Scores and learning rates of a training checkpoint may be numpy's numbers, and their bytes a text in Latin 1.
        **dict.fromkeys(_NUMBERS, Inert),
        ('torch._utils', '_rebuild_tensor_v2'): rebuild,
        ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
        **{('torch', kind): kind for kind in _STORAGES},
    }


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        root = pickled.removesuffix('data.pkl')
        if f'{root}byteorder' in archive.namelist() and archive.read(f'{root}byteorder') != b'little':
            raise ValueError('big-endian')
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sizes[pickled] > _MOST_PICKLED:
            raise ValueError(f'names and places of its tensors take {sizes[pickled]} bytes')

        def storage(pid: Any) -> _Storage:
            _, kind, key, _, size = pid
            name, dtype = f'{root}data/{key}', _STORAGES[kind]
            if sizes.get(name) != size * dtype.itemsize:
                raise ValueError(f'storage {key} is not of its size')
            return _Storage(dtype, size, lambda: _zip_values(path, name, dtype))

        return PlainUnpickler(io.BytesIO(archive.read(pickled)), _torch_names(), storage).load()


def _zip_values(path: Path, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            return np.frombuffer(archive.read(name), dtype)
    except (OSError, *_BROKEN) as error:
        raise _damaged(path, str(error)) from None


def _read_old(path: Path, file: BinaryIO) -> Any:
    """The format before PyTorch 1.6: pickles one after the other, then each storage's size and bytes."""
    storages: dict[str, _Storage] = {}
    starts: dict[str, int] = {}

    def storage(pid: Any) -> _Storage:
        _, kind, key, _, size = pid[:5]
        dtype = _STORAGES[kind]
        return storages.setdefault(key, _Storage(dtype, size, lambda: _old_values(path, dtype, size, starts[key])))

    def load() -> Any:
        return PlainUnpickler(file, _torch_names(), storage).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise ValueError('not its header')
    if not load().get('little_endian', True):
        raise ValueError('big-endian')
    found = load()
    length = path.stat().st_size
    for key in load():
        (size,) = np.frombuffer(file.read(8), '<i8')
        starts[key] = file.tell()
        end = starts[key] + int(size) * storages[key].dtype.itemsize
        if size != storages[key].size or end > length:
            raise ValueError(f'storage {key} is not of its size')
        file.seek(end)
    if storages.keys() - starts.keys():
        raise ValueError('a storage is missing')
    return found


def _old_values(path: Path, dtype: np.dtype, size: int, start: int) -> np.ndarray:
    values = np.fromfile(path, dtype, size, offset=start)
    if values.size != size:
        raise _damaged(path, 'it was cut while being read')
    return values
