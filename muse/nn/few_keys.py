"""Attention over few keys as one Triton kernel, for drawing on an NVIDIA GPU (§2.8); takes no gradient.

cuDNN's kernels are made for long rows of keys: over the 128 to 256 of the paper's base most of their time is not the
work. Queries, keys and values stay where the projections left them; the multi-axis kind (§2.4) reads the tokens of a
block, or those at one place in every block, out of the whole picture, so that nothing is gathered before and scattered
afterwards. Norms of queries and keys are those of the projections (`muse.nn.fused_linear`), unlike in
`muse.nn.attention_kernels`, which training uses.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from muse.nn.devices import is_hopper, platform

_QUERIES, _KEYS = 64, 128  # of a step, at most
_LEAST = 16  # rows and columns of a product in Triton
_MOST_KEYS = 512  # the base's largest canvas; beyond, cuDNN's kernels are at their best
_WIDEST, _WIDEST_ELSEWHERE = 128, 64  # heads: what a Hopper's shared memory holds, and other chips'
_NEVER = -1e30  # a logit of what must not be seen


def fits(q_BTNH: Float[Array, 'B T N H'], k_BSNH: Float[Array, 'B S N H']) -> bool:
    """Whether `attend` takes these shapes: queries and keys in whole steps, heads of a power of two."""
    queries, keys = q_BTNH.shape[1], k_BSNH.shape[1]
    enough = math.gcd(queries, _QUERIES) >= _LEAST and math.gcd(keys, _KEYS) >= _LEAST
    return enough and keys <= _MOST_KEYS and _takes_head(q_BTNH.shape[-1])


def fits_axes(q_BTNH: Float[Array, 'B T N H'], block_tokens: int) -> bool:
    """Whether `attend_axes` takes these shapes: as many blocks as a block has tokens, and a power of two of them."""
    side = block_tokens
    powers = side & (side - 1) == 0 and _LEAST <= side <= _KEYS
    return powers and q_BTNH.shape[1] == side**2 and _takes_head(q_BTNH.shape[-1])


def _takes_head(width: int) -> bool:
    widest = _WIDEST if is_hopper() or platform() == 'cpu' else _WIDEST_ELSEWHERE
    return width & (width - 1) == 0 and _LEAST <= width <= widest


def attend(
    q_BTNH: Float[Array, 'B T N H'],
    k_BSNH: Float[Array, 'B S N H'],
    v_BSNH: Float[Array, 'B S N H'],
    lengths_B: Int[Array, ' B'],
    *,
    scale: float,
) -> Float[Array, 'B T N H']:
    """Softmax attention over the first `lengths_B` keys, at least 1; of shapes that `fits`."""
    b, t, n, h = q_BTNH.shape
    s = k_BSNH.shape[1]
    rows = math.gcd(t, _QUERIES)
    keys = pl.BlockSpec((None, s, None, h), lambda b, i, n: (b, 0, n, 0))
    some = pl.BlockSpec((None, rows, None, h), lambda b, i, n: (b, i, n, 0))
    return _call(
        partial(_kernel, depth=math.gcd(s, _KEYS), scale=scale),
        (b, t // rows, n),
        (q_BTNH, k_BSNH, v_BSNH, lengths_B),
        [some, keys, keys, pl.BlockSpec((1,), lambda b, i, n: (b,))],
        some,
    )


def attend_axes(
    q_BTNH: Float[Array, 'B T N H'], k_BTNH: Float[Array, 'B T N H'], v_BTNH: Float[Array, 'B T N H'], *, scale: float
) -> Float[Array, 'B T N H']:
    """Multi-axis attention of √T blocks of √T tokens each: even heads within blocks, odd heads across them.

    Of shapes that `fits_axes`; what `muse.nn.attention.MultiAxisAttention.attend` does.
    """
    b, t, n, h = q_BTNH.shape
    side = math.isqrt(t)
    whole = pl.BlockSpec((None, t, None, h), lambda b, i, n: (b, 0, n, 0))
    kernel = partial(_axes_kernel, side=side, scale=scale)
    return _call(kernel, (b, side, n), (q_BTNH, k_BTNH, v_BTNH), [whole] * 3, whole)


def _call(kernel, grid, inputs, in_specs, out_spec):
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=platform() == 'cpu',
    )(*inputs)


def _kernel(q_ref, k_ref, v_ref, length_ref, out_ref, *, depth, scale):
    q_QH, length_1 = q_ref[...], length_ref[...]

    def step(i, carry):
        out_QH, most_Q, sum_Q = carry
        at = pl.ds(i * depth, depth)
        logits_QK = jnp.dot(q_QH, k_ref[at, :].T, preferred_element_type=jnp.float32) * (scale * math.log2(math.e))
        real_K = i * depth + jnp.arange(depth) < length_1
        logits_QK = jnp.where(real_K[None, :], logits_QK, _NEVER)
        new_Q = jnp.maximum(most_Q, jnp.max(logits_QK, axis=1))
        shrink_Q, weights_QK = jnp.exp2(most_Q - new_Q), jnp.exp2(logits_QK - new_Q[:, None])
        more_QH = jnp.dot(weights_QK.astype(v_ref.dtype), v_ref[at, :], preferred_element_type=jnp.float32)
        return out_QH * shrink_Q[:, None] + more_QH, new_Q, sum_Q * shrink_Q + jnp.sum(weights_QK, axis=1)

    rows = q_QH.shape[0]
    begin = jnp.zeros(q_QH.shape, jnp.float32), jnp.full(rows, _NEVER, jnp.float32), jnp.zeros(rows, jnp.float32)
    out_QH, _, sum_Q = jax.lax.fori_loop(0, k_ref.shape[0] // depth, step, begin)
    out_ref[...] = (out_QH / sum_Q[:, None]).astype(out_ref.dtype)


def _axes_kernel(q_ref, k_ref, v_ref, out_ref, *, side, scale):
    place, odd = pl.program_id(1), jax.lax.rem(pl.program_id(2), 2)
    along = jnp.arange(side)
    at = jnp.where(odd == 1, along * side + place, place * side + along)
    q_QH, k_KH, v_KH = q_ref[at, :], k_ref[at, :], v_ref[at, :]
    logits_QK = jnp.dot(q_QH, k_KH.T, preferred_element_type=jnp.float32) * (scale * math.log2(math.e))
    weights_QK = jnp.exp2(logits_QK - jnp.max(logits_QK, axis=1)[:, None])
    out_QH = jnp.dot(weights_QK.astype(v_KH.dtype), v_KH, preferred_element_type=jnp.float32)
    out_ref[at, :] = (out_QH / jnp.sum(weights_QK, axis=1)[:, None]).astype(out_ref.dtype)
