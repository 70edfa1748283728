"""Random weights under published names, the same here and in tools/make_vq_golden.py, and the picture for them."""

from __future__ import annotations

import zlib

import numpy as np


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Name → float32 tensor; each depends on its name alone. Kernels have unit gain; scales and biases count."""
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.startswith('quantize'):
            tensor = rng.normal(0, 1, shape)
        elif len(shape) > 1:
            tensor = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        elif name.endswith('.bias'):
            tensor = rng.normal(0, 0.1, shape)
        else:
            tensor = rng.uniform(0.5, 1.5, shape)
        found[name] = tensor.astype(np.float32)
    return found


def picture() -> np.ndarray:
    """uint8 [2, 32, 48, 3]: noise, and a smooth picture."""
    y, x = np.mgrid[0:32, 0:48]
    smooth = np.stack([x * 5, y * 7, 255 - x * 3 - y], axis=-1)
    return np.stack([np.random.default_rng(0).integers(0, 256, (32, 48, 3)), smooth]).astype(np.uint8)
