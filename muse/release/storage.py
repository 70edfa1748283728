"""How tensors of a release are stored: float32, bfloat16, or int8 with a scale for each output channel.

Only large matrices and kernels are made small; norms, biases and other small tensors always stay float32. Rounding is
to nearest, symmetric around 0: |stored − true| ≤ max|channel| / 254 for int8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import ml_dtypes
import numpy as np

from muse.errors import UserError, nearest

Storage = Literal['float32', 'bfloat16', 'int8']
Kind = tuple[np.dtype, tuple[int, ...]]

SCALE = '.scale'  # '<name>.scale' holds the int8 scales of '<name>'
SMALL = 1024  # tensors with fewer elements stay float32


def kinds(name: str, shape: tuple[int, ...], layer_axes: int, storage: Storage) -> dict[str, Kind]:
    """Type and shape of what `pack_tensor` makes of a tensor, by name; the first is the tensor itself.

    Raises:
        UserError: an unknown storage.
    """
    if storage not in get_args(Storage):
        raise UserError(f'storage {storage!r} does not exist{nearest(str(storage), get_args(Storage))}')
    if storage == 'float32' or math.prod(shape) < SMALL or len(shape) - layer_axes < 2 or 'norm' in name:
        return {name: (np.dtype(np.float32), shape)}
    if storage == 'bfloat16':
        return {name: (np.dtype(ml_dtypes.bfloat16), shape)}
    scales = *shape[:layer_axes], *(1,) * (len(shape) - layer_axes - 1), shape[-1]
    return {name: (np.dtype(np.int8), shape), name + SCALE: (np.dtype(np.float32), scales)}


def pack_tensor(name: str, tensor: np.ndarray, layer_axes: int, storage: Storage) -> dict[str, np.ndarray]:
    """What is written to the file for one tensor.

    Args:
        name: dotted.
        tensor: of floats, rounded from float32.
        layer_axes: 1 where the leading axis counts layers, each of which has scales of its own; else 0.
        storage: type of the large tensors.

    Raises:
        UserError: an unknown storage, or a value that is not finite.
    """
    tensor = np.asarray(tensor, np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(f"tensor '{name}' holds NaN or infinity: nothing was written; export an earlier checkpoint")
    dtype, _ = kinds(name, tensor.shape, layer_axes, storage)[name]
    if dtype != np.int8:
        return {name: tensor.astype(dtype, copy=False)}
    values, scale = _quantize(tensor, layer_axes)
    return {name: values, name + SCALE: scale}


def _quantize(tensor: np.ndarray, layer_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float32 scales, kept broadcastable to the tensor."""
    peak = np.abs(tensor).max(axis=tuple(range(layer_axes, tensor.ndim - 1)), keepdims=True)
    scale = np.where(peak > 0, peak, 1.0).astype(np.float32) / np.float32(127)
    return np.clip(np.rint(tensor / scale), -127, 127).astype(np.int8), scale


def unpack(packed: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The float32 tensor `name` of what `pack` made. Raises KeyError where the tensor or its scale is missing."""
    tensor = packed[name]
    if tensor.dtype == np.int8:
        return tensor.astype(np.float32) * packed[name + SCALE]
    return tensor.astype(np.float32)
