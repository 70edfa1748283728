"""The candidate for attention over few keys against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.nn.attention import MultiAxisAttention, attention
from tools.few_keys import attend, attend_axes


def draws(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(('queries', 'keys', 'lengths'), [(128, 384, [1, 300]), (64, 128, None)])
def test_attention(queries, keys, lengths):
    q, k, v = draws((2, queries, 2, 16), (2, keys, 2, 16), (2, keys, 2, 16))
    lengths_B = None if lengths is None else jnp.asarray(lengths)
    found = attend(q, 3 * k, v, lengths_B, 0.25)
    assert found is not None
    np.testing.assert_allclose(found, attention(q, 3 * k, v, lengths_B=lengths_B, scale=0.25, backend='xla'), atol=2e-6)
    assert attend(q[:, :60], k[:, :100], v[:, :100], lengths_B, 0.25) is None


def test_multi_axis_attention():
    q, k, v = draws(*[(2, 256, 4, 16)] * 3)
    module = MultiAxisAttention(64, 4, block=4, rngs=nnx.Rngs(params=0), backend='xla')
    found = attend_axes(q, 3 * k, v, 0.25)
    assert found is not None
    np.testing.assert_allclose(found, module.attend(q, 3 * k, v), atol=2e-6)
    assert attend_axes(q[:, :192], k[:, :192], v[:, :192], 0.25) is None
