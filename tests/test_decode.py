"""The decoder's promises (§2.8), at the level of tokens: counts, ranks, immunity, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muse.config import DecodeConfig
from muse.decode import (
    decode_steps,
    halton_order,
    lowest,
    masked_counts,
    noise_keys,
    random_order,
    resample_steps,
    sample_tokens,
)
from muse.errors import UserError

DEFAULT = DecodeConfig()
KNOBS = {name: getattr(DEFAULT, name) for name in ('temperature', 'choice_temperature', 'schedule')}


def decode_all(*arguments, **knobs):
    """The canvas after each step; what is not said is as in `DecodeConfig`."""
    return decode_steps(*arguments, **(KNOBS | knobs))


def decode(*arguments, **knobs):
    """The last canvas."""
    return decode_all(*arguments, **knobs)[-1]


V = 11
sample = jax.jit(sample_tokens)


def table_logits(tok_BT, progress):
    """A network-like function: logits that depend on every token of the row and on the position."""
    del progress
    mix_BT = jnp.sin(tok_BT.astype(jnp.float32) + jnp.cumsum(tok_BT, axis=1) * 0.37)
    return jnp.sin(mix_BT[..., None] * jnp.arange(1, V + 1) * 3.1) * 2


@settings(max_examples=4, deadline=None)
@given(unknown=st.lists(st.integers(0, 4096), min_size=1, max_size=6), steps=st.integers(1, 64))
def test_counts_free_at_least_one_token_a_step_and_all_at_the_end(unknown, steps):
    left_KB = np.asarray(masked_counts(jnp.array(unknown), steps, 'cosine'))
    before_KB = np.concatenate([np.array(unknown)[None], left_KB[:-1]])
    assert (left_KB[-1] == 0).all()
    assert ((before_KB - left_KB >= 1) | (before_KB == 0)).all()


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'square', 'cubic', 'root'])
def test_counts_follow_the_schedule_of_each_rows_own_unknown_tokens(schedule):
    unknown = np.array([4096, 256, 100])
    left_KB = np.asarray(masked_counts(jnp.array(unknown), 8, schedule))
    x = np.arange(1, 9) / 8
    share = {
        'cosine': np.cos(np.pi * x / 2),
        'linear': 1 - x,
        'square': 1 - x**2,
        'cubic': 1 - x**3,
        'root': 1 - x**0.5,
    }
    share = share[schedule]
    assert np.abs(left_KB - share[:, None] * unknown).max() <= 1.0


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_lowest_marks_exactly_k_under_ties_in_every_dtype(data):
    rows, length = 3, data.draw(st.sampled_from([1, 7, 40]))  # each is compiled
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
@pytest.mark.parametrize(
    'steps', [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(40, marks=pytest.mark.slow)]
)
def test_known_tokens_are_immune_and_nothing_stays_masked(dtype, steps):
    key = jax.random.key(3)
    canvas_BT = jax.random.randint(key, (5, 24), 0, V)
    keep_BT = jax.random.uniform(key, (5, 24)) < jnp.array([0.0, 0.3, 0.7, 0.96, 1.0])[:, None]
    logits_fn = lambda tok, progress: table_logits(tok, progress).astype(dtype)  # noqa: E731
    out_BT = decode(logits_fn, canvas_BT, keep_BT, noise_keys(0, jnp.arange(5)), steps=steps)
    assert (np.asarray(out_BT)[np.asarray(keep_BT)] == np.asarray(canvas_BT)[np.asarray(keep_BT)]).all()
    assert (np.asarray(out_BT) < V).all() and (np.asarray(out_BT) >= 0).all()


def test_what_lies_under_unknown_tokens_does_not_matter():
    keep_BT = jnp.arange(24)[None] < 8
    canvas_BT = jax.random.randint(jax.random.key(0), (1, 24), 0, V)
    other_BT = jnp.where(keep_BT, canvas_BT, (canvas_BT + 5) % V)
    run = jax.jit(lambda canvas: decode(table_logits, canvas, keep_BT, noise_keys(1, jnp.arange(1)), steps=6))
    assert (run(canvas_BT) == run(other_BT)).all()


def test_one_step_samples_each_token_from_the_softmax():
    logits_TV = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]))
    logits_fn = lambda tok, progress: jnp.broadcast_to(logits_TV, (*tok.shape, 3))  # noqa: E731
    blank = jnp.zeros((20_000, 2), jnp.int32)
    out = decode(logits_fn, blank, blank > 0, noise_keys(5, jnp.arange(20_000)), steps=1)
    shares = np.stack([np.bincount(np.asarray(out)[:, t], minlength=3) / 20_000 for t in range(2)])
    np.testing.assert_allclose(shares, np.exp(logits_TV), atol=0.011)  # 3 standard errors


def test_temperature_zero_is_greedy():
    logits = jax.random.normal(jax.random.key(0), (2, 7, V))
    tok, log_prob = sample_tokens(noise_keys(0, jnp.arange(2)), logits, 0.0)
    assert (tok == logits.argmax(-1)).all()
    np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits).max(-1), rtol=1e-5)


def test_bf16_logits_are_sampled_with_float32_noise():
    """With bf16 noise the 16 most likely of 8192 codes would take 0.40 of the mass instead of 0.12."""
    ranks = jnp.arange(8192)
    logits_V = (-0.9 * jnp.log1p(ranks.astype(jnp.float32) / 8)).astype(jnp.bfloat16)
    exact = np.asarray(jax.nn.softmax(logits_V.astype(jnp.float32))[:16].sum())
    draws = sample_tokens(noise_keys(7, jnp.arange(4)), jnp.broadcast_to(logits_V, (4, 250, 8192)), 1.0)[0]
    found = np.mean(np.asarray(draws) < 16)
    assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / 1000)


def test_noise_depends_on_seed_index_and_step_alone():
    blank = jnp.zeros((6, 24), jnp.int32)
    run = jax.jit(lambda keys, canvas: decode(table_logits, canvas, canvas > 0, keys, steps=5))
    keys = noise_keys(9, jnp.arange(6))
    whole = np.asarray(run(keys, blank))
    alone = np.concatenate([np.asarray(run(keys[i : i + 1], blank[:1])) for i in range(6)])
    shuffled = np.asarray(run(keys[::-1], blank))[::-1]
    assert (whole == alone).all() and (whole == shuffled).all()
    assert len({row.tobytes() for row in whole}) == 6
    assert (np.asarray(run(noise_keys(10, jnp.arange(6)), blank)) != whole).any(1).all()


def test_a_seed_a_row_equals_runs_of_their_own():
    keys = noise_keys(jnp.array([4, 9]), jnp.array([2, 0]))
    assert (jax.random.key_data(keys)[0] == jax.random.key_data(noise_keys(4, jnp.array([2])))[0]).all()
    assert (jax.random.key_data(keys)[1] == jax.random.key_data(noise_keys(9, jnp.array([0])))[0]).all()


def test_progress_runs_from_zero_to_one_and_is_one_for_a_single_step():
    def seen(steps):
        values = []
        logits_fn = lambda tok, p: (jax.debug.callback(lambda v: values.append(float(v)), p), table_logits(tok, p))[1]  # noqa: E731
        blank = jnp.zeros((1, 24), jnp.int32)
        decode(logits_fn, blank, blank > 0, noise_keys(0, jnp.arange(1)), steps=steps).block_until_ready()
        jax.effects_barrier()
        return sorted(values)

    assert seen(1) == [1.0]
    np.testing.assert_allclose(seen(5), [0, 0.25, 0.5, 0.75, 1])


def test_zero_steps_are_refused():
    blank = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(UserError, match='steps is 0'):
        decode(table_logits, blank, blank > 0, noise_keys(0, jnp.arange(1)), steps=0)


# The whole of what the promises say, over all lengths, steps and dtypes: a sample of it runs with every change.

DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
SCHEDULES = st.sampled_from(['cosine', 'linear', 'square', 'cubic', 'root'])


def check_promises(data, longest):
    """One decode of a few rows: counts, immunity, ids, and that only unknown tokens are ever touched."""
    length, steps = data.draw(st.integers(1, longest)), data.draw(st.integers(1, 64))
    dtype, schedule = data.draw(DTYPES), data.draw(SCHEDULES)
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.97, 1.0]), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    keep = rng.random((len(shares), length)) < np.array(shares)[:, None]
    canvas = rng.integers(0, V, keep.shape)
    order = {'confidence': None, 'own': rng.permuted(np.tile(np.arange(length), (len(shares), 1)), axis=1)}
    order_BT = order[data.draw(st.sampled_from(sorted(order)))]
    flat = data.draw(st.booleans())  # all logits equal: every confidence is a tie

    def logits_fn(tok_BT, progress):
        return (table_logits(tok_BT, progress) * (0.0 if flat else 1.0)).astype(dtype)

    canvas_KBT = np.asarray(
        decode_steps(
            logits_fn,
            jnp.asarray(canvas),
            jnp.asarray(keep),
            noise_keys(jnp.asarray(rng.integers(0, 2**32, len(shares), np.uint32)), jnp.arange(len(shares))),
            steps=steps,
            temperature=float(rng.choice([0.0, 1.0, 5.0])),
            choice_temperature=float(rng.choice([0.0, 4.5])),
            schedule=schedule,
            order_BT=None if order_BT is None else jnp.asarray(order_BT, jnp.float32),
        )
    )
    unknown_KB = (canvas_KBT == V).sum(-1)
    expected_KB = np.asarray(masked_counts(jnp.asarray((~keep).sum(1)), steps, schedule))
    np.testing.assert_array_equal(unknown_KB, expected_KB)
    assert canvas_KBT.min() >= 0 and canvas_KBT[-1].max(initial=0) < V
    assert (canvas_KBT[:, keep] == canvas[keep]).all()
    settled = canvas_KBT[:-1] != V
    assert (canvas_KBT[1:][settled] == canvas_KBT[:-1][settled]).all(), 'a drawn token changed later'


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_promises(data):
    check_promises(data, longest=40)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_promises_in_full(data):
    check_promises(data, longest=4096)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 300), steps=st.integers(1, 64), share=st.floats(0.001, 1.0), seed=st.integers(0, 2**32 - 1)
)
def test_resampling_in_full(length, steps, share, seed):
    check_resampling(length, steps, share, seed)


@pytest.mark.slow
def test_counts_in_full():
    """Every number of unknown tokens from 0 to 4096, under all steps from 1 to 64 for the paper's schedule."""
    unknown, some = np.arange(4097), (1, 2, 3, 17, 64)
    steps_of = {'cosine': range(1, 65), 'linear': some, 'square': some, 'cubic': some, 'root': some}
    for schedule, all_steps in steps_of.items():
        count = jax.jit(lambda n, steps, schedule=schedule: masked_counts(n, steps, schedule), static_argnums=1)
        for steps in all_steps:
            left_KB = np.asarray(count(unknown, steps))
            before_KB = np.concatenate([unknown[None], left_KB[:-1]])
            assert (left_KB[-1] == 0).all() and (left_KB >= 0).all()
            assert ((before_KB - left_KB >= 1) | (before_KB == 0)).all()


@pytest.mark.parametrize('grid', [(64, 64), (16, 16), (24, 16), (1, 1), (1, 37), (50, 3), (7, 11)])
def test_halton_order_is_a_permutation(grid):
    order = halton_order(grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))


def test_halton_order_begins_as_the_sequence_and_spreads():
    order = halton_order((64, 64)).reshape(64, 64)
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9): rows in base 2, columns in base 3
    for place, (row, column) in enumerate([(32, 21), (16, 42), (48, 7), (8, 28)]):
        assert order[row, column] == place
    quarters = (order < 256).reshape(8, 8, 8, 8).sum((1, 3))  # of the first 256 cells 4 should lie in each block
    assert quarters.min() >= 3 and quarters.max() <= 5


def test_a_fixed_order_is_followed_whatever_the_confidence():
    blank = jnp.zeros((2, 24), jnp.int32)
    order_BT = jnp.asarray(np.stack([np.random.default_rng(i).permutation(24) for i in range(2)]), jnp.float32)
    canvas_KBT = np.asarray(
        decode_all(table_logits, blank, blank > 0, noise_keys(0, jnp.arange(2)), steps=5, order_BT=order_BT)
    )
    for canvas_BT in canvas_KBT:
        known = canvas_BT != V
        assert (known == (np.asarray(order_BT) < known.sum(1, keepdims=True))).all()


def test_random_orders_are_permutations_of_each_rows_own():
    order = np.asarray(random_order(noise_keys(3, jnp.arange(4)), 50)).argsort(1)
    assert (np.sort(order, 1) == np.arange(50)).all() and len({row.tobytes() for row in order}) == 4
    again = np.asarray(random_order(noise_keys(3, jnp.arange(2, 3)), 50)).argsort(1)
    assert (again[0] == order[2]).all()


@pytest.mark.parametrize('k', [1, 3, 10])
def test_top_k_draws_among_the_k_most_likely(k):
    logits = jax.random.normal(jax.random.key(0), (1, 4, V)) * 0.3
    many = jnp.broadcast_to(logits, (3000, 4, V))
    tok = np.asarray(sample(noise_keys(0, jnp.arange(3000)), many, 1.0, top_k=jnp.int32(k))[0])
    for t in range(4):
        best = np.argsort(-np.asarray(logits[0, t]))[:k]
        kept = np.exp(np.asarray(logits[0, t, best]))
        found = np.array([(tok[:, t] == code).mean() for code in best])
        np.testing.assert_allclose(found, kept / kept.sum(), atol=0.035)  # over 3 standard errors
        assert abs(found.sum() - 1) < 1e-9


@pytest.mark.parametrize(('top_p', 'kept'), [(0.05, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.99, 5), (1.0, 5)])
def test_top_p_draws_among_the_fewest_codes_with_that_share(top_p, kept):
    shares = jnp.array([0.05, 0.5, 0.15, 0.3 - 1e-3, 1e-3])
    logits = jnp.broadcast_to(jnp.log(shares), (4000, 1, 5))
    found = np.asarray(sample(noise_keys(1, jnp.arange(4000)), logits, 1.0, top_p=jnp.float32(top_p))[0])
    best = np.argsort(-np.asarray(shares))[:kept]
    assert set(found.ravel()) <= set(best.tolist())
    expected = np.asarray(shares)[best] / np.asarray(shares)[best].sum()
    np.testing.assert_allclose([(found == code).mean() for code in best], expected, atol=0.03)


def test_top_p_reads_the_distribution_at_its_temperature():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2])), (500, 1, 3))
    draw = lambda t: np.unique(sample(noise_keys(1, jnp.arange(500)), logits, t, top_p=jnp.float32(0.6))[0])  # noqa: E731
    assert draw(1.0).tolist() == [0, 1] and draw(0.2).tolist() == [0] and draw(50.0).tolist() == [0, 1]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_top_k_keeps_exactly_k_of_values_of_either_sign(dtype):
    logits = jnp.asarray(np.random.default_rng(0).permutation(np.arange(-100, 101)), dtype)[None, None]
    noisy = jnp.broadcast_to(logits * 1e-3, (4000, 1, 201))
    found = np.asarray(sample(noise_keys(2, jnp.arange(4000)), noisy, 1.0, top_k=jnp.int32(7))[0])
    assert set(found.ravel()) == set(np.argsort(-np.asarray(logits[0, 0], np.float32))[:7].tolist())


def test_a_temperature_a_row_and_a_step():
    """Row 0 is greedy throughout, row 1 at the second step only."""
    blank = jnp.zeros((2, 24), jnp.int32)
    flat = lambda tok, progress: jnp.zeros((*tok.shape, V)).at[..., 4].set(1.0)  # noqa: E731
    temperature_KB = jnp.array([[0.0, 9.0], [0.0, 0.0]])
    canvas_KBT = np.asarray(
        decode_all(flat, blank, blank > 0, noise_keys(0, jnp.arange(2)), steps=2, temperature=temperature_KB)
    )
    assert (canvas_KBT[1, 0] == 4).all()
    first = canvas_KBT[0, 1] != V
    assert (canvas_KBT[1, 1][~first] == 4).all() and (canvas_KBT[1, 1][first] != 4).any()


@settings(max_examples=2, deadline=None)
@given(length=st.integers(1, 30), steps=st.integers(1, 9), share=st.floats(0.01, 1.0), seed=st.integers(0, 2**32 - 1))
def test_resampling_draws_an_exact_share_of_the_free_tokens_each_step(length, steps, share, seed):
    check_resampling(length, steps, share, seed)


def check_resampling(length, steps, share, seed):
    rng = np.random.default_rng(seed)
    keep, canvas = rng.random((2, length)) < 0.4, rng.integers(0, V, (2, length))
    masked = []

    def logits_fn(tok_BT, progress):
        jax.debug.callback(lambda m: masked.append(np.asarray(m)), tok_BT == V, ordered=True)
        return table_logits(tok_BT, progress)

    canvas_KBT = resample_steps(
        logits_fn,
        jnp.asarray(canvas),
        jnp.asarray(keep),
        noise_keys(seed, jnp.arange(2)),
        steps=steps,
        share=share,
        temperature=1.0,
    )
    canvas_KBT = np.asarray(canvas_KBT)
    jax.effects_barrier()
    free = (~keep).sum(1)
    wanted = np.where(free > 0, np.maximum(1, np.rint(np.float32(share) * free.astype(np.float32))), 0)
    before = canvas
    assert len(masked) == steps
    for mask, after in zip(masked, canvas_KBT, strict=True):
        assert (mask.sum(1) == wanted).all() and not (mask & keep).any()
        assert (after[~mask] == before[~mask]).all() and (after < V).all()
        before = after


def test_resampling_visits_other_tokens_each_step():
    blank = jnp.zeros((1, 64), jnp.int32)
    hot = lambda tok, progress: jnp.zeros((*tok.shape, V)) + progress  # noqa: E731
    keys = noise_keys(0, jnp.arange(1))
    run = jax.jit(lambda: resample_steps(hot, blank, blank > 0, keys, steps=100, share=0.08, temperature=1.0))
    canvas_KBT = run()
    assert (np.asarray(canvas_KBT[-1]) != 0).mean() > 0.75  # each was drawn 8 times over; 1 in 11 falls on code 0
