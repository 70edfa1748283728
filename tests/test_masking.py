"""The training side: the mask law, exact counts, the loss, the share of dropped texts."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from muse.masking import corrupt_tokens, drop_text, mask_ratio, masked_accuracy, masked_ce, random_mask


def test_mask_ratio_follows_the_papers_density():
    ratios = np.asarray(mask_ratio(jax.random.key(0), 20_000))
    law = lambda r: 2 / np.pi * np.arcsin(r)  # noqa: E731  the integral of (2/π)(1−r²)^(−1/2)
    assert stats.kstest(ratios, law).pvalue > 0.01
    assert abs(ratios.mean() - 2 / np.pi) < 0.01
    wrong_law = 2 / np.pi * np.arccos(np.random.default_rng(0).uniform(size=20_000))
    assert stats.kstest(wrong_law, law).pvalue < 1e-6  # same mean, not Muse's law: the test tells them apart


def test_fully_masked_examples_are_as_frequent_as_the_law_says():
    mask = random_mask(jax.random.key(2), mask_ratio(jax.random.key(1), 8000), 256)
    expected = 1 - 2 / np.pi * np.arcsin(255.5 / 256)
    assert abs(float(mask.all(1).mean()) - expected) < 0.007  # 4.0 %, 3 standard errors


def test_random_mask_counts_are_exact_and_positions_uniform():
    ratio = jnp.linspace(0, 1, 101)
    mask = np.asarray(random_mask(jax.random.key(0), ratio, 64))
    expected = np.clip(np.round(np.asarray(ratio) * 64), 1, 64)
    np.testing.assert_array_equal(mask.sum(1), expected)
    often = np.asarray(random_mask(jax.random.key(1), jnp.full(4000, 0.25), 16)).mean(0)
    np.testing.assert_allclose(often, 0.25, atol=0.028)  # 4 standard errors


def test_rows_draw_different_masks_whatever_the_batch_size():
    small = np.asarray(random_mask(jax.random.key(5), jnp.full(4, 0.5), 64))
    large = np.asarray(random_mask(jax.random.key(5), jnp.full(16, 0.5), 64))
    np.testing.assert_array_equal(small, large[:4])
    assert len({row.tobytes() for row in large}) == 16


def test_loss_is_the_mean_over_masked_tokens_of_each_example():
    rng = np.random.default_rng(0)
    logits, tok = rng.normal(size=(2, 6, 9)).astype(np.float32), rng.integers(0, 9, (2, 6))
    mask = np.array([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0]], bool)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, tok[..., None], -1)[..., 0]
    expected = [nats[b][mask[b]].mean() for b in range(2)]
    args = jnp.array(logits), jnp.array(tok), jnp.array(mask)
    np.testing.assert_allclose(masked_ce(*args), expected, rtol=1e-5)
    smooth = 0.9 * nats + 0.1 * -log_p.mean(-1)
    np.testing.assert_allclose(masked_ce(*args, 0.1), [smooth[b][mask[b]].mean() for b in range(2)], rtol=1e-5)
    right = logits.argmax(-1) == tok
    np.testing.assert_allclose(masked_accuracy(*args), [right[b][mask[b]].mean() for b in range(2)])
    changed = jnp.array(np.where(mask[..., None], logits, 99 * rng.normal(size=logits.shape)).astype(np.float32))
    np.testing.assert_array_equal(masked_ce(changed, *args[1:]), masked_ce(*args))


def test_the_losss_gradient_is_that_of_the_formula():
    """Also in bfloat16, where it is written once, and for tokens that are not masked, where it is 0."""
    rng = np.random.default_rng(1)
    logits, tok = rng.normal(size=(2, 6, 11)) * 3, rng.integers(0, 11, (2, 6))
    mask = np.array([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0]], bool)
    target = 0.9 * np.eye(11)[tok] + 0.1 / 11
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (share - target) * (mask / mask.sum(1, keepdims=True))[..., None]
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)):
        given = jnp.asarray(logits, dtype)
        found = jax.grad(lambda x: masked_ce(x, jnp.array(tok), jnp.array(mask), 0.1).sum())(given)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance)


def test_ten_percent_of_texts_are_dropped_and_ninety_kept():
    lengths = jnp.full(20_000, 7)
    kept = np.asarray(drop_text(jax.random.key(0), lengths, 0.1))
    assert set(np.unique(kept)) == {0, 7}
    assert abs((kept == 7).mean() - 0.9) < 0.0065  # 3 standard errors


def test_a_random_share_of_low_res_tokens_is_replaced_by_any_code():
    tok = jnp.full((4000, 64), 5)
    found = np.asarray(corrupt_tokens(jax.random.key(0), tok, 0.2, 8))
    wrong = (found != 5).mean(1) * 8 / 7  # one replacement in eight is the same code
    assert abs(wrong.mean() - 0.1) < 0.004  # 4 standard errors
    # A share drawn evenly from 0 to 0.2, then tokens at that rate: variance of both, 0.2²/12 and s(1−s·7/8)/64·8/7.
    assert abs(wrong.var() - (0.2**2 / 12 + 8 / 7 * (0.1 - 7 / 8 * (0.1**2 + 0.2**2 / 12)) / 64)) < 4e-4
    replaced = found[found != 5]
    np.testing.assert_allclose(np.bincount(replaced, minlength=8) / len(replaced), (np.arange(8) != 5) / 7, atol=0.01)
    places = (found != 5).mean(0)
    np.testing.assert_allclose(places, 0.0875, atol=0.02)


def test_no_corruption_leaves_the_tokens_and_rows_draw_for_themselves():
    tok = jax.random.randint(jax.random.key(1), (16, 64), 0, 8)
    np.testing.assert_array_equal(corrupt_tokens(jax.random.key(0), tok, 0.0, 8), tok)
    large = np.asarray(corrupt_tokens(jax.random.key(0), tok, 0.5, 8))
    np.testing.assert_array_equal(corrupt_tokens(jax.random.key(0), tok[:3], 0.5, 8), large[:3])
    assert len({row.tobytes() for row in large != np.asarray(tok)}) == 16
