"""Shared layers: the gradient of tables, weights cast ahead of a loop, and what rematerialisation keeps."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.nn.layers import REMAT_POLICIES, Linear, RMSNorm, cast_matrices, scan_layers, stack, take_rows


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_a_tables_gradient_equals_the_scatters(dtype, tolerance):
    """Half of the ids are the same row, whose gradient is a sum over all of them."""
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(131, 8)), jnp.float32)
    ids = np.where(rng.random((3, 16)) < 0.5, 130, rng.integers(0, 131, (3, 16)))
    weigh = jnp.asarray(rng.normal(size=(3, 16, 8)), dtype)
    found = jax.grad(lambda table: (take_rows(table, ids, dtype) * weigh).astype(jnp.float32).sum())(table_VD)
    expected = np.zeros((131, 8))
    np.add.at(expected, ids, np.asarray(weigh, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert take_rows(table_VD, jnp.asarray(ids), dtype).dtype == dtype


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = RMSNorm(16, rngs=rngs)
        self.linear = Linear(16, 16, ('embed', 'embed'), rngs=rngs, use_bias=True)

    def __call__(self, x):
        return x + self.linear(self.norm(x))


def test_weights_cast_ahead_change_no_result(monkeypatch):
    """In bfloat16, against each layer casting its own; gradients come back as float32, as the weights are."""
    layers = stack(lambda rngs: Layer(rngs), 2, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(layers, nnx.Param)
    cast = cast_matrices(params, jnp.bfloat16)
    types = {path[-1]: variable.dtype for path, variable in nnx.to_flat_state(cast)}
    assert types == {'scale': jnp.float32, 'kernel': jnp.bfloat16, 'bias': jnp.float32}
    x = jax.random.normal(jax.random.key(1), (4, 16), jnp.bfloat16)

    def results():
        def loss(params):
            y = scan_layers(nnx.merge(graphdef, params), lambda layer, x, _: layer(x), x)
            return y.astype(jnp.float32).sum(), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, ahead), grads = results()
    monkeypatch.setattr('muse.nn.layers.cast_matrices', lambda params, dtype: params)
    (_, each), expected = results()
    np.testing.assert_array_equal(ahead, each)
    for found, plain in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, plain, rtol=0.02, atol=0.02)


def test_remat_keeps_what_attention_leaves():
    """cuDNN's kernel is no matrix product to JAX; run again in the backward pass it would cost as much as before."""
    dots = REMAT_POLICIES['dots']
    assert dots(SimpleNamespace(name='dot_product_attention_fwd_wrapper'))
    assert not dots(SimpleNamespace(name='tanh'))
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    assert cudnn._dot_product_attention_fwd_p_wrapper.name == 'dot_product_attention_fwd_wrapper'
