"""GPU kernels of attention over few keys, with the norms of queries and keys inside: a candidate beside cuDNN's.

All keys of a row fit into one program, so that its softmax needs no second look, and the backward pass needs nothing of
the forward one: it makes queries' and keys' norms and the weights again, and the gradients of all three and of both
norms' scales in one pass over memory; or (`SPLITS`, a candidate) queries' and keys' gradients in two kernels, of which
more fit onto a processor. Multi-axis attention is the same kernel over rows that lie apart: nothing is copied into the
order of blocks or out of it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from muse.nn.devices import ROWS, mesh_split, platform

ATTENTION_KERNEL = 'attention_forward'  # the name of the forward pass in a program
_KEYS = (16, 256)
_HEADS = (16, 64)


class Turn(NamedTuple):
    """A backward pass in one kernel: so many `queries` a turn, in so many `warps`; what a turn reads is asked for
    `stages` - 1 turns ahead."""

    queries: int
    warps: int
    stages: int = 1


class Split(NamedTuple):
    """A backward pass in two kernels, each of fewer registers a program than one for both.

    `queries` of a turn in the first one, whose programs take 1/`programs` of a row's queries, against all keys, in so
    many `warps`. `keys` of a program in the second one, against `key_queries` a turn, in `key_warps`. Stages as `Turn`.
    """

    queries: int
    programs: int
    warps: int
    keys: int
    key_queries: int
    key_warps: int
    stages: int = 1
    key_stages: int = 1


# Up to so many keys: what leaves registers for the gradients of the keys and values.
TURNS = {64: Turn(64, 4), 128: Turn(64, 8), 256: Turn(32, 8)}
SPLITS: dict[int, Split] = {}  # as TURNS; where it has no entry, one kernel makes all gradients
_NEVER = -1e30  # a logit of what must not be seen


def fits(q_BTNH: Array, k_BSNH: Array, groups: int = 1) -> bool:
    """Whether the kernels take these shapes: powers of two, all keys of a group in one program."""
    keys, queries, head = k_BSNH.shape[1] // groups, q_BTNH.shape[1] // groups, q_BTNH.shape[-1]
    powers = all(n & (n - 1) == 0 for n in (keys, head))
    sizes = _KEYS[0] <= keys <= _KEYS[1] and _HEADS[0] <= head <= _HEADS[1]
    square = groups == 1 or q_BTNH.shape[1] == groups**2
    return powers and sizes and square and queries > 0 and queries % _turn(keys).queries == 0


def _turn(keys: int) -> Turn:
    turn = next(turn for most, turn in TURNS.items() if keys <= most)
    return turn._replace(queries=min(turn.queries, keys))


def _split(queries: int, keys: int) -> Split | None:
    """The setting for so many keys, with no more of anything than there is."""
    split = next((split for most, split in SPLITS.items() if keys <= most), None)
    if split is None:
        return None
    turn, key_turn = math.gcd(split.queries, queries), math.gcd(split.key_queries, queries)
    programs = math.gcd(split.programs, queries // turn)
    return split._replace(queries=turn, programs=programs, keys=min(split.keys, keys), key_queries=key_turn)


def normed_attention(
    q_BTNH: Float[Array, 'B T N H'],
    k_BSNH: Float[Array, 'B S N H'],
    v_BSNH: Float[Array, 'B S N H'],
    query_scale_H: Float[Array, ' H'],
    key_scale_H: Float[Array, ' H'] | None,
    lengths_B: Int[Array, ' B'],
    *,
    scale: float,
    epsilon: float,
    groups: int = 1,
) -> Float[Array, 'B T N H']:
    """Attention of queries and keys behind their root-mean-square norms.

    Args:
        q_BTNH, k_BSNH, v_BSNH: before the norms; of shapes that `fits`.
        query_scale_H, key_scale_H: of the norms; None for keys that are normed already.
        lengths_B: how many keys of each row are real, at least 1; with `groups`, of each group.
        scale: factor on q·k.
        epsilon: of the norms.
        groups: 1, or the number G of blocks of multi-axis attention, which is also the number of tokens of a block: an
            even head attends within token runs G·g … G·g + G − 1, an odd one across tokens g, G + g, 2·G + g …
    """
    options = _Options(scale, epsilon, groups, normed=key_scale_H is None)

    def run(*arrays: Array) -> Array:
        return _attention(*arrays, options)

    scales = (query_scale_H, query_scale_H if key_scale_H is None else key_scale_H)
    rows, heads = mesh_split(q_BTNH.shape[0], *ROWS), mesh_split(q_BTNH.shape[2], 'tensor')
    if rows is None and heads is None:
        return run(q_BTNH, k_BSNH, v_BSNH, *scales, lengths_B)
    spec = P(rows, None, heads, None)
    mapped = jax.shard_map(run, in_specs=(spec, spec, spec, P(), P(), P(rows)), out_specs=spec, check_vma=False)
    return mapped(q_BTNH, k_BSNH, v_BSNH, *scales, lengths_B)


class _Options(NamedTuple):
    scale: float
    epsilon: float
    groups: int
    normed: bool  # whether the keys are already


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, query_scale, key_scale, lengths, options):
    return _forward(q, k, v, query_scale, key_scale, lengths, options)


def _attention_forward(q, k, v, query_scale, key_scale, lengths, options):
    return _forward(q, k, v, query_scale, key_scale, lengths, options), (q, k, v, query_scale, key_scale, lengths)


def _attention_backward(options, residuals, grad):
    q, k = residuals[:2]
    split = _split(q.shape[1] // options.groups, k.shape[1] // options.groups)
    if split is None:
        dq, dk, dv, query_parts, key_parts = _backward(*residuals, grad, options)
    else:
        dq, *of_queries, query_parts = _backward_queries(*residuals, grad, options, split)
        dk, dv, key_parts = _backward_keys(*of_queries, *residuals[1:3], *residuals[4:], grad, options, split)
    parts = zip((query_parts, key_parts), residuals[3:5], strict=True)
    return dq, dk, dv, *(_sum_of_parts(x).astype(scale.dtype) for x, scale in parts), None


def _sum_of_parts(parts: Float[Array, 'B P N H']) -> Float[Array, ' H']:
    """Row by row first, and not merged into one sum, for which the compiler would take a single thread block."""
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(parts, axis=(1, 2))), axis=0)


_attention.defvjp(_attention_forward, _attention_backward)


def _dot(a: Array, b: Array, along_a: int, along_b: int) -> Array:
    return jax.lax.dot_general(a, b, (((along_a,), (along_b,)), ((), ())), preferred_element_type=jnp.float32)


def _inverse(x32: Array, epsilon: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + epsilon)


def _norm(x: Array, scale_H: Array, epsilon: float) -> Array:
    x32 = x.astype(jnp.float32)
    return (x32 * _inverse(x32, epsilon) * scale_H[None, :]).astype(x.dtype)


def _through_norm(place, scale, grad, epsilon):
    """`_norm_gradients` of what is loaded again from its place: registers cannot hold it meanwhile."""
    from jax.experimental.pallas import triton

    return _norm_gradients(triton.load(place, volatile=True), scale, grad, epsilon)


def _norm_gradients(x: Array, scale_H: Array, grad: Array, epsilon: float) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    inverse = _inverse(x32, epsilon)
    scaled = grad * scale_H[None, :]
    along = jnp.mean(scaled * x32, axis=1, keepdims=True) * inverse * inverse
    return inverse * (scaled - x32 * along), jnp.sum(grad * x32 * inverse, axis=0)


def _places(group: Array, head: Array, groups: int, first: Array | int, count: int) -> Array:
    """Tokens number `first` and following of a group: one after another, or for odd heads one of each block."""
    numbers = first + jnp.arange(count)
    if groups == 1:
        return numbers
    across = head % 2
    return group * (across + (1 - across) * groups) + numbers * (across * groups + 1 - across)


def _weights_transposed(k: Array, q: Array, length: Array, scale: float) -> Array:
    """Softmax over the keys, `[keys, queries]`."""
    logits = _dot(k, q, 1, 1) * (scale * math.log2(math.e))
    logits = jnp.where((jnp.arange(k.shape[0]) < length)[:, None], logits, _NEVER)
    powers = jnp.exp2(logits - jnp.max(logits, axis=0)[None, :])
    return powers / jnp.sum(powers, axis=0)[None, :]


def _pallas(
    kernel: Any, grid: tuple[int, ...], inputs: tuple, out_shape: list, name: str, warps: int, stages: int = 1
) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=platform() == 'cpu',
        name=name,
    )(*inputs)


@partial(jax.jit, static_argnames='options')  # so that all layers are lowered once
def _forward(q, k, v, query_scale, key_scale, lengths, options):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scale, epsilon, groups, normed = options
    (rows, tokens, heads, width), keys = q.shape, k.shape[1] // groups
    queries = math.gcd(min(128 if keys > 64 else 64, tokens // groups), tokens // groups)

    def kernel(q_ref, k_ref, v_ref, query_scale_ref, key_scale_ref, lengths_ref, y_ref):
        turn, place, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        group, head = place // heads, place % heads
        columns = jnp.arange(width)[None, :]
        at_q = (row, _places(group, head, groups, turn * queries, queries)[:, None], head, columns)
        at_k = (row, _places(group, head, groups, 0, keys)[:, None], head, columns)
        q = _norm(triton.load(q_ref.at[at_q]), query_scale_ref[...], epsilon)
        k, v = triton.load(k_ref.at[at_k]), triton.load(v_ref.at[at_k])
        k = k if normed else _norm(k, key_scale_ref[...], epsilon)
        logits = _dot(q, k, 1, 1) * (scale * math.log2(math.e))
        logits = jnp.where((jnp.arange(keys) < lengths_ref[row])[None, :], logits, _NEVER)
        powers = jnp.exp2(logits - jnp.max(logits, axis=1)[:, None])
        weights = powers / jnp.sum(powers, axis=1)[:, None]
        triton.store(y_ref.at[at_q], _dot(weights.astype(v.dtype), v, 1, 0).astype(v.dtype))

    grid = (tokens // groups // queries, groups * heads, rows)
    inputs, out_shape = (q, k, v, query_scale, key_scale, lengths), [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    return _pallas(kernel, grid, inputs, out_shape, ATTENTION_KERNEL, warps=8 if keys > 128 else 4)[0]


@partial(jax.jit, static_argnames='options')  # so that all layers are lowered once
def _backward(q, k, v, query_scale, key_scale, lengths, grad, options):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scale, epsilon, groups, normed = options
    (rows, tokens, heads, width), keys = q.shape, k.shape[1] // groups
    queries, warps, stages = _turn(keys)

    def kernel(
        q_ref, k_ref, v_ref, query_scale_ref, key_scale_ref, lengths_ref, grad_ref,
        dq_ref, dk_ref, dv_ref, query_part_ref, key_part_ref,
    ):  # fmt: skip
        place, row = pl.program_id(0), pl.program_id(1)
        group, head = place // heads, place % heads
        columns, length = jnp.arange(width)[None, :], lengths_ref[row]
        query_scale, key_scale = query_scale_ref[...], key_scale_ref[...]
        at_k = (row, _places(group, head, groups, 0, keys)[:, None], head, columns)
        k, v = triton.load(k_ref.at[at_k]), triton.load(v_ref.at[at_k])
        normed_k = k if normed else _norm(k, key_scale, epsilon)

        def turn(i, sums):
            dk, dv, query_part = sums
            at_q = (row, _places(group, head, groups, i * queries, queries)[:, None], head, columns)
            q, grad = triton.load(q_ref.at[at_q]), triton.load(grad_ref.at[at_q])
            normed_q = _norm(q, query_scale, epsilon)
            weights = _weights_transposed(normed_k, normed_q, length, scale)
            dv = dv + _dot(weights.astype(v.dtype), grad, 1, 0)
            dweights = _dot(v, grad, 1, 1)
            dlogits = weights * (dweights - jnp.sum(weights * dweights, axis=0)[None, :]) * scale
            dlogits = dlogits.astype(q.dtype)
            dk = dk + _dot(dlogits, normed_q, 1, 0)
            dq, part = _norm_gradients(q, query_scale, _dot(dlogits, normed_k, 0, 0), epsilon)
            triton.store(dq_ref.at[at_q], dq.astype(q.dtype))
            return dk, dv, query_part + part

        nothing, no_part = jnp.zeros((keys, width), jnp.float32), jnp.zeros((width,), jnp.float32)
        turns = tokens // groups // queries
        dk, dv, query_part = jax.lax.fori_loop(0, turns, turn, (nothing, nothing, no_part))
        dk, key_part = (dk, no_part) if normed else _through_norm(k_ref.at[at_k], key_scale, dk, epsilon)
        triton.store(dk_ref.at[at_k], dk.astype(k.dtype))
        triton.store(dv_ref.at[at_k], dv.astype(v.dtype))
        at_part = (row, group, head, jnp.arange(width))
        triton.store(query_part_ref.at[at_part], query_part)
        triton.store(key_part_ref.at[at_part], key_part)

    parts = jax.ShapeDtypeStruct((rows, groups, heads, width), jnp.float32)
    out_shape = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)), parts, parts]
    inputs = (q, k, v, query_scale, key_scale, lengths, grad)
    return _pallas(kernel, (groups * heads, rows), inputs, out_shape, 'attention_backward', warps, stages)


@partial(jax.jit, static_argnames=('options', 'split'))  # so that all layers are lowered once
def _backward_queries(q, k, v, query_scale, key_scale, lengths, grad, options, split):
    """Gradients of the queries; their norms, and what a query's weights need to be made again from one logit alone:
    the logarithm of the sum of its powers of two, and the sum of its weights' gradients times them; parts of the
    gradient of the norm's scale."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scale, epsilon, groups, normed = options
    (rows, tokens, heads, width), keys = q.shape, k.shape[1] // groups
    turns = tokens // groups // split.queries // split.programs

    def kernel(
        q_ref, k_ref, v_ref, query_scale_ref, key_scale_ref, lengths_ref, grad_ref,
        dq_ref, normed_ref, logarithm_ref, along_ref, part_ref,
    ):  # fmt: skip
        program, place, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        group, head = place // heads, place % heads
        columns = jnp.arange(width)[None, :]
        query_scale, seen = query_scale_ref[...], (jnp.arange(keys) < lengths_ref[row])[None, :]
        at_k = (row, _places(group, head, groups, 0, keys)[:, None], head, columns)
        k, v = triton.load(k_ref.at[at_k]), triton.load(v_ref.at[at_k])
        k = k if normed else _norm(k, key_scale_ref[...], epsilon)

        def turn(i, part):
            first = (program * turns + i) * split.queries
            at_q = (row, _places(group, head, groups, first, split.queries)[:, None], head, columns)
            q, grad = triton.load(q_ref.at[at_q]), triton.load(grad_ref.at[at_q])
            normed_q = _norm(q, query_scale, epsilon)
            logits = jnp.where(seen, _dot(normed_q, k, 1, 1) * (scale * math.log2(math.e)), _NEVER)
            most = jnp.max(logits, axis=1)
            logarithm = most + jnp.log2(jnp.sum(jnp.exp2(logits - most[:, None]), axis=1))
            weights = jnp.exp2(logits - logarithm[:, None])
            dweights = _dot(grad, v, 1, 1)
            along = jnp.sum(weights * dweights, axis=1)
            dlogits = (weights * (dweights - along[:, None]) * scale).astype(q.dtype)
            dq, more = _norm_gradients(q, query_scale, _dot(dlogits, k, 1, 0), epsilon)
            triton.store(dq_ref.at[at_q], dq.astype(q.dtype))
            triton.store(normed_ref.at[at_q], normed_q)
            at_sum = (row, place, first + jnp.arange(split.queries))
            triton.store(logarithm_ref.at[at_sum], logarithm)
            triton.store(along_ref.at[at_sum], along)
            return part + more

        part = jax.lax.fori_loop(0, turns, turn, jnp.zeros((width,), jnp.float32))
        triton.store(part_ref.at[row, program, place, jnp.arange(width)], part)

    of_q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    sums = jax.ShapeDtypeStruct((rows, groups * heads, tokens // groups), jnp.float32)
    parts = jax.ShapeDtypeStruct((rows, split.programs, groups * heads, width), jnp.float32)
    grid, inputs = (split.programs, groups * heads, rows), (q, k, v, query_scale, key_scale, lengths, grad)
    out_shape = [of_q, of_q, sums, sums, parts]
    return _pallas(kernel, grid, inputs, out_shape, 'attention_backward_queries', split.warps, split.stages)


@partial(jax.jit, static_argnames=('options', 'split'))  # so that all layers are lowered once
def _backward_keys(normed_q, logarithms, alongs, k, v, key_scale, lengths, grad, options, split):
    """Gradients of the keys and values, and parts of the gradient of the keys' norm's scale."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scale, epsilon, groups, normed = options
    (rows, tokens, heads, width), keys = normed_q.shape, k.shape[1] // groups

    def kernel(
        q_ref, logarithm_ref, along_ref, k_ref, v_ref, key_scale_ref, lengths_ref, grad_ref,
        dk_ref, dv_ref, part_ref,
    ):  # fmt: skip
        program, place, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        group, head = place // heads, place % heads
        first, columns, key_scale = program * split.keys, jnp.arange(width)[None, :], key_scale_ref[...]
        seen = (first + jnp.arange(split.keys) < lengths_ref[row])[:, None]
        at_k = (row, _places(group, head, groups, first, split.keys)[:, None], head, columns)
        k, v = triton.load(k_ref.at[at_k]), triton.load(v_ref.at[at_k])
        normed_k = k if normed else _norm(k, key_scale, epsilon)

        def turn(i, sums):
            dk, dv = sums
            first = i * split.key_queries
            at_q = (row, _places(group, head, groups, first, split.key_queries)[:, None], head, columns)
            q, grad = triton.load(q_ref.at[at_q]), triton.load(grad_ref.at[at_q])
            at_sum = (row, place, first + jnp.arange(split.key_queries))
            logits = _dot(normed_k, q, 1, 1) * (scale * math.log2(math.e))
            logits = logits - triton.load(logarithm_ref.at[at_sum])[None, :]
            weights = jnp.exp2(jnp.where(seen, logits, _NEVER))
            dv = dv + _dot(weights.astype(v.dtype), grad, 1, 0)
            dlogits = weights * (_dot(v, grad, 1, 1) - triton.load(along_ref.at[at_sum])[None, :]) * scale
            return dk + _dot(dlogits.astype(q.dtype), q, 1, 0), dv

        nothing, no_part = jnp.zeros((split.keys, width), jnp.float32), jnp.zeros((width,), jnp.float32)
        dk, dv = jax.lax.fori_loop(0, tokens // groups // split.key_queries, turn, (nothing, nothing))
        dk, part = (dk, no_part) if normed else _through_norm(k_ref.at[at_k], key_scale, dk, epsilon)
        triton.store(dk_ref.at[at_k], dk.astype(k.dtype))
        triton.store(dv_ref.at[at_k], dv.astype(v.dtype))
        triton.store(part_ref.at[row, program, place, jnp.arange(width)], part)

    programs = keys // split.keys
    parts = jax.ShapeDtypeStruct((rows, programs, groups * heads, width), jnp.float32)
    out_shape = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)), parts]
    inputs = (normed_q, logarithms, alongs, k, v, key_scale, lengths, grad)
    grid = (programs, groups * heads, rows)
    return _pallas(kernel, grid, inputs, out_shape, 'attention_backward_keys', split.key_warps, split.key_stages)
