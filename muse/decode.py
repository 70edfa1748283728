"""The one parallel decoder (§2.8): fills the unknown tokens of a canvas in K steps, most confident first.

Generation, inpainting, outpainting, mask-free editing and super-resolution all call `decode`; they differ in what is
known (`keep_BT`) and in the network behind `logits_fn`. Its promises, each held by a test:

* each row follows the schedule over its own unknown tokens: at least one new token a step, none unknown at the end;
* exactly as many tokens as the schedule says are kept, by rank, whatever ties or dtypes do;
* known tokens come back bit for bit;
* sampling is done in float32, with noise that depends on (seed, picture index, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from muse.errors import UserError

Schedule = Literal['cosine', 'linear', 'square']
LogitsFn = Callable[[Int[Array, 'B T'], Float[Array, '']], Float[Array, 'B T V']]


def row_keys(seed: int | Integer[Array, ''] | Integer[Array, ' B'], index_B: Int[Array, ' B']) -> Key[Array, ' B']:
    """One noise key a picture, from the run's seed (or one seed a row) and the picture's index in the run."""
    seed_B = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), index_B.shape)
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed_B, index_B)


def masked_share(progress: Float[Array, ...], schedule: Schedule) -> Float[Array, ...]:
    """γ(progress): the share of the unknown tokens still masked; γ(0) = 1, γ(1) = 0."""
    match schedule:
        case 'cosine':
            return jnp.cos(0.5 * jnp.pi * progress)
        case 'linear':
            return 1.0 - progress
        case 'square':
            return 1.0 - jnp.square(progress)
    raise UserError(f"mask schedule is {schedule!r}; choose 'cosine', 'linear' or 'square'")


def masked_counts(unknown_B: Int[Array, ' B'], steps: int, schedule: Schedule) -> Int[Array, 'K B']:
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
    key_B: Key[Array, ' B'], logits_BTV: Float[Array, 'B T V'], temperature: float | Array
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
    """Draws a token at each position, with its log-probability at temperature 1.

    Noise and logits are float32: bf16 Gumbel noise flattens the tail of the distribution. Temperature 0 takes the
    most likely token.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    noise_BTV = jax.vmap(lambda k: jax.random.gumbel(k, logits_BTV.shape[1:], jnp.float32))(key_B)
    tok_BT = jnp.argmax(logits_BTV + temperature * noise_BTV, axis=-1).astype(jnp.int32)
    chosen_BT = jnp.take_along_axis(logits_BTV, tok_BT[..., None], axis=-1)[..., 0]
    return tok_BT, chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def lowest(
    score_BT: Float[Array, 'B T'], among_BT: Bool[Array, 'B T'], count_B: Int[Array, ' B']
) -> Bool[Array, 'B T']:
    """Marks exactly `count_B` of the positions `among_BT` of each row: those of lowest score, ties by position."""
    positions_BT = jnp.broadcast_to(jnp.arange(score_BT.shape[1]), score_BT.shape)
    order_BT = jax.lax.sort((~among_BT, score_BT, positions_BT), dimension=1, num_keys=2)[2]
    rank_BT = jnp.argsort(order_BT, axis=1)
    return rank_BT < count_B[:, None]


def decode(
    logits_fn: LogitsFn,
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    keys_B: Key[Array, ' B'],
    *,
    steps: int,
    temperature: float | Array = 1.0,
    choice_temperature: float | Array = 4.5,
    schedule: Schedule = 'cosine',
) -> Int[Array, 'B T']:
    """Fills the tokens that are not kept.

    Args:
        logits_fn: (tok_BT with MASK = V at the unknown, progress in [0, 1]) → guided logits over the V codes.
        canvas_BT: token ids; what stands where `keep_BT` is False does not matter.
        keep_BT: True where a token is known.
        keys_B: one noise key a row (`row_keys`).
        steps: K; rows with fewer unknown tokens than steps are done early.
        temperature: of the token's softmax; 0 is greedy.
        choice_temperature: of the Gumbel noise on the confidence, annealed linearly to 0 at the last step.
        schedule: share of the unknown tokens that stays masked over the steps.

    Returns:
        int32 ids, no MASK among them.

    Raises:
        UserError: fewer than one step, or an unknown schedule.
    """
    if steps < 1:
        raise UserError(f'steps is {steps}; decoding needs at least 1')
    progress_K = np.linspace(0, 1, steps, dtype=np.float32) if steps > 1 else np.ones(1, np.float32)
    mask_id = jax.eval_shape(logits_fn, canvas_BT, jax.ShapeDtypeStruct((), jnp.float32)).shape[-1]
    left_KB = masked_counts(jnp.sum(~keep_BT, axis=1), steps, schedule)

    def step(carry, slices):
        tok_BT, unknown_BT = carry
        index, progress, left_B = slices
        step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, index)
        token_keys_B, choice_keys_B = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 2))(step_keys_B), 1, 0)
        sampled_BT, confidence_BT = sample_tokens(token_keys_B, logits_fn(tok_BT, progress), temperature)
        noise_BT = jax.vmap(lambda k: jax.random.gumbel(k, tok_BT.shape[1:], jnp.float32))(choice_keys_B)
        score_BT = confidence_BT + choice_temperature * (1.0 - progress) * noise_BT
        masked_BT = lowest(score_BT, unknown_BT, left_B)
        tok_BT = jnp.where(unknown_BT, jnp.where(masked_BT, mask_id, sampled_BT), tok_BT)
        return (tok_BT, masked_BT), None

    start = (jnp.where(keep_BT, canvas_BT, mask_id).astype(jnp.int32), ~keep_BT)
    return jax.lax.scan(step, start, (jnp.arange(steps), progress_K, left_KB))[0][0]
