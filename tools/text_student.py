"""The student's side of the distillation: data on the device, the three losses, and a training loop over the clock."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.config import T5Config
from muse.models.t5 import T5Encoder
from muse.nn.layers import Linear
from muse.text.tokenizer import Tokenizer
from tools.text_teacher import Lessons

MAX_WORDS = 24
NEIGHBOURS = (-2, -1, 1, 2)
HELD_OUT = 100  # one text in so many is never trained on
TEMPERATURE = 0.05  # of the similarities
STEPS_A_CALL = 50
# Share of each kind in a batch.
KIND_SHARES = {'caption': 0.3, 'gloss': 0.2, 'definition': 0.15, 'word': 0.25, 'label': 0.1}


class Data(NamedTuple):
    """The corpus and its lessons; texts of a kind lie together."""

    ids_NS: Int[Array, 'N S']
    word_NS: Int[Array, 'N S']  # word of each piece; -1 for </s> and pads
    len_N: Int[Array, ' N']
    offset_N: Int[Array, ' N']  # first row of the text in `words`
    covered_N: Int[Array, ' N']  # words the teacher saw
    pooled_NE: Float[Array, 'N E']
    words_WE: Float[Array, 'W E']
    mean_E: Float[Array, ' E']  # of the teacher's word states
    std_E: Float[Array, ' E']
    kinds: Int[Array, 'kinds 2']  # first text and number of texts of each kind
    shares: Float[Array, ' kinds']


def prepare(corpus: list[tuple[str, str]], tokenizer: Tokenizer, lessons: Lessons, length: int) -> Data:
    """Tokenises the corpus and moves all of it to the device."""
    ids_NS, word_NS = np.zeros((len(corpus), length), np.int32), np.full((len(corpus), length), -1, np.int32)
    len_N = np.zeros(len(corpus), np.int32)
    for row, (_, text) in enumerate(corpus):
        pieces = tokenizer.word_ids(text)[: length - 1]
        len_N[row] = len(pieces) + 1
        ids_NS[row, : len_N[row]] = [token for token, _ in pieces] + [tokenizer.eos_id]
        word_NS[row, : len(pieces)] = [word for _, word in pieces]
    names = list(dict.fromkeys(kind for kind, _ in corpus))
    kind_N = np.array([names.index(kind) for kind, _ in corpus])
    first = np.searchsorted(kind_N, np.arange(len(names)))
    counts = np.bincount(kind_N, minlength=len(names))
    sample = np.asarray(lessons.words[:: max(1, len(lessons.words) // 50_000)], np.float32)
    shares = np.array([KIND_SHARES[name] for name in names], np.float32)
    return Data(
        ids_NS=jnp.asarray(ids_NS),
        word_NS=jnp.asarray(word_NS),
        len_N=jnp.asarray(len_N),
        offset_N=jnp.asarray(lessons.offsets[:-1].astype(np.int32)),
        covered_N=jnp.asarray(np.diff(lessons.offsets).astype(np.int32)),
        pooled_NE=jnp.asarray(lessons.pooled),
        words_WE=jnp.asarray(lessons.words),
        mean_E=jnp.asarray(sample.mean(0)),
        std_E=jnp.asarray(sample.std(0) + 1e-3),
        kinds=jnp.asarray(np.stack([first, counts], 1).astype(np.int32)),
        shares=jnp.asarray(shares / shares.sum()),
    )


class Student(nnx.Module):
    """The encoder and the maps onto the teacher's width, which are dropped after training."""

    def __init__(self, config: T5Config, teacher_width: int, *, rngs: nnx.Rngs):
        self.encoder = T5Encoder(config, rngs=rngs)
        self.word_head = Linear(config.width, teacher_width, ('embed', None), rngs=rngs, use_bias=True)
        neighbours = len(NEIGHBOURS) * teacher_width
        self.neighbour_head = Linear(config.width, neighbours, ('embed', None), rngs=rngs, use_bias=True)
        self.pooled_head = Linear(config.width, teacher_width, ('embed', None), rngs=rngs, use_bias=True)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def _targets(data: Data, rows_B: Array, word_BX: Array) -> tuple[Array, Array]:
    """The teacher's standardised states of some words of each text, and which of these words exist."""
    real_BX = (word_BX >= 0) & (word_BX < data.covered_N[rows_B][:, None])
    place_BX = jnp.where(real_BX, data.offset_N[rows_B][:, None] + word_BX, 0)
    return (data.words_WE[place_BX].astype(jnp.float32) - data.mean_E) / data.std_E, real_BX


def _word_losses(student: Student, data: Data, rows_B: Array, x_BSD: Array) -> tuple[Array, Array]:
    """1 − R² of the teacher's states of each word, and of its neighbours, read linearly off the student's."""
    member_BWS = (data.word_NS[rows_B][:, None, :] == jnp.arange(MAX_WORDS)[:, None]).astype(jnp.float32)
    pieces_BW = member_BWS.sum(-1)
    means_BWD = member_BWS @ x_BSD / jnp.maximum(pieces_BW, 1)[..., None]
    word_BW = jnp.broadcast_to(jnp.arange(MAX_WORDS), pieces_BW.shape)
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


def losses(student: Student, data: Data, rows_B: Int[Array, ' B']) -> dict[str, Array]:
    """The losses over the texts `rows_B`: 'words' and 'neighbours' (1 − R²), 'pooled' (1 − cosine), 'relations' (nats).

    A word's own state at the teacher hardly depends on what stands beside it; the neighbours make the student's do so,
    so that 'red ball' can be told from 'blue ball' by the ball alone.
    """
    len_B = data.len_N[rows_B]
    x_BSD = student.encoder(data.ids_NS[rows_B], len_B).astype(jnp.float32)
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


def total(parts: dict[str, Array]) -> Array:
    """What is minimised."""
    return parts['words'] + parts['neighbours'] + 2 * parts['pooled'] + parts['relations']


def draw_rows(key: Array, data: Data, batch: int) -> Int[Array, ' B']:
    """Random texts that are not held out, by the shares of the kinds."""
    kind_key, row_key = jax.random.split(key)
    kind_B = jax.random.choice(kind_key, len(data.shares), (batch,), p=data.shares)
    first_B, count_B = data.kinds[kind_B, 0], data.kinds[kind_B, 1]
    rows_B = first_B + (jax.random.uniform(row_key, (batch,)) * count_B).astype(jnp.int32)
    return jnp.where(rows_B % HELD_OUT == 0, jnp.abs(rows_B - 1), rows_B)


_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98), optax.add_decayed_weights(0.01)
)


def make_steps(graphdef: Any, batch: int) -> Any:
    """Jitted (params, optimizer state, data, key, learning rate) → the first two after some steps, mean losses."""

    def steps(params, state, data, key, rate):
        def step(carry, key):
            params, state = carry
            rows_B = draw_rows(key, data, batch)

            def loss(params):
                parts = losses(nnx.merge(graphdef, params), data, rows_B)
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
    evaluate = jax.jit(lambda params, data, rows_B: losses(nnx.merge(graphdef, params), data, rows_B))
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
        dataclasses.replace(config, dtype=dtype), data.words_WE.shape[1], rngs=nnx.Rngs(params=jax.random.key(seed))
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
            speed = (done - STEPS_A_CALL) * batch / max(time.monotonic() - start, 1e-9)
            print(f'step {done}  {progress:4.0%}  {shown}  {speed:.0f} texts/s', flush=True)
        progress = done / steps if steps else (time.monotonic() - start) / (60 * minutes)
    report = {'steps': done, **held_out(graphdef, params, data, batch)}
    print(f'held out after {done} steps: {report}', flush=True)
    encoder = T5Encoder(config, rngs=nnx.Rngs(params=0))
    nnx.update(encoder, nnx.state(nnx.merge(graphdef, params).encoder, nnx.Param))
    return encoder, report
