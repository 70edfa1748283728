"""Guidance (§2.7) as a linear combination of branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse.guidance import cfg_weights, guided_logits, scale_at


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_scale_zero_is_the_conditional_branch_bit_for_bit(dtype):
    logits = (jax.random.normal(jax.random.key(0), (2, 3, 5, 7)) * 10).astype(dtype)
    guided = guided_logits(logits, cfg_weights(jnp.zeros(3)))
    assert (guided == logits[0].astype(jnp.float32)).all()


def test_weights_are_the_papers_formula_with_a_scale_a_row():
    cond, uncond = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    t = np.array([0.5, 2.0, 4.0], np.float32)
    guided = guided_logits(jnp.stack([cond, uncond]), cfg_weights(jnp.array(t)))
    expected = (1 + t)[:, None, None] * cond - t[:, None, None] * uncond
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)


def test_three_branches():
    logits = np.random.default_rng(1).normal(size=(3, 2, 4, 6)).astype(np.float32)
    weights = np.array([1.5, -1.0, 0.5], np.float32)
    guided = guided_logits(jnp.array(logits), jnp.array(weights)[:, None])
    np.testing.assert_allclose(guided, np.einsum('g,gbtv->btv', weights, logits), rtol=1e-5, atol=1e-5)


def test_linear_ramp_starts_at_zero_and_ends_at_the_scale():
    scale = jnp.array([3.0, 5.0])
    np.testing.assert_array_equal(scale_at(scale, jnp.float32(0), 'linear'), [0, 0])
    np.testing.assert_array_equal(scale_at(scale, jnp.float32(1), 'linear'), [3, 5])
    np.testing.assert_array_equal(scale_at(scale, jnp.float32(0.25), 'constant'), [3, 5])


def test_cosine_ramp_is_half_a_wave():
    scale = jnp.array([4.0])
    found = [float(scale_at(scale, jnp.float32(p), 'cosine')[0]) for p in (0, 1 / 3, 0.5, 1)]
    np.testing.assert_allclose(found, [0, 1, 2, 4], atol=1e-5)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_outside_the_interval_there_is_no_guidance(schedule):
    scale = jnp.array([4.0, 2.0])
    for progress, inside in ((0.24, False), (0.25, True), (0.5, True), (0.75, True), (0.76, False)):
        found = scale_at(scale, jnp.float32(progress), schedule, (0.25, 0.75))
        whole = scale_at(scale, jnp.float32(progress), schedule)
        np.testing.assert_array_equal(found, whole if inside else [0, 0])
