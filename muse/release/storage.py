"""How tensors of a release are stored: float32, bfloat16, or int8 with a scale for each output channel.

Only large matrices and kernels are made small; norms, biases and other small tensors always stay float32. Rounding is
to nearest, symmetric around 0: |stored − true| ≤ max|channel| / 254 for int8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

import ml_dtypes
import numpy as np

from muse.errors import UserError, nearest

Storage = Literal['float32', 'bfloat16', 'int8']

SCALE = '.scale'  # '<name>.scale' holds the int8 scales of '<name>'
SMALL = 1024  # tensors with fewer elements stay float32


def pack(tensors: Mapping[str, np.ndarray], stacked: frozenset[str], storage: Storage) -> dict[str, np.ndarray]:
    """What is written to the file for float32 `tensors`.

    Args:
        tensors: dotted name → float32 array.
        stacked: names whose leading axis counts layers; each layer has scales of its own.
        storage: type of the large tensors.

    Raises:
        UserError: an unknown storage, or a value that is not finite.
    """
    if storage not in get_args(Storage):
        raise UserError(f'storage {storage!r} does not exist{nearest(str(storage), get_args(Storage))}')
    packed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        tensor = np.asarray(tensor, np.float32)
        if not np.isfinite(tensor).all():
            raise UserError(f"tensor '{name}' holds NaN or infinity: nothing was written; export an earlier checkpoint")
        layer_axes = int(name in stacked)
        if storage == 'float32' or tensor.size < SMALL or tensor.ndim - layer_axes < 2 or 'norm' in name:
            packed[name] = tensor
        elif storage == 'bfloat16':
            packed[name] = tensor.astype(ml_dtypes.bfloat16)
        else:
            packed[name], packed[name + SCALE] = _quantize(tensor, layer_axes)
    return packed


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


def content_hash(packed: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, types, shapes and bytes of all tensors, whatever their order in the file."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        tensor = packed[name]
        digest.update(f'{name}|{tensor.dtype.name}|{tensor.shape}|'.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
