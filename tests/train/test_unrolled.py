"""Layers one by one instead of scanned: the same gradients, and a program without a loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from muse.config import SuperresConfig
from muse.nn.layers import restack
from muse.release.format import graphdef_and_template
from muse.train import base, masked, superres

pytestmark = pytest.mark.usefixtures('quick_compiles')
ROWS = 2


def batch(config):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = config.grid[0] * config.grid[1]
    found = {
        'tok': jax.random.randint(keys[0], (ROWS, tokens), 0, config.codebook_size),
        'mask': jax.random.bernoulli(keys[1], 0.6, (ROWS, tokens)),
        'txt': jax.random.normal(keys[2], (ROWS, config.text_length, config.text_width)),
        'len': jnp.array([0, config.text_length]),
    }
    if isinstance(config, SuperresConfig):
        low = (ROWS, config.low_grid[0] * config.low_grid[1])
        found['low'] = jax.random.randint(keys[3], low, 0, config.low_codebook_size)
    return found


def gradients(config, accumulate=1):
    """Gradients and loss of random weights, and the compiled program."""
    part = 'superres' if isinstance(config, SuperresConfig) else 'base'
    predict = superres.predict if part == 'superres' else base._predict
    graphdef, params = graphdef_and_template(part, config)[0], tiny.random_params(part, config, seed=1)

    @jax.jit
    def run(params, batch):
        return masked.gradients(predict, graphdef, params, batch, 0.1, accumulate)

    compiled = run.lower(params, batch(config)).compile()
    grads, metrics = compiled(params, batch(config))
    return grads, metrics['loss'], str(compiled.as_text())


def compare(config, tolerance, remats=('none', 'dots', 'full'), accumulate=1):
    """By the root of the mean of the squares of what differs, in each parameter."""
    plain, plain_loss, _ = gradients(dataclasses.replace(config, remat='none', unroll=1), accumulate)
    low = getattr(config, 'low_layers', 0)
    for remat in remats:
        changed = dataclasses.replace(config, remat=remat, unroll=max(config.layers, low))
        grads, loss, text = gradients(changed, accumulate)
        assert abs(loss - plain_loss) < tolerance
        assert jax.tree.structure(grads) == jax.tree.structure(plain)
        for (path, ours), (_, theirs) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(plain), strict=True):
            assert ours.dtype == jnp.float32 and ours.get_metadata() == theirs.get_metadata()
            error = jnp.linalg.norm((ours[...] - theirs[...]).ravel())
            assert error <= tolerance * jnp.linalg.norm(theirs[...].ravel()), (remat, path)
        assert (' while(' in text) == (accumulate > 1), 'layers are still a loop'


def test_gradients_of_the_base_are_those_of_scanned_layers():
    compare(tiny.BASE, 1e-5, ('dots',))


@pytest.mark.slow
def test_gradients_of_the_super_res_are_those_of_scanned_layers():
    compare(tiny.SUPERRES, 1e-5)


@pytest.mark.slow
def test_in_bfloat16_in_other_remats_and_in_micro_batches():
    compare(dataclasses.replace(tiny.BASE, dtype='bfloat16'), 0.15)
    compare(tiny.BASE, 1e-5, ('none', 'full'))
    compare(tiny.BASE, 1e-5, ('full',), accumulate=2)


def test_a_model_comes_back_from_its_layers():
    """Values go to their own layer and come back to it."""
    config = dataclasses.replace(tiny.BASE, unroll=tiny.BASE.layers)
    graphdef, params = graphdef_and_template('base', config)[0], tiny.random_params('base', config, seed=1)
    apart_graphdef, apart = masked.take_apart(graphdef, params)
    model = nnx.merge(apart_graphdef, apart)
    kernel = params['blocks']['mlp']['up']['kernel'][...]
    np.testing.assert_array_equal(model.blocks[1].mlp.up.kernel[...], kernel[1])
    for back, whole in zip(jax.tree.leaves(restack(apart, params)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(back, whole)
    scanned = dataclasses.replace(tiny.BASE, unroll=1)
    graphdef = graphdef_and_template('base', scanned)[0]
    assert masked.take_apart(graphdef, params) == (graphdef, params)
