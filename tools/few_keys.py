"""Attention over few keys as one Triton kernel: a candidate beside cuDNN's, which takes 8 µs where 1 would do.

Queries, keys and values stay where the projections left them; the multi-axis kind reads the tokens of a block, or those
at one place in every block, out of the whole picture, so that nothing is gathered before and scattered afterwards.
`tools/variants.py` puts it in the place of the layers' attention. Forward only, bfloat16 on an NVIDIA GPU.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from muse.nn.devices import platform

_QUERIES, _KEYS = 64, 128  # of a step, at most


def attend(
    q_BTNH: Float[Array, 'B T N H'],
    k_BSNH: Float[Array, 'B S N H'],
    v_BSNH: Float[Array, 'B S N H'],
    lengths_B: Int[Array, ' B'] | None,
    scale: float,
) -> Float[Array, 'B T N H'] | None:
    """Softmax attention over the first `lengths_B` keys (≥ 1; None: all). None where the shapes do not fit."""
    b, t, n, h = q_BTNH.shape
    s = k_BSNH.shape[1]
    rows, depth = min(_QUERIES, t), min(_KEYS, s)
    if t % rows or s % depth or any(size & (size - 1) for size in (rows, depth, h)):
        return None
    lengths_B = jnp.asarray(np.full(b, s, np.int32)) if lengths_B is None else lengths_B
    keys = pl.BlockSpec((None, s, None, h), lambda b, i, n: (b, 0, n, 0))
    some = pl.BlockSpec((None, rows, None, h), lambda b, i, n: (b, i, n, 0))
    return pl.pallas_call(
        partial(_kernel, depth=depth, scale=scale),
        grid=(b, t // rows, n),
        in_specs=[some, keys, keys, pl.BlockSpec((1,), lambda b, i, n: (b,))],
        out_specs=some,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=platform() == 'cpu',
    )(q_BTNH, k_BSNH, v_BSNH, lengths_B)


def _kernel(q_ref, k_ref, v_ref, length_ref, out_ref, *, depth, scale):
    q_QH, length_1 = q_ref[...], length_ref[...]

    def step(i, carry):
        out_QH, most_Q, sum_Q = carry
        at = pl.ds(i * depth, depth)
        logits_QK = jnp.dot(q_QH, k_ref[at, :].T, preferred_element_type=jnp.float32) * (scale * math.log2(math.e))
        real_K = i * depth + jnp.arange(depth) < length_1
        logits_QK = jnp.where(real_K[None, :], logits_QK, -1e30)
        new_Q = jnp.maximum(most_Q, jnp.max(logits_QK, axis=1))
        shrink_Q, weights_QK = jnp.exp2(most_Q - new_Q), jnp.exp2(logits_QK - new_Q[:, None])
        more_QH = jnp.dot(weights_QK.astype(v_ref.dtype), v_ref[at, :], preferred_element_type=jnp.float32)
        return out_QH * shrink_Q[:, None] + more_QH, new_Q, sum_Q * shrink_Q + jnp.sum(weights_QK, axis=1)

    rows = q_QH.shape[0]
    begin = jnp.zeros(q_QH.shape, jnp.float32), jnp.full(rows, -1e30, jnp.float32), jnp.zeros(rows, jnp.float32)
    out_QH, _, sum_Q = jax.lax.fori_loop(0, k_ref.shape[0] // depth, step, begin)
    out_ref[...] = (out_QH / sum_Q[:, None]).astype(out_ref.dtype)


def attend_axes(
    q_BTNH: Float[Array, 'B T N H'], k_BTNH: Float[Array, 'B T N H'], v_BTNH: Float[Array, 'B T N H'], scale: float
) -> Float[Array, 'B T N H'] | None:
    """Multi-axis attention of √T blocks of √T tokens each: even heads within blocks, odd heads across them.

    None where the shapes do not fit.
    """
    b, t, n, h = q_BTNH.shape
    side = math.isqrt(t)
    if side**2 != t or side & (side - 1) or h & (h - 1) or side < 16:
        return None
    whole = pl.BlockSpec((None, t, None, h), lambda b, i, n: (b, 0, n, 0))
    return pl.pallas_call(
        partial(_axes_kernel, side=side, scale=scale),
        grid=(b, side, n),
        in_specs=[whole] * 3,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=platform() == 'cpu',
    )(q_BTNH, k_BTNH, v_BTNH)


def _axes_kernel(q_ref, k_ref, v_ref, out_ref, *, side, scale):
    place, odd = pl.program_id(1), jax.lax.rem(pl.program_id(2), 2)
    along = jnp.arange(side)
    at = jnp.where(odd == 1, along * side + place, place * side + along)
    q_QH, k_KH, v_KH = q_ref[at, :], k_ref[at, :], v_ref[at, :]
    logits_QK = jnp.dot(q_QH, k_KH.T, preferred_element_type=jnp.float32) * (scale * math.log2(math.e))
    weights_QK = jnp.exp2(logits_QK - jnp.max(logits_QK, axis=1)[:, None])
    out_QH = jnp.dot(weights_QK.astype(v_KH.dtype), v_KH, preferred_element_type=jnp.float32)
    out_ref[at, :] = (out_QH / jnp.sum(weights_QK, axis=1)[:, None]).astype(out_ref.dtype)
