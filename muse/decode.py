"""The one parallel decoder (§2.8): fills the unknown tokens of a canvas in K steps, most confident first.

Generation, inpainting, outpainting, mask-free editing and super-resolution all run through the scan of this file; they
differ in what is known (`keep_BT`), in which tokens are masked again after a step, and in the network behind
`logits_fn`. Its promises, each held by a test:

* each row follows the schedule over its own unknown tokens: at least one new token a step, none unknown at the end;
* exactly as many tokens as the schedule says are kept, by rank, whatever ties or dtypes do;
* known tokens come back bit for bit;
* sampling is done in float32, with noise that depends on (seed, picture index, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from muse.config import MaskSchedule
from muse.errors import UserError

LogitsFn = Callable[[Int[Array, 'B T'], Float[Array, '']], Float[Array, 'B T V']]
Choose = Callable[[Key[Array, ' B'], Float[Array, 'B T'], Bool[Array, 'B T'], tuple], Bool[Array, 'B T']]
_ORDER = 2**31  # folded into a row's key where steps are otherwise: no step has this number


def noise_keys(seed: int | Integer[Array, ''] | Integer[Array, ' B'], index_B: Int[Array, ' B']) -> Key[Array, ' B']:
    """One noise key a picture, from the run's seed (or one seed a row) and the picture's index in the run."""
    seed_B = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), index_B.shape)
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed_B, index_B)


def masked_share(progress: Float[Array, ...], schedule: MaskSchedule) -> Float[Array, ...]:
    """γ(progress): the share of the unknown tokens still masked; γ(0) = 1, γ(1) = 0."""
    match schedule:
        case 'cosine':
            return jnp.cos(0.5 * jnp.pi * progress)
        case 'linear':
            return 1.0 - progress
        case 'square':
            return 1.0 - jnp.square(progress)
        case 'cubic':
            return 1.0 - progress**3
        case 'root':
            return 1.0 - jnp.sqrt(progress)
    raise UserError(f"mask schedule is {schedule!r}; choose 'cosine', 'linear', 'square', 'cubic' or 'root'")


def masked_counts(unknown_B: Int[Array, ' B'], steps: int, schedule: MaskSchedule) -> Int[Array, 'K B']:
    """How many tokens of each row stay masked after each step.

    Follows floor(unknown · γ(k/K)), but frees at least one token a step and leaves none after the last.
    """

    def step(left_B, share):
        wanted_B = jnp.floor(unknown_B * share).astype(jnp.int32)
        left_B = jnp.maximum(jnp.minimum(wanted_B, left_B - 1), 0)
        return left_B, left_B

    share_K = masked_share(jnp.arange(1, steps + 1, dtype=jnp.float32) / steps, schedule)
    return jax.lax.scan(step, unknown_B.astype(jnp.int32), share_K.at[-1].set(0.0))[1]


def sample_tokens(
    key_B: Key[Array, ' B'],
    logits_BTV: Float[Array, 'B T V'],
    temperature: float | Float[Array, ''] | Float[Array, ' B'],
    *,
    top_k: Integer[Array, ''] | None = None,
    top_p: Float[Array, ''] | None = None,
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
    """Draws a token at each position, with its log-probability at temperature 1 among all codes.

    Noise and logits are float32: bf16 Gumbel noise flattens the tail of the distribution.

    Args:
        key_B: noise key of each row.
        logits_BTV: any float dtype.
        temperature: of the softmax; 0 takes the most likely token.
        top_k: draw among so many of the most likely codes (and those that tie with the last of them).
        top_p: draw among the fewest most likely codes that hold this share of the probability; after `top_k`.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    temperature_B11 = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), key_B.shape)[:, None, None]
    allowed_BTV = logits_BTV
    if top_k is not None:
        allowed_BTV = _above(allowed_BTV, jnp.ones_like(allowed_BTV), top_k.astype(jnp.float32))
    if top_p is not None:
        # As at temperature 0.01 the distribution is already a single code, nothing is lost by dividing by no less.
        share_BTV = jax.nn.softmax(allowed_BTV / jnp.maximum(temperature_B11, 0.01), axis=-1)
        allowed_BTV = _above(allowed_BTV, share_BTV, top_p)
    noise_BTV = jax.vmap(lambda k: jax.random.gumbel(k, logits_BTV.shape[1:], jnp.float32))(key_B)
    tok_BT = jnp.argmax(allowed_BTV + temperature_B11 * noise_BTV, axis=-1).astype(jnp.int32)
    chosen_BT = jnp.take_along_axis(logits_BTV, tok_BT[..., None], axis=-1)[..., 0]
    return tok_BT, chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def _above(
    value_BTV: Float[Array, 'B T V'], weight_BTV: Float[Array, 'B T V'], wanted: Float[Array, '']
) -> Float[Array, 'B T V']:
    """Values with −∞ in place of all below the highest bar at which the weights of what is left reach `wanted`.

    The bar is found bit by bit on the values' ordered bit patterns, in 32 readings: several times faster than sorting
    the codebook, and `wanted` need not be known when compiling.
    """
    bits_BTV = jax.lax.bitcast_convert_type(value_BTV, jnp.uint32)
    top = jnp.uint32(1 << 31)
    ordered_BTV = jnp.where(bits_BTV >= top, ~bits_BTV, bits_BTV | top)

    def try_bit(i, bar_BT1):
        higher_BT1 = bar_BT1 | (top >> i.astype(jnp.uint32))
        reached_BT1 = jnp.sum(weight_BTV, axis=-1, keepdims=True, where=ordered_BTV >= higher_BT1) >= wanted
        return jnp.where(reached_BT1, higher_BT1, bar_BT1)

    bar_BT1 = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((*value_BTV.shape[:-1], 1), jnp.uint32))
    return jnp.where(ordered_BTV >= bar_BT1, value_BTV, -jnp.inf)


def lowest(
    score_BT: Float[Array, 'B T'], among_BT: Bool[Array, 'B T'], count_B: Int[Array, ' B']
) -> Bool[Array, 'B T']:
    """Marks exactly `count_B` of the positions `among_BT` of each row: those of lowest score, ties by position."""
    positions_BT = jnp.broadcast_to(jnp.arange(score_BT.shape[1]), score_BT.shape)
    order_BT = jax.lax.sort((~among_BT, score_BT, positions_BT), dimension=1, num_keys=2)[2]
    rank_BT = jnp.argsort(order_BT, axis=1)
    return rank_BT < count_B[:, None]


def halton_order(grid: tuple[int, int]) -> np.ndarray:
    """When each cell of a grid is filled, `[rows · columns]` int32: a permutation that spreads over the picture.

    The cells in the order in which the Halton sequence of bases 2 (rows) and 3 (columns) first visits them.
    """
    rows, columns = grid
    points, first_N = 4 * rows * columns, np.empty(0, np.int64)
    while len(first_N) < rows * columns:
        points *= 2
        n = np.arange(1, points + 1)
        cell_N = np.floor(_van_der_corput(n, 2) * rows) * columns + np.floor(_van_der_corput(n, 3) * columns)
        found, first_N = np.unique(cell_N.astype(np.int64), return_index=True)
    order_T = np.empty(rows * columns, np.int32)
    order_T[found[np.argsort(first_N)]] = np.arange(rows * columns)  # pyright: ignore[reportPossiblyUnboundVariable]
    return order_T


def _van_der_corput(n: np.ndarray, base: int) -> np.ndarray:
    """The digits of n mirrored at the point, in [0, 1)."""
    value, digit = np.zeros(n.shape), 1.0
    while n.any():
        digit /= base
        value += digit * (n % base)
        n = n // base
    return value


def random_order(keys_B: Key[Array, ' B'], tokens: int) -> Float[Array, 'B T']:
    """An order of each row's own, every permutation equally likely."""
    order_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, jnp.uint32(_ORDER))
    return jax.vmap(lambda k: jax.random.uniform(k, (tokens,)))(order_keys_B)


def decode_steps(
    logits_fn: LogitsFn,
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    keys_B: Key[Array, ' B'],
    *,
    steps: int,
    temperature: float | Array,
    choice_temperature: float | Array,
    schedule: MaskSchedule,
    order_BT: Float[Array, 'B T'] | None = None,
    top_k: Integer[Array, ''] | None = None,
    top_p: Float[Array, ''] | None = None,
) -> Int[Array, 'K B T']:
    """Fills the tokens that are not kept, and tells how: the canvas after each step.

    Args:
        logits_fn: (tok_BT with MASK = V at the unknown, progress in [0, 1]) → guided logits over the V codes.
        canvas_BT: token ids; what stands where `keep_BT` is False does not matter.
        keep_BT: True where a token is known.
        keys_B: one noise key a row (`noise_keys`).
        steps: K; rows with fewer unknown tokens than steps are done early.
        temperature: of the token's softmax, 0 is greedy; a number, one a row [B], or one a step and row [K, B].
        choice_temperature: of the Gumbel noise on the confidence, annealed linearly to 0 at the last step.
        schedule: share of the unknown tokens that stays masked over the steps.
        order_BT: tokens are kept from the lowest to the highest number; None: from the most to the least confident.
        top_k, top_p: see `sample_tokens`; None is no limit.

    Returns:
        int32 ids, MASK at what is still unknown; no MASK is left in the last.

    Raises:
        UserError: fewer than one step, or an unknown schedule.
    """
    progress_K = _progress(steps)
    left_KB = masked_counts(jnp.sum(~keep_BT, axis=1), steps, schedule)

    def choose(key_B, confidence_BT, masked_BT, slices):
        progress, left_B = slices
        if order_BT is not None:
            return lowest(-order_BT, masked_BT, left_B)
        noise_BT = jax.vmap(lambda k: jax.random.gumbel(k, masked_BT.shape[1:], jnp.float32))(key_B)
        return lowest(confidence_BT + choice_temperature * (1.0 - progress) * noise_BT, masked_BT, left_B)

    tok_KBT, masked_KBT = _scan(
        logits_fn, canvas_BT, ~keep_BT, keys_B, choose, (progress_K, left_KB), temperature, top_k=top_k, top_p=top_p
    )
    return jnp.where(masked_KBT, _codes(logits_fn, canvas_BT), tok_KBT)


def resample_steps(
    logits_fn: LogitsFn,
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    keys_B: Key[Array, ' B'],
    *,
    steps: int,
    share: float | Float[Array, ''],
    temperature: float | Array,
    top_k: Integer[Array, ''] | None = None,
    top_p: Float[Array, ''] | None = None,
) -> Int[Array, 'K B T']:
    """Mask-free editing (§3.3): each step draws a random share of the tokens anew, seeing all the others.

    Args:
        logits_fn, keys_B, temperature, top_k, top_p: as in `decode_steps`.
        canvas_BT: the ids of the picture to edit, complete.
        keep_BT: True where a token must stay.
        steps: how often.
        share: of each row's free tokens that one step draws, rounded, at least one; a free token is free in each step.

    Returns:
        The canvas after each step, int32 ids without MASK.

    Raises:
        UserError: fewer than one step.
    """
    progress_K = _progress(steps)
    free_B = jnp.sum(~keep_BT, axis=1)
    count_B = jnp.clip(jnp.round(share * free_B).astype(jnp.int32), jnp.minimum(1, free_B), free_B)

    def draw(step):
        key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, jnp.uint32(_ORDER) + step)
        score_BT = jax.vmap(lambda k: jax.random.uniform(k, canvas_BT.shape[1:]))(key_B)
        return lowest(score_BT, ~keep_BT, count_B)

    masked_KBT = jax.vmap(draw)(jnp.arange(steps, dtype=jnp.uint32))
    next_KBT = jnp.concatenate([masked_KBT[1:], jnp.zeros_like(masked_KBT[:1])])

    def choose(key_B, confidence_BT, masked_BT, slices):
        del key_B, confidence_BT, masked_BT
        return slices[1]

    return _scan(
        logits_fn,
        canvas_BT,
        masked_KBT[0],
        keys_B,
        choose,
        (progress_K, next_KBT),
        temperature,
        top_k=top_k,
        top_p=top_p,
    )[0]


def _progress(steps: int) -> Float[np.ndarray, ' K']:
    if steps < 1:
        raise UserError(f'steps is {steps}; decoding needs at least 1')
    return np.linspace(0, 1, steps, dtype=np.float32) if steps > 1 else np.ones(1, np.float32)


def _codes(logits_fn: LogitsFn, canvas_BT: Int[Array, 'B T']) -> int:
    """V, which is also the id of MASK."""
    return jax.eval_shape(logits_fn, canvas_BT, jax.ShapeDtypeStruct((), jnp.float32)).shape[-1]


def _scan(
    logits_fn: LogitsFn,
    canvas_BT: Int[Array, 'B T'],
    masked_BT: Bool[Array, 'B T'],
    keys_B: Key[Array, ' B'],
    choose: Choose,
    per_step: tuple[Array | np.ndarray, ...],
    temperature: float | Array,
    *,
    top_k: Integer[Array, ''] | None,
    top_p: Float[Array, ''] | None,
) -> tuple[Int[Array, 'K B T'], Bool[Array, 'K B T']]:
    """The one loop: hides what is masked, draws it, and asks `choose` what the next step hides.

    Args:
        masked_BT: what the first step hides.
        choose: (noise keys, confidence of the drawn tokens, what was hidden, slices of `per_step`) → what is next.
        per_step: arrays over the steps; the first is the progress.

    Returns:
        The tokens after each step and what of them is hidden in the next.
    """
    mask_id, steps = _codes(logits_fn, canvas_BT), per_step[0].shape[0]
    temperature_KB = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (steps, canvas_BT.shape[0]))

    def step(carry, slices):
        tok_BT, masked_BT = carry
        index, temperature_B, rest = slices
        step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, index)
        token_keys_B, choice_keys_B = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 2))(step_keys_B), 1, 0)
        logits_BTV = logits_fn(jnp.where(masked_BT, mask_id, tok_BT), rest[0])
        with jax.named_scope('draw'):
            drawn_BT, confidence_BT = sample_tokens(token_keys_B, logits_BTV, temperature_B, top_k=top_k, top_p=top_p)
        tok_BT = jnp.where(masked_BT, drawn_BT, tok_BT)
        masked_BT = choose(choice_keys_B, confidence_BT, masked_BT, rest)
        return (tok_BT, masked_BT), (tok_BT, masked_BT)

    start = (canvas_BT.astype(jnp.int32), masked_BT)
    return jax.lax.scan(step, start, (jnp.arange(steps), temperature_KB, per_step))[1]
