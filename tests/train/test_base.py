"""The base's step: the same numbers on any mesh, with any remat and any number of micro-batches; and it learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import CODES, SIDE, graphdef_of, toy_batch, toy_run, train, with_model, with_train

from muse.config import MaskedLossConfig, MeshConfig, OptimConfig
from muse.models.transformer import Transformer
from muse.train import base, masked

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def reference():
    return train(toy_run(), toy_batch, 4)


@pytest.mark.parametrize(
    'mesh', [pytest.param(MeshConfig(), marks=pytest.mark.slow), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str
)
def test_eight_devices_equal_one(reference, mesh):
    losses, state = train(toy_run(mesh=mesh), toy_batch, 4, devices=8)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    kernel = state['params']['blocks']['mlp']['up']['kernel'][...]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (2, 32 // max(mesh.fsdp, 1), 64 // max(mesh.tensor, 1)), 'the parameter itself must be split'
    moments = [x for x in jax.tree.leaves(state['opt']) if x.shape == kernel.shape]
    assert moments and all(m.addressable_shards[0].data.shape == shard for m in moments)


@pytest.mark.slow
def test_remat_equals_none(reference):
    losses, _ = train(with_model(toy_run(), remat='full'), toy_batch, 4)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)


def test_micro_batches_equal_the_full_batch(reference):
    losses, state = train(with_train(toy_run(), accumulate=4), toy_batch, 4, devices=2)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    for mine, full in zip(jax.tree.leaves(state['params']), jax.tree.leaves(reference[1]['params']), strict=True):
        np.testing.assert_allclose(mine, full, atol=2e-4)  # Adam magnifies the rounding of small gradients


def test_masks_do_not_depend_on_the_batch_size():
    run, key = toy_run(), jax.random.key(3)
    big = masked.corrupt(run, jax.tree.map(jnp.asarray, toy_batch(0, 16)), key)
    small = masked.corrupt(run, jax.tree.map(lambda x: jnp.asarray(x[:5]), toy_batch(0, 16)), key)
    np.testing.assert_array_equal(big['mask'][:5], small['mask'])
    np.testing.assert_array_equal(big['len'][:5], small['len'])


def test_text_is_dropped_for_the_configured_share():
    run = toy_run(loss=MaskedLossConfig(text_dropout=0.1))
    lengths = masked.corrupt(run, jax.tree.map(jnp.asarray, toy_batch(0, 4000)), jax.random.key(0))['len']
    assert 0.08 < np.mean(np.asarray(lengths) == 0) < 0.12, 'text must be dropped for 10 %, not kept for 10 %'


def test_only_masked_tokens_are_hidden_and_scored():
    run = toy_run()
    model = Transformer(run.model, rngs=nnx.Rngs(params=0))
    batch = jax.tree.map(jnp.asarray, toy_batch(0, 4))
    mask = jnp.zeros((4, SIDE * SIDE), bool).at[:, 3].set(True)
    logits = base.predict(model, batch['tok'], mask, batch['txt'], batch['len'])
    other = base.predict(model, batch['tok'].at[:, 3].add(1) % CODES, mask, batch['txt'], batch['len'])
    np.testing.assert_array_equal(logits, other)
    seen = base.predict(model, batch['tok'].at[:, 5].add(1) % CODES, mask, batch['txt'], batch['len'])
    assert np.abs(np.asarray(seen - logits)).max() > 0


def test_it_learns_to_read_the_text():
    run = with_train(toy_run(optim=OptimConfig(learning_rate=1e-2, warmup_steps=5)), steps=60, ema_decay=0.9)
    losses, state = train(run, toy_batch, 60)
    assert losses[-5:].mean() < losses[0] - 1.0
    evaluate = jax.jit(lambda s, b, k: base.evaluate(graphdef_of(run), s, b, k))
    metrics = jax.device_get(evaluate(state, toy_batch(999, 64), jax.random.key(5)))
    assert metrics['loss'] < np.log(CODES) - 1.0
    assert metrics['loss'] < metrics['loss_no_text'] - 0.05, 'the text must help'
    assert metrics['loss'] < metrics['loss_shuffled'] - 0.1
    assert metrics['caption_wins'] > 0.7  # one in eight shuffled captions is the right one


def test_adafactor_state_is_finite_and_the_average_moves():
    run = toy_run(optim=OptimConfig(name='adafactor', learning_rate=1e-3, warmup_steps=1))
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=2))
    losses, state = train(run, toy_batch, 3, devices=2)
    assert np.isfinite(losses).all() and int(state['step']) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    table = [state[part]['tokens']['table'][...] for part in ('params', 'ema')]
    assert 0 < np.abs(table[0] - table[1]).max() < 0.1
