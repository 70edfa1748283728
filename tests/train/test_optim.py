"""Optimisers against formulas written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import OptimConfig, TransformerConfig
from muse.models.transformer import Transformer
from muse.train.optim import is_matrix, learning_rate, make_optimizer, update_ema

pytestmark = pytest.mark.usefixtures('quick_compiles')


def test_learning_rate_warms_up_and_falls():
    config = OptimConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    at = learning_rate(config, 110)
    assert float(at(0)) == pytest.approx(2.0 / 11) and float(at(10)) == pytest.approx(2.0)
    assert float(at(60)) == pytest.approx(2.0 * (0.1 + 0.9 / 2)), 'half of the way down'
    assert float(at(110)) == pytest.approx(0.2) and float(at(500)) == pytest.approx(0.2)


def test_warm_up_longer_than_the_run_still_ends_at_the_peak():
    at = learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=5000), 10)
    assert float(at(9)) == pytest.approx(1.0)


def test_only_matrices_decay():
    config = TransformerConfig(
        codebook_size=8, grid=(2, 2), width=8, mlp_dim=8, heads=2, layers=3, text_width=4, text_length=3
    )
    params = nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    optim = OptimConfig(learning_rate=0.5, b1=0.9, b2=0.9, weight_decay=0.1, warmup_steps=0, gradient_clip=0.0)
    optimizer = make_optimizer(optim, 10)
    grads = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)
    decayed = set()
    for (path, update), (_, param) in zip(nnx.to_flat_state(updates), nnx.to_flat_state(params), strict=True):
        if np.abs(update[...]).max() > 0:
            np.testing.assert_allclose(update[...], -0.5 * 0.1 * param[...], rtol=1e-6)
            decayed.add('.'.join(map(str, path)))
    names = {'.'.join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    norms = {name for name in names if 'norm' in name}
    assert norms and not norms & decayed
    assert names - norms - decayed == {'head.kernel'} - decayed  # a head that starts at zero has nothing to lose
    assert not is_matrix(jnp.ones(3)) and is_matrix(jnp.ones((3, 3)))


def test_adamw_is_the_textbook_one():
    optim = OptimConfig(learning_rate=0.1, b1=0.8, b2=0.9, weight_decay=0.5, warmup_steps=0, gradient_clip=0.0)
    optimizer = make_optimizer(optim, 1000)
    w, g = jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([[0.3, 0.1], [-0.2, 0.7]])
    updates, state = optimizer.update(g, optimizer.init(w), w)
    np.testing.assert_allclose(
        updates, -0.1 * (np.sign(g) + 0.5 * w), rtol=1e-5, atol=1e-6
    )  # both moments debiased to g, g²
    updates, _ = optimizer.update(2 * g, state, w)
    first = (0.8 * 0.2 * g + 0.2 * 2 * g) / (1 - 0.8**2)
    second = (0.9 * 0.1 * g**2 + 0.1 * 4 * g**2) / (1 - 0.9**2)
    rate = float(learning_rate(optim, 1000)(1))
    np.testing.assert_allclose(updates, -rate * (first / np.sqrt(second) + 0.5 * w), rtol=1e-5, atol=1e-6)


def test_adafactor_factors_its_second_moments():
    optim = OptimConfig(name='adafactor', learning_rate=0.1, b1=0.0, b2=0.96, weight_decay=0.0, warmup_steps=0)
    optimizer = make_optimizer(optim, 1000)
    w = jnp.ones((128, 256))
    g = jnp.outer(jnp.linspace(1, 2, 128), jnp.linspace(1, 3, 256)) * 1e-4
    state = optimizer.init(w)
    assert max(x.size for x in jax.tree.leaves(state)) <= 256, 'nothing of the size of the matrix'
    updates, _ = optimizer.update(g, state, w)
    # A rank-one gradient is factored exactly: every update is lr · g / |g|.
    np.testing.assert_allclose(updates, np.full(w.shape, -0.1), rtol=1e-3)


def test_average_warms_up():
    ema, params = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
    np.testing.assert_allclose(update_ema(ema, params, jnp.asarray(1), 0.999)['w'], 1 - 2 / 11, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, params, jnp.asarray(10**6), 0.999)['w'], 1e-3, rtol=1e-3)


def test_clipping_is_by_the_global_norm():
    optim = OptimConfig(learning_rate=0.1, b1=0.5, b2=0.5, weight_decay=0.0, gradient_clip=1.0, warmup_steps=0)
    optimizer = make_optimizer(optim, 1000)
    small, large = (
        {'a': jnp.full((9,), 0.2), 'b': jnp.full((16,), 0.2)},
        {'a': jnp.full((9,), 50.0), 'b': jnp.full((16,), 50.0)},
    )
    _, state = optimizer.update(large, optimizer.init(small), small)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (9,)]
    # The first moment of the clipped gradient: (1 − b1) · g / |g|, |g| over both vectors.
    np.testing.assert_allclose(moments[0], 0.5 * 50.0 / np.sqrt(25 * 50.0**2), rtol=1e-5)
