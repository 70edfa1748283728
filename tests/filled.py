"""Modules with random weights drawn by numpy: initialising through JAX compiles one program for each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

ModuleT = TypeVar('ModuleT', bound=nnx.Module)


def filled(make: Callable[[], ModuleT], seed: int = 0) -> ModuleT:
    """The module that `make` builds, with kernels of unit gain, unit scales and small biases."""
    rng = np.random.default_rng(seed)
    graphdef, template = nnx.split(nnx.eval_shape(make), nnx.Param)
    values = []
    for path, variable in nnx.to_flat_state(template):
        name, shape = path[-1], variable.shape
        value = rng.normal(0, 1 / np.sqrt(max(1, np.prod(shape[:-1]))), shape)
        if name == 'codebook':
            value = rng.normal(size=shape)
        elif name == 'scale':
            value = np.ones(shape)
        elif name == 'bias':
            value = rng.normal(0, 0.05, shape)
        values.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(values))
