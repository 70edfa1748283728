"""Matrix products of one-byte numbers, for drawing (§2.8): half the memory, and twice the peak on chips that have them.

Not in the paper. A layer's weights are rounded once, ahead of all steps, each output channel by a scale of its own as a
release stores them (`muse.release.storage`); so is each token's vector when a product reads it, since only products in
which both sides are of one byte are faster. Nothing else changes: norms, attention, embeddings and the head of logits
stay what they are. Nothing here takes a gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from muse.errors import UserError, nearest
from muse.nn.layers import Linear

Precision = Literal['int8', 'fp8']
_TYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}


def check_precision(precision: str | None) -> None:
    """Raises UserError for a precision that does not exist; None is the model's own."""
    if precision is not None and precision not in get_args(Precision):
        raise UserError(f'precision {precision!r} does not exist{nearest(str(precision), get_args(Precision))}')


@partial(jax.jit, static_argnames=('dtype', 'axis'))
def rounded(x: Array, dtype: Any, axis: int) -> tuple[Array, Array]:
    """`x` in numbers of one byte, nearest to even, and the float32 scales that give it back: x ≈ values · scale.

    Args:
        x: finite numbers.
        dtype: int8, symmetric around 0; or float8_e4m3fn.
        axis: along which one scale holds, so that the largest value there becomes the largest of `dtype`; its length
            in the scales is 1.
    """
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    x = x.astype(jnp.float32)
    least = largest * float(jnp.finfo(jnp.float32).tiny)  # below it the scale would not be a normal number
    peak = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), least)
    scale = peak / largest
    values = x / scale
    return (jnp.round(values) if is_integer else values).astype(dtype), scale


class QuantizedLinear(nnx.Module):
    """A `Linear` without bias whose product is of one-byte numbers; or a stack of them, as its kernel is one."""

    def __init__(self, linear: Linear, precision: Precision):
        assert linear.bias is None
        values, scale = rounded(linear.kernel[...], _TYPES[precision], -2)
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)

    def __call__(self, x: Float[Array, '... in_']) -> Float[Array, '... out']:
        """The product in the type of `x`, of which each row is rounded first."""
        values_KN = self.values[...]
        rows, row_scale = rounded(x, values_KN.dtype, -1)
        # Sums of int8 are exact; those of float8 are float32 sums, rounded as any product's in the type of x is.
        sums = jnp.int32 if values_KN.dtype == jnp.int8 else x.dtype
        y = jax.lax.dot_general(rows, values_KN, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=sums)
        return (y.astype(jnp.float32) * row_scale * self.scale[...][0]).astype(x.dtype)


def quantized(graph: nnx.GraphDef, params: nnx.State, precision: Precision) -> tuple[nnx.GraphDef, nnx.State]:
    """A base or super-res whose layers' products are of one-byte numbers: its structure and its parameters.

    Args:
        graph, params: of the model. A release stored as int8 holds these very numbers: 'int8' loses nothing of them.
        precision: of the products of its stacks of layers.
    """
    check_precision(precision)
    model = nnx.merge(graph, params)
    for name in model.stacks():
        for _, module in list(nnx.iter_modules(getattr(model, name))):
            for attribute, child in list(vars(module).items()):
                if isinstance(child, Linear):
                    setattr(module, attribute, QuantizedLinear(child, precision))
    return nnx.split(model, nnx.Param)


def is_quantized(layers: nnx.Module) -> bool:
    """Whether the products of some layers are of one-byte numbers."""
    return any(isinstance(module, QuantizedLinear) for _, module in nnx.iter_modules(layers))
