"""Nearest codes, straight-through gradients, losses, code statistics, revival."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse.models import quantize


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def brute(latents, codes):
    latents, codes = np.asarray(latents, np.float64), np.asarray(codes, np.float64)
    return np.square(latents[:, None] - codes[None]).sum(-1).argmin(-1)


@pytest.mark.parametrize(
    ('tokens', 'codes', 'width', 'max_bytes'),
    [(30, 37, 3, 4), (30, 37, 3, 500), (30, 37, 3, 1000), (1, 7, 2, 8), (40, 64, 1, 10**6), (3, 1, 5, 10**6)],
)
def test_nearest_is_exact_for_any_chunking(tokens, codes, width, max_bytes):
    latents, codebook = normal(tokens, tokens, width), normal(codes + 100, codes, width)
    np.testing.assert_array_equal(quantize.nearest(latents, codebook, max_bytes=max_bytes), brute(latents, codebook))


def test_nearest_tie_takes_lowest_id_across_chunks():
    codebook = jnp.ones((9, 3))
    np.testing.assert_array_equal(quantize.nearest(normal(0, 5, 3), codebook, max_bytes=40), np.zeros(5))


def test_nearest_never_holds_all_distances():
    """A chunk of 64 MiB and what is made of it; all distances would be 512 MiB."""
    compiled = jax.jit(quantize.nearest).lower(jnp.zeros((16384, 16)), jnp.zeros((8192, 16))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * 64 * 2**20


def test_unit():
    x = normal(1, 6, 4).at[2].set(0.0)
    norms = np.linalg.norm(quantize.unit(x), axis=-1)
    np.testing.assert_allclose(norms, [1, 1, 0, 1, 1, 1], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: quantize.unit(x).sum())(x)).all()


def test_straight_through_is_the_code_forward_and_the_latent_backward():
    latents, codes, weights = normal(2, 7, 4), normal(3, 7, 4), normal(4, 7, 4)
    np.testing.assert_allclose(quantize.straight_through(latents, codes), codes, atol=1e-6)

    def loss(latents, codes):
        return jnp.sum(weights * quantize.straight_through(latents, codes))

    to_latents, to_codes = jax.grad(loss, argnums=(0, 1))(latents, codes)
    np.testing.assert_array_equal(to_latents, weights)
    np.testing.assert_array_equal(to_codes, jnp.zeros_like(codes))


def test_commitment_moves_latents_and_codebook_loss_moves_codes():
    latents, codes = normal(5, 3, 4), normal(6, 3, 4)
    expected = 2 * (latents - codes) / latents.size
    for loss, moved, sign in ((quantize.commitment_loss, 0, 1), (quantize.codebook_loss, 1, -1)):
        grads = jax.grad(loss, argnums=(0, 1))(latents, codes)
        np.testing.assert_allclose(grads[moved], sign * expected, rtol=1e-5)
        np.testing.assert_array_equal(grads[1 - moved], jnp.zeros_like(codes))
        np.testing.assert_allclose(loss(latents, codes), np.square(latents - codes).mean(), rtol=1e-6)


def test_entropy_loss_against_its_definition_and_chunks():
    latents, codes = quantize.unit(normal(7, 12, 4)), quantize.unit(normal(8, 5, 4))
    logits = -np.square(np.asarray(latents)[:, None] - np.asarray(codes)[None]).sum(-1).astype(np.float64) / 0.01
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    mean = share.mean(0)
    expected = -(share * np.log(share + 1e-300)).sum(-1).mean() + (mean * np.log(mean + 1e-9)).sum()
    for max_bytes in (10**6, 70):
        np.testing.assert_allclose(quantize.entropy_loss(latents, codes, max_bytes=max_bytes), expected, rtol=1e-4)
    grads = jax.grad(lambda z: quantize.entropy_loss(z, codes, max_bytes=70))(latents)
    assert float(jnp.abs(grads).max()) > 0 and bool(jnp.isfinite(grads).all())


def test_statistics():
    counts = quantize.counts(jnp.array([[0, 1], [3, 1]]), 5)
    np.testing.assert_array_equal(counts, [1, 2, 0, 1, 0])
    assert quantize.usage(counts) == pytest.approx(3 / 5)
    assert float(quantize.perplexity(counts)) == pytest.approx(np.exp(1.5 * np.log(2)))
    assert float(quantize.perplexity(jnp.ones(8))) == pytest.approx(8)
    assert float(quantize.perplexity(jnp.zeros(8).at[3].set(5))) == pytest.approx(1)
    np.testing.assert_array_equal(quantize.count_idle(jnp.array([4, 4, 4, 4, 0]), counts), [0, 0, 5, 0, 1])


@pytest.mark.parametrize('latents_number', [3, 50])
def test_revival_moves_only_dead_codes(latents_number):
    codebook, latents = normal(9, 10, 4), normal(10, latents_number, 4)
    idle = jnp.array([0, 7, 3, 9, 5, 0, 6, 5, 4, 100])
    moved, idle_after = quantize.revive(codebook, idle, latents, jax.random.key(0), 5)
    dead = np.asarray(idle) >= 5
    np.testing.assert_array_equal(moved[~dead], codebook[~dead])
    np.testing.assert_array_equal(idle_after, np.where(dead, 0, idle))
    rows = [np.flatnonzero((np.asarray(latents) == row).all(-1)) for row in np.asarray(moved)[dead]]
    assert all(len(row) == 1 for row in rows)  # each is one of the latents
    assert len({int(row[0]) for row in rows}) == min(latents_number, dead.sum())  # without replacement


def test_revival_without_dead_codes_changes_nothing():
    codebook, idle = normal(11, 6, 4), jnp.arange(6)
    moved, after = quantize.revive(codebook, idle, normal(12, 9, 4), jax.random.key(0), 6)
    np.testing.assert_array_equal(moved, codebook)
    np.testing.assert_array_equal(after, idle)
