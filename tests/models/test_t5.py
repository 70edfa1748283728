"""T5 encoder: relative positions, and what padding may not do. Parity: tests/release/test_t5_checkpoints.py."""

from __future__ import annotations

import dataclasses
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import T5Config
from muse.models.t5 import T5Encoder, native, relative_buckets

TINY = T5Config(vocab_size=50, width=32, mlp_dim=48, head_dim=8, heads=4, layers=2, max_length=16)


@pytest.fixture(scope='module')
def encoder():
    return T5Encoder(TINY, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ('capability', 'dtype', 'attention'),
    [
        ('9.0', 'bfloat16', 'cudnn'),
        ('9.0', 'float32', 'xla'),
        ('7.5', 'bfloat16', 'xla'),
        ('gfx90a', 'bfloat16', 'xla'),
    ],
)
def test_attention_of_this_machine(capability, dtype, attention, monkeypatch):
    """cuDNN's kernel is for NVIDIA's GPUs from Ampere on, and takes no float32."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    config = dataclasses.replace(TINY, dtype=dtype, attention='cudnn')
    assert native(config) == dataclasses.replace(config, attention=attention)


def run(encoder: T5Encoder, ids, lengths) -> np.ndarray:
    graphdef, params = nnx.split(encoder, nnx.Param)
    apply = jax.jit(lambda params, ids, lengths: nnx.merge(graphdef, params)(ids, lengths))
    return np.asarray(apply(params, jnp.asarray(ids), jnp.asarray(lengths, jnp.int32)))


def bucket(distance: int, buckets: int, max_distance: int) -> int:
    """The formula of the T5 paper in exact arithmetic: no logarithm, so no rounding."""
    half, exact = buckets // 2, buckets // 4
    offset = half if distance > 0 else 0
    distance = abs(distance)
    if distance < exact:
        return offset + distance
    wide = half - exact
    steps = 0  # the largest k with distance/exact ≥ (max/exact)^(k/wide), capped
    while steps + 1 < wide and Fraction(distance, exact) ** wide >= Fraction(max_distance, exact) ** (steps + 1):
        steps += 1
    return offset + exact + steps


@pytest.mark.parametrize(('buckets', 'max_distance'), [(32, 128), (32, 64), (16, 128), (8, 20)])
def test_relative_buckets(buckets, max_distance):
    found = relative_buckets(150, buckets, max_distance)
    expected = {d: bucket(d, buckets, max_distance) for d in range(-149, 150)}
    for query, key in np.ndindex(found.shape):
        assert found[query, key] == expected[key - query], (query, key)
    assert set(expected.values()) == set(range(buckets)) - {buckets // 2}  # 0 ahead is the query itself


def test_padding_changes_nothing(encoder):
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 50, (3, 9))
    lengths = [9, 4, 6]
    padded = np.zeros((3, 16), np.int32)
    padded[:, :9] = ids
    together = run(encoder, padded, lengths)
    for row, length in enumerate(lengths):
        alone = run(encoder, ids[row : row + 1, :length].astype(np.int32), [length])[0]
        np.testing.assert_allclose(together[row, :length], alone, atol=1e-6 * np.abs(alone).max() * 10)
        assert (together[row, length:] == 0).all()


def test_pads_and_batch_mates_never_matter(encoder):
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 50, (4, 12)).astype(np.int32)
    lengths = [5, 12, 0, 1]
    states = run(encoder, ids, lengths)
    garbage = np.where(np.arange(12) < np.array(lengths)[:, None], ids, rng.integers(0, 50, ids.shape)).astype(np.int32)
    assert (run(encoder, garbage, lengths) == states).all()
    mates = garbage.copy()
    mates[1:] = rng.integers(0, 50, (3, 12))
    assert (run(encoder, mates, [5, 7, 12, 3])[0] == states[0]).all()


def test_row_without_text_is_finite_zeros(encoder):
    states = run(encoder, np.zeros((2, 6), np.int32), [0, 3])
    assert (states[0] == 0).all() and np.isfinite(states).all() and np.abs(states[1, :3]).min() > 0


def test_word_order_matters(encoder):
    forward = run(encoder, np.array([[5, 6, 7, 1]], np.int32), [4])[0]
    swapped = run(encoder, np.array([[7, 6, 5, 1]], np.int32), [4])[0]
    assert np.abs(forward[[0, 1, 2]] - swapped[[2, 1, 0]]).max() > 0.05


def test_soft_one_hots_equal_ids(encoder):
    ids = np.random.default_rng(2).integers(0, 50, (2, 7)).astype(np.int32)
    hard = run(encoder, ids, [7, 5])
    for rows in (50, int(ids.max()) + 1):
        np.testing.assert_allclose(run(encoder, np.eye(rows, dtype=np.float32)[ids], [7, 5]), hard, atol=1e-6)


def test_gradient_reaches_the_words(encoder):
    weights = jax.nn.one_hot(jnp.array([[3, 9, 1, 0]]), 50)

    def total(weights):
        return encoder(weights, jnp.array([3])).sum()

    gradient = jax.grad(total)(weights)
    assert (np.abs(gradient[0, :3]).max(-1) > 0).all() and (gradient[0, 3] == 0).all()


def test_bfloat16_stays_close(encoder):
    ids = np.random.default_rng(3).integers(2, 50, (2, 16)).astype(np.int32)
    half = T5Encoder(T5Config(**{**vars(TINY), 'dtype': 'bfloat16', 'remat': 'full'}), rngs=nnx.Rngs(params=0))
    exact, rounded = run(encoder, ids, [16, 11]), run(half, ids, [16, 11])
    assert rounded.dtype == jnp.bfloat16
    assert np.abs(rounded.astype(np.float32) - exact).max() < 0.06 * np.abs(exact).max()


def test_unrolled_equals_scanned(encoder):
    ids = np.random.default_rng(4).integers(2, 50, (2, 9)).astype(np.int32)
    unrolled = T5Encoder(T5Config(**{**vars(TINY), 'unroll': TINY.layers}), rngs=nnx.Rngs(params=0))
    np.testing.assert_allclose(run(unrolled, ids, [9, 4]), run(encoder, ids, [9, 4]), atol=1e-6)


def test_paper_size_is_xxl():
    shapes = nnx.state(nnx.eval_shape(lambda: T5Encoder(T5Config(), rngs=nnx.Rngs(params=0))), nnx.Param)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert count == 32128 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096) + 64 * 32 + 4096
    assert 4.6e9 < count < 4.9e9
