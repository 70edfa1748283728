"""The student's side of the distillation: its losses, and a loop over steps or the clock."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int

from muse.config import T5Config
from muse.models.t5 import T5Encoder
from muse.nn.layers import Linear
from tools.text_binding import PLACES
from tools.text_data import HELD_OUT, MAX_WORDS, SHORT, Data, Group, Meanings, Triples

NEIGHBOURS = (-2, -1, 1, 2)
TEMPERATURE = 0.05  # of the similarities
STEPS_A_CALL = 50
# For each long text of a batch: short ones, and shares of it that are triples and meanings.
SHORT_TEXTS, TRIPLES_SHARE, MEANINGS_SHARE = 3, 4, 2
MARGIN, SOFTNESS = 0.3, 0.05  # of the cosines of triples


class Student(nnx.Module):
    """The encoder and the maps onto the teacher's width and onto attributes, which are dropped after training."""

    def __init__(self, config: T5Config, teacher_width: int, attributes: int, *, rngs: nnx.Rngs):
        self.encoder = T5Encoder(config, rngs=rngs)
        self.word_head = Linear(config.width, teacher_width, ('embed', None), rngs=rngs, use_bias=True)
        neighbours = len(NEIGHBOURS) * teacher_width
        self.neighbour_head = Linear(config.width, neighbours, ('embed', None), rngs=rngs, use_bias=True)
        self.pooled_head = Linear(config.width, teacher_width, ('embed', None), rngs=rngs, use_bias=True)
        self.attribute_head = Linear(config.width, attributes, ('embed', None), rngs=rngs, use_bias=True)
        self.place_head = Linear(config.width, len(PLACES), ('embed', None), rngs=rngs, use_bias=True)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def _targets(data: Data, rows_B: Array, word_BX: Array) -> tuple[Array, Array]:
    """The teacher's standardised states of some words of each text, and which of these words exist."""
    real_BX = (word_BX >= 0) & (word_BX < data.covered_N[rows_B][:, None])
    place_BX = jnp.where(real_BX, data.offset_N[rows_B][:, None] + word_BX, 0)
    return (data.words_WE[place_BX].astype(jnp.float32) - data.mean_E) / data.std_E, real_BX


def _word_losses(student: Student, data: Data, rows_B: Array, x_BSD: Array) -> tuple[Array, Array]:
    """1 − R² of the teacher's states of each word, and of its neighbours, read linearly off the student's."""
    length = x_BSD.shape[1]
    words = min(MAX_WORDS, length)
    member_BWS = (data.word_NS[rows_B][:, None, :length] == jnp.arange(words)[:, None]).astype(jnp.float32)
    pieces_BW = member_BWS.sum(-1)
    means_BWD = member_BWS @ x_BSD / jnp.maximum(pieces_BW, 1)[..., None]
    word_BW = jnp.broadcast_to(jnp.arange(words), pieces_BW.shape)
    target_BWE, real_BW = _targets(data, rows_B, word_BW)

    def mean_error(found, target, real):
        return jnp.sum(jnp.square(found - target).mean(-1) * real) / jnp.maximum(real.sum(), 1)

    real_BW &= pieces_BW > 0
    own = mean_error(student.word_head(means_BWD), target_BWE, real_BW)
    found_BWOE = student.neighbour_head(means_BWD).reshape(*word_BW.shape, len(NEIGHBOURS), -1)
    others = []
    for index, offset in enumerate(NEIGHBOURS):
        neighbour_BWE, known_BW = _targets(data, rows_B, word_BW + offset)
        others.append(mean_error(found_BWOE[:, :, index], neighbour_BWE, known_BW & real_BW))
    return own, jnp.stack(others).mean()


def losses(student: Student, data: Data, rows_B: Int[Array, ' B'], length: int) -> dict[str, Array]:
    """The losses over the texts `rows_B`: 'words' and 'neighbours' (1 − R²), 'pooled' (1 − cosine), 'relations' (nats).

    None of the texts has more than `length` pieces.

    A word's own state at the teacher hardly depends on what stands beside it; the neighbours make the student's do so,
    so that 'red ball' can be told from 'blue ball' by the ball alone.
    """
    len_B = data.len_N[rows_B]
    x_BSD = student.encoder(data.ids_NS[rows_B][:, :length], len_B).astype(jnp.float32)
    mean_BD = x_BSD.sum(1) / len_B[:, None]  # states behind the end are zero
    words, neighbours = _word_losses(student, data, rows_B, x_BSD)

    pooled_BE = data.pooled_NE[rows_B].astype(jnp.float32)
    cosine_B = jnp.sum(_unit(student.pooled_head(mean_BD)) * pooled_BE, -1)

    # A text is no neighbour of itself, nor of its copies in the batch.
    same_BB = rows_B[:, None] == rows_B[None]
    units_BD = _unit(mean_BD)
    theirs_BB, ours_BB = (
        jax.nn.log_softmax(jnp.where(same_BB, -1e9, x @ x.T / TEMPERATURE)) for x in (pooled_BE, units_BD)
    )
    relations = jnp.sum(jnp.exp(theirs_BB) * jnp.where(same_BB, 0, theirs_BB - ours_BB), -1).mean()
    return {'words': words, 'neighbours': neighbours, 'pooled': 1 - cosine_B.mean(), 'relations': relations}


def binding_losses(student: Student, triples: Triples) -> dict[str, Array]:
    """The losses over triples: 'swaps' (cosine), 'attributes' and 'places' (nats).

    The states of a thing's noun must be nearer to those of the same scene in other words than to those of the scene
    that was changed, by a margin; and the thing's own attribute and place can be read linearly off them.
    """
    ids_BS = triples.ids_M3S.reshape(-1, triples.ids_M3S.shape[-1])
    x_M3SD = student.encoder(ids_BS, triples.len_M3.reshape(-1)).astype(jnp.float32)
    x_M3SD = x_M3SD.reshape(*triples.ids_M3S.shape, -1)
    x_M32D = triples.member_M32S @ x_M3SD
    units_M32D = _unit(x_M32D)
    same_M2, other_M2 = (jnp.sum(units_M32D[:, 0] * units_M32D[:, i], -1) for i in (1, 2))
    swaps = SOFTNESS * jax.nn.softplus((other_M2 - same_M2 + MARGIN) / SOFTNESS).mean()

    def nats(logits_M32C, label_M32):
        found_M32 = jnp.take_along_axis(jax.nn.log_softmax(logits_M32C), label_M32[..., None], -1)[..., 0]
        known_M32 = label_M32 >= 0
        return -jnp.sum(found_M32 * known_M32) / jnp.maximum(known_M32.sum(), 1)

    return {
        'swaps': swaps,
        'attributes': nats(student.attribute_head(x_M32D), triples.attribute_M32),
        'places': nats(student.place_head(x_M32D), triples.place_M32),
    }


def meaning_loss(student: Student, meanings: Meanings) -> Array:
    """Nats of finding each word among the batch's by its definition, and each definition by its word."""

    def units(ids_KS, len_K):
        return _unit(student.encoder(ids_KS, len_K).astype(jnp.float32).sum(1))

    words_KD = units(meanings.word_KS, meanings.word_len_K)
    similar_KK = units(meanings.text_KS, meanings.text_len_K) @ words_KD.T / TEMPERATURE
    found = (jnp.diagonal(jax.nn.log_softmax(similar_KK, axis)).mean() for axis in (0, 1))
    return -sum(found, jnp.zeros(())) / 2


def batch_losses(student: Student, data: Data, key: Array, batch: int) -> dict[str, Array]:
    """The losses over random short and long texts, triples and meanings."""
    short_key, long_key, triple_key, meaning_key = jax.random.split(key, 4)
    length = data.ids_NS.shape[1]
    short = losses(student, data, draw_rows(short_key, data.short, SHORT_TEXTS * batch), min(SHORT, length))
    long = losses(student, data, draw_rows(long_key, data.long, batch), length)
    triples = Triples(*_chosen(triple_key, data.triples, batch // TRIPLES_SHARE))
    meanings = Meanings(*_chosen(meaning_key, data.meanings, batch // MEANINGS_SHARE))
    both = {name: (short[name] + long[name]) / 2 for name in short}
    return both | binding_losses(student, triples) | {'meanings': meaning_loss(student, meanings)}


def _chosen(key: Array, arrays: tuple[Array, ...], count: int) -> list[Array]:
    """Random rows, the same of each array."""
    rows = jax.random.randint(key, (max(1, count),), 0, arrays[0].shape[0])
    return [array[rows] for array in arrays]


def total(parts: dict[str, Array]) -> Array:
    """What is minimised."""
    meaning = parts['words'] + parts['neighbours'] + 2 * parts['pooled'] + parts['relations']
    meaning += 0.5 * parts['meanings']
    return meaning + 2 * parts['swaps'] + 0.2 * (parts['attributes'] + parts['places'])


def draw_rows(key: Array, group: Group, batch: int) -> Int[Array, ' B']:
    """Random texts of a group, by the shares of the kinds."""
    kind_key, row_key = jax.random.split(key)
    kind_B = jax.random.choice(kind_key, len(group.shares), (batch,), p=group.shares)
    first_B, count_B = group.kinds[kind_B, 0], group.kinds[kind_B, 1]
    return group.rows_K[first_B + jax.random.randint(row_key, (batch,), 0, count_B)]


_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98), optax.add_decayed_weights(0.01)
)


def make_steps(graphdef: Any, batch: int) -> Any:
    """Jitted (params, optimizer state, data, key, learning rate) → the first two after some steps, mean losses."""

    def steps(params, state, data, key, rate):
        def step(carry, key):
            params, state = carry

            def loss(params):
                parts = batch_losses(nnx.merge(graphdef, params), data, key, batch)
                return total(parts), parts

            gradient, parts = jax.grad(loss, has_aux=True)(params)
            updates, state = _OPTIMIZER.update(gradient, state, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, state), parts

        (params, state), parts = jax.lax.scan(step, (params, state), jax.random.split(key, STEPS_A_CALL))
        return params, state, jax.tree.map(jnp.mean, parts)

    return jax.jit(steps, donate_argnums=(0, 1))


def held_out(graphdef: Any, params: Any, data: Data, batch: int) -> dict[str, float]:
    """Mean losses over the texts never trained on."""
    rows = np.arange(0, data.ids_NS.shape[0], HELD_OUT)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    batch = min(batch, len(rows))
    length = data.ids_NS.shape[1]
    evaluate = jax.jit(lambda params, data, rows_B: losses(nnx.merge(graphdef, params), data, rows_B, length))
    parts = [evaluate(params, data, rows[i : i + batch]) for i in range(0, len(rows) - batch + 1, batch)]
    return {name: float(np.mean([float(part[name]) for part in parts])) for name in parts[0]}


def train(
    config: T5Config,
    data: Data,
    *,
    batch: int,
    learning_rate: float,
    steps: int = 0,
    minutes: float = 0.0,
    dtype: str = 'float32',
    seed: int = 0,
) -> tuple[T5Encoder, dict[str, float]]:
    """Trains for `steps`, or for `minutes` when `steps` is 0. Returns the encoder and its held-out losses.

    The rate warms up over 2 % of the way and falls by a cosine to 0. By the clock, the way is the time gone by since
    compilation: such a run ends when it should on any machine, and is not repeatable to the bit.
    """
    student = Student(
        dataclasses.replace(config, dtype=dtype),
        data.words_WE.shape[1],
        int(data.triples.attribute_M32.max()) + 1,
        rngs=nnx.Rngs(params=jax.random.key(seed)),
    )
    graphdef, params = nnx.split(student, nnx.Param)
    state, run = _OPTIMIZER.init(params), make_steps(graphdef, batch)
    run_key, done, start, progress = jax.random.key(seed + 1), 0, time.monotonic(), 0.0
    while progress < 1:
        rate = learning_rate * min(max(progress, 2e-3) / 0.02, 1.0) * 0.5 * (1 + np.cos(np.pi * progress))
        params, state, parts = run(params, state, data, jax.random.fold_in(run_key, done), np.float32(rate))
        parts = {name: float(value) for name, value in parts.items()}
        if not np.isfinite(sum(parts.values())):
            raise FloatingPointError(f'loss is not finite at step {done}: {parts}')
        done += STEPS_A_CALL
        if done == STEPS_A_CALL:
            print(f'compiled and ran {done} steps in {time.monotonic() - start:.0f} s', flush=True)
            start = time.monotonic()
        if done % (10 * STEPS_A_CALL) == 0 or done == STEPS_A_CALL:
            shown = '  '.join(f'{name} {value:.4f}' for name, value in parts.items())
            speed = (done - STEPS_A_CALL) / max(time.monotonic() - start, 1e-9)
            print(f'step {done}  {progress:4.0%}  {shown}  {speed:.1f} steps/s', flush=True)
        progress = done / steps if steps else (time.monotonic() - start) / (60 * minutes)
    report = {'steps': done, **held_out(graphdef, params, data, batch)}
    print(f'held out after {done} steps: {report}', flush=True)
    encoder = T5Encoder(config, rngs=nnx.Rngs(params=0))
    nnx.update(encoder, nnx.state(nnx.merge(graphdef, params).encoder, nnx.Param))
    return encoder, report
