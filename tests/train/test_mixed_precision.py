"""bfloat16 arithmetic with a float32 state, by shapes alone: nothing is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from toys import toy_batch, toy_run, with_model

from muse.config import OptimConfig
from muse.models.transformer import Transformer
from muse.train import base, masked


@pytest.mark.parametrize('optimizer', ['adamw', 'adafactor'])
def test_the_state_stays_float32(optimizer):
    run = with_model(toy_run(optim=OptimConfig(name=optimizer)), dtype='bfloat16')
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[0]
    key, batch = jax.random.key(0), jax.tree.map(jnp.asarray, toy_batch(0, 4))
    state = jax.eval_shape(lambda key: base.init_state(run, key), key)
    new, metrics = jax.eval_shape(lambda s, b, k: base.train_step(run, graphdef, s, b, k), state, batch, key)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype.name for x in jax.tree.leaves(new)} == {'float32', 'int32'}
    assert {x.dtype.name for x in jax.tree.leaves(metrics)} == {'float32'}, 'loss, accuracy and norms too'

    def gradients(params, batch, key):
        corrupt = masked.corrupt(run, batch, key)
        return masked.gradients(base._predict, graphdef, params, corrupt, 0.1, 1)[0]

    grads = jax.eval_shape(gradients, state['params'], batch, key)
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {'float32'}
    mask = jnp.zeros((4, 16), bool)
    logits = jax.eval_shape(
        lambda p, b: base.predict(nnx.merge(graphdef, p), b['tok'], mask, b['txt'], b['len']), state['params'], batch
    )
    assert logits.dtype == jnp.bfloat16, 'the arithmetic is what the config says'
