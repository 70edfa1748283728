"""Group norm, plain and with its swish, against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.nn.group_norm import GroupNorm


def test_group_norm_against_its_definition():
    norm = GroupNorm(8, rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 4, 8)).astype(np.float32)
    grouped = x.reshape(2, 20, 2, 4)
    expected = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
    assert norm.groups == 2
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected.reshape(x.shape), atol=1e-5)


def test_swish_of_the_norm_and_its_gradients():
    """Against autodiff of its definition in float64, groups of 4 channels with scales and shifts."""
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(1, 2, (2, 6, 4, 8)) for _ in range(2))
    scale, shift = rng.normal(1, 0.3, 8), rng.normal(0, 1, 8)

    def reference(x, scale, shift):
        grouped = x.reshape(2, 24, 2, 4)
        deviation = jnp.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
        y = ((grouped - grouped.mean((1, 3), keepdims=True)) / deviation).reshape(x.shape) * scale + shift
        return jnp.sum(weights * y / (1 + jnp.exp(-y)))

    def ours(x, scale, shift):
        norm = GroupNorm(8, rngs=nnx.Rngs(params=0))
        norm.scale[...], norm.bias[...] = scale, shift
        return jnp.sum(jnp.asarray(weights, jnp.float32) * norm.swish(x))

    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2)))(*map(jnp.asarray, (x, scale, shift)))
        expected = jax.device_get(expected)
    single = [jnp.asarray(a, jnp.float32) for a in (x, scale, shift)]
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*single)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-5)
    for found, wanted in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
