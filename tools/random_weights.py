"""Random weights of unit gain, made on the device layer by layer: what the benches run models of any size on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def random_weights(make: Callable[[], nnx.Module], kernel_dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of the module that `make` builds, and weights for it.

    Args:
        make: builds the module; it is only traced.
        kernel_dtype: of kernels; all others are float32, as the models hold them (`muse.nn.layers.cast_matrices`).
    """
    graphdef, template = nnx.split(nnx.eval_shape(make), nnx.Param)
    flat = nnx.to_flat_state(template)
    return graphdef, nnx.from_flat_state(
        (path, _filled(path, variable, number, kernel_dtype)) for number, (path, variable) in enumerate(flat)
    )


def _filled(path: tuple[Any, ...], variable: nnx.Variable, number: int, kernel_dtype: Any) -> nnx.Variable:
    shape, axes = variable.shape, variable.get_metadata().get('axes', ())
    stacked = bool(axes) and axes[0] == 'layers'
    inner = shape[1:] if stacked else shape
    dtype = kernel_dtype if path[-1] == 'kernel' else jnp.float32
    if len(inner) < 2:
        return variable.replace(jnp.full(shape, 1.0 if path[-1] == 'scale' else 0.0, jnp.float32))
    gain = math.prod(inner[:-1]) ** -0.5 if path[-1] == 'kernel' else 1.0

    @jax.jit
    def draw(key: jax.Array) -> jax.Array:
        if not stacked:
            return (jax.random.normal(key, shape) * gain).astype(dtype)
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda key: (jax.random.normal(key, inner) * gain).astype(dtype), keys)

    return variable.replace(draw(jax.random.key(number, impl='rbg')))
