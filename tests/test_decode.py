"""The decoder's promises (§2.8), at the level of tokens: counts, ranks, immunity, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muse.decode import decode, lowest, masked_counts, row_keys, sample_tokens
from muse.errors import UserError

V = 11


def table_logits(tok_BT, progress):
    """A network-like function: logits that depend on every token of the row and on the position."""
    del progress
    mix_BT = jnp.sin(tok_BT.astype(jnp.float32) + jnp.cumsum(tok_BT, axis=1) * 0.37)
    return jnp.sin(mix_BT[..., None] * jnp.arange(1, V + 1) * 3.1) * 2


@settings(max_examples=60, deadline=None)
@given(unknown=st.lists(st.integers(0, 4096), min_size=1, max_size=6), steps=st.integers(1, 64))
def test_counts_free_at_least_one_token_a_step_and_all_at_the_end(unknown, steps):
    left_KB = np.asarray(masked_counts(jnp.array(unknown), steps, 'cosine'))
    before_KB = np.concatenate([np.array(unknown)[None], left_KB[:-1]])
    assert (left_KB[-1] == 0).all()
    assert ((before_KB - left_KB >= 1) | (before_KB == 0)).all()


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'square'])
def test_counts_follow_the_schedule_of_each_rows_own_unknown_tokens(schedule):
    unknown = np.array([4096, 256, 100])
    left_KB = np.asarray(masked_counts(jnp.array(unknown), 8, schedule))
    x = np.arange(1, 9) / 8
    share = {'cosine': np.cos(np.pi * x / 2), 'linear': 1 - x, 'square': 1 - x**2}[schedule]
    assert np.abs(left_KB - share[:, None] * unknown).max() <= 1.0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lowest_marks_exactly_k_under_ties_in_every_dtype(data):
    rows, length = 3, data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * length, max_size=rows * length))
    score = jnp.array(values, dtype).reshape(rows, length)
    among = jnp.array(data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    among = among.reshape(rows, length)
    count = jnp.array([data.draw(st.integers(0, int(n))) for n in among.sum(1)])
    marked = np.asarray(lowest(score, among, count))
    assert (marked.sum(1) == np.asarray(count)).all()
    assert not (marked & ~np.asarray(among)).any()
    for row in range(rows):
        chosen = np.asarray(score[row], np.float32)[marked[row]]
        left = np.asarray(score[row], np.float32)[np.asarray(among[row]) & ~marked[row]]
        assert not len(chosen) or not len(left) or chosen.max() <= left.min()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('steps', [1, 3, 40])
def test_known_tokens_are_immune_and_nothing_stays_masked(dtype, steps):
    key = jax.random.key(3)
    canvas_BT = jax.random.randint(key, (5, 24), 0, V)
    keep_BT = jax.random.uniform(key, (5, 24)) < jnp.array([0.0, 0.3, 0.7, 0.96, 1.0])[:, None]
    logits_fn = lambda tok, progress: table_logits(tok, progress).astype(dtype)  # noqa: E731
    out_BT = decode(logits_fn, canvas_BT, keep_BT, row_keys(0, jnp.arange(5)), steps=steps)
    assert (np.asarray(out_BT)[np.asarray(keep_BT)] == np.asarray(canvas_BT)[np.asarray(keep_BT)]).all()
    assert (np.asarray(out_BT) < V).all() and (np.asarray(out_BT) >= 0).all()


def test_what_lies_under_unknown_tokens_does_not_matter():
    keep_BT = jnp.arange(24)[None] < 8
    canvas_BT = jax.random.randint(jax.random.key(0), (1, 24), 0, V)
    other_BT = jnp.where(keep_BT, canvas_BT, (canvas_BT + 5) % V)
    run = lambda canvas: decode(table_logits, canvas, keep_BT, row_keys(1, jnp.arange(1)), steps=6)  # noqa: E731
    assert (run(canvas_BT) == run(other_BT)).all()


def test_one_step_samples_each_token_from_the_softmax():
    logits_TV = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]))
    logits_fn = lambda tok, progress: jnp.broadcast_to(logits_TV, (*tok.shape, 3))  # noqa: E731
    blank = jnp.zeros((20_000, 2), jnp.int32)
    out = decode(logits_fn, blank, blank > 0, row_keys(5, jnp.arange(20_000)), steps=1)
    shares = np.stack([np.bincount(np.asarray(out)[:, t], minlength=3) / 20_000 for t in range(2)])
    np.testing.assert_allclose(shares, np.exp(logits_TV), atol=0.011)  # 3 standard errors


def test_temperature_zero_is_greedy():
    logits = jax.random.normal(jax.random.key(0), (2, 7, V))
    tok, log_prob = sample_tokens(row_keys(0, jnp.arange(2)), logits, 0.0)
    assert (tok == logits.argmax(-1)).all()
    np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits).max(-1), rtol=1e-5)


def test_bf16_logits_are_sampled_with_float32_noise():
    """With bf16 noise the 16 most likely of 8192 codes would take 0.40 of the mass instead of 0.12."""
    ranks = jnp.arange(8192)
    logits_V = (-0.9 * jnp.log1p(ranks.astype(jnp.float32) / 8)).astype(jnp.bfloat16)
    exact = np.asarray(jax.nn.softmax(logits_V.astype(jnp.float32))[:16].sum())
    draws = sample_tokens(row_keys(7, jnp.arange(4)), jnp.broadcast_to(logits_V, (4, 1500, 8192)), 1.0)[0]
    found = np.mean(np.asarray(draws) < 16)
    assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / 6000)


def test_noise_depends_on_seed_index_and_step_alone():
    blank = jnp.zeros((6, 24), jnp.int32)
    run = jax.jit(lambda keys, canvas: decode(table_logits, canvas, canvas > 0, keys, steps=5))
    keys = row_keys(9, jnp.arange(6))
    whole = np.asarray(run(keys, blank))
    alone = np.concatenate([np.asarray(run(keys[i : i + 1], blank[:1])) for i in range(6)])
    shuffled = np.asarray(run(keys[::-1], blank))[::-1]
    assert (whole == alone).all() and (whole == shuffled).all()
    assert len({row.tobytes() for row in whole}) == 6
    assert (np.asarray(run(row_keys(10, jnp.arange(6)), blank)) != whole).any(1).all()


def test_a_seed_a_row_equals_runs_of_their_own():
    keys = row_keys(jnp.array([4, 9]), jnp.array([2, 0]))
    assert (jax.random.key_data(keys)[0] == jax.random.key_data(row_keys(4, jnp.array([2])))[0]).all()
    assert (jax.random.key_data(keys)[1] == jax.random.key_data(row_keys(9, jnp.array([0])))[0]).all()


def test_progress_runs_from_zero_to_one_and_is_one_for_a_single_step():
    def seen(steps):
        values = []
        logits_fn = lambda tok, p: (jax.debug.callback(lambda v: values.append(float(v)), p), table_logits(tok, p))[1]  # noqa: E731
        blank = jnp.zeros((1, 24), jnp.int32)
        decode(logits_fn, blank, blank > 0, row_keys(0, jnp.arange(1)), steps=steps).block_until_ready()
        jax.effects_barrier()
        return sorted(values)

    assert seen(1) == [1.0]
    np.testing.assert_allclose(seen(5), [0, 0.25, 0.5, 0.75, 1])


def test_zero_steps_are_refused():
    blank = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(UserError, match='steps is 0'):
        decode(table_logits, blank, blank > 0, row_keys(0, jnp.arange(1)), steps=0)
