"""Parts of a layer between its products, forward and backward: XLA's and cuDNN's ways beside this project's kernels.

    python tools/bench.py parts                        at sizes of the paper's 632M base (batch 64) and super-res (8)
    python tools/bench.py parts --parts='sum and norm,self-attention' --chained=10
    python tools/bench.py parts --tiny --repeats=1     on a CPU, where the kernels are interpreted

Each line is one part in one way: milliseconds of the forward pass, and of both; the milliseconds that its arrays would
take at --terabytes a second; and how far results and gradients are from those of float32 (root of the mean square of
the difference, as a share), which for the kernels must be about what it is for the others. Without --chained a time may
be that of the host, which starts each call: it takes some hundredths of a millisecond, a busy one more.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from muse.errors import UserError
from muse.nn import attention_kernels, norm_kernels
from muse.nn.attention import attention
from muse.nn.attention_kernels import Split, Turn, normed_attention
from muse.nn.layers import gelu
from muse.nn.norm_kernels import Tiling
from muse.nn.norms import norm_after, rms_norm

_EPSILON = 1e-6
_TURNS = (*(Turn(*each) for each in ((16, 8), (32, 8), (32, 16), (64, 8), (64, 16))), Turn(32, 8, 2), Turn(64, 8, 2))
_QUERIES = ((16, 1, 8, 1), (16, 1, 8, 2), (16, 2, 8, 2), (32, 1, 8, 2), (32, 2, 8, 2), (64, 1, 8, 2))
_KEYS = (
    (64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2),
    (128, 32, 8, 2), (128, 64, 8, 2),
)  # fmt: skip


def _split(queries: tuple[int, int, int, int], keys: tuple[int, int, int, int]) -> Split:
    (turn, programs, warps, stages), (block, key_turn, key_warps, key_stages) = queries, keys
    return Split(turn, programs, warps, block, key_turn, key_warps, stages, key_stages)


# Each of queries' settings with one of keys', and the other way round: what a setting brings is that of its kernel.
_SPLITS = (*(_split(each, _KEYS[0]) for each in _QUERIES), *(_split(_QUERIES[1], each) for each in _KEYS[1:]))
_TILINGS = (  # of the norm's forward and backward pass: elements that a program holds, warps, tiles
    (Tiling(4096, 8, 1), Tiling(4096, 4, 2)),
    (Tiling(2048, 2, 1), Tiling(4096, 4, 4)),
    (Tiling(2048, 4, 1), Tiling(2048, 4, 8)),
    (Tiling(2048, 8, 1), Tiling(2048, 4, 16)),
    (Tiling(1024, 1, 1), Tiling(1024, 1, 8)),
    (Tiling(1024, 2, 1), Tiling(1024, 2, 8)),
    (Tiling(1024, 4, 1), Tiling(1024, 4, 16)),
    (Tiling(8192, 8, 1), Tiling(4096, 8, 4)),
)


class Way(NamedTuple):
    """How a part is computed; `norm_kernels` says which norms are used, None those of the chip; `settings` are
    constants of modules that are something else meanwhile."""

    call: Callable[..., Any]
    norm_kernels: bool | None = None
    settings: tuple[tuple[ModuleType, str, Any], ...] = ()


class Part(NamedTuple):
    """A way takes `inputs` and returns an array or two; the first one, without kernels, is run in float32 as well."""

    name: str
    inputs: tuple[tuple[int, ...], ...]  # shapes; those of one axis are scales, which stay float32
    ways: dict[str, Way]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--repeats', type=int, default=20, help='calls timed together')
    parser.add_argument('--terabytes', type=float, default=3.0, help='a second, of memory')
    parser.add_argument('--parts', default='', help='only these, with commas between')
    parser.add_argument('--chained', type=int, default=1, help='calls in one program, one after another')
    parser.add_argument('--tiny', action='store_true', help='sizes for a CPU')


def _plain_attention(groups: int, lengths: int | None, q: Any, k: Any, v: Any, query: Any, key: Any) -> Any:
    q, k = rms_norm(q, query, _EPSILON), rms_norm(k, key, _EPSILON)
    scale = q.shape[-1] ** -0.5
    if groups == 1:
        lengths_B = None if lengths is None else jnp.full(q.shape[0], lengths)
        return attention(q, k, v, lengths_B=lengths_B, scale=scale)
    rows, tokens, heads, width = q.shape
    x = [each.reshape(rows, groups, groups, heads // 2, 2, width) for each in (q, k, v)]
    local = [each[..., 0, :].reshape(-1, groups, heads // 2, width) for each in x]
    across = [each[..., 1, :].swapaxes(1, 2).reshape(-1, groups, heads // 2, width) for each in x]
    y_local, y_across = (
        attention(*each, scale=scale).reshape(rows, groups, groups, heads // 2, width) for each in (local, across)
    )
    return jnp.stack([y_local, y_across.swapaxes(1, 2)], axis=4).reshape(rows, tokens, heads, width)


def _own_attention(groups: int, lengths: int | None, q: Any, k: Any, v: Any, query: Any, key: Any) -> Any:
    lengths_B = jnp.full(q.shape[0], lengths or k.shape[1] // groups)
    options = {'scale': q.shape[-1] ** -0.5, 'epsilon': _EPSILON, 'groups': groups}
    return normed_attention(q, k, v, query, key, lengths_B, **options)


def parts(tiny: bool) -> Iterator[Part]:
    """Of one layer."""
    rows, tokens, heads, head, width, high = (2, 32, 2, 16, 128, 16) if tiny else (64, 256, 16, 64, 1024, 64)
    x = (rows, tokens, width)

    def after(x: Any, more: Any, scale: Any) -> Any:
        return norm_after(x, more, scale, _EPSILON)

    def alone(x: Any, scale: Any) -> Any:
        return rms_norm(x, scale, _EPSILON)

    yield Part('sum and norm', (x, x, (width,)), _norm_ways(after, width, tiny))
    by_heads = (rows, tokens, heads, head)
    yield Part('heads norm', (by_heads, (head,)), _norm_ways(alone, head, tiny))
    derived = Way(lambda x: jax.nn.gelu(x, approximate=True))
    yield Part('gelu', ((rows, tokens, 4 * width),), {'derived': derived, 'own': Way(gelu)})
    large = (max(rows // 8, 1), high**2, heads, head)
    for name, queries, keys, groups, lengths in (
        ('self-attention', by_heads, by_heads, 1, None),
        ('cross-attention', by_heads, (rows, tokens // 2, heads, head), 1, tokens // 2 - 1),
        ('multi-axis attention', large, large, high, None),
    ):
        plain, own = (Way(partial(call, groups, lengths)) for call in (_plain_attention, _own_attention))
        ways = {'xla or cudnn': plain, 'own': own, **({} if tiny else _attention_ways(own))}
        yield Part(name, (queries, keys, keys, (head,), (head,)), ways)


def _norm_ways(call: Callable[..., Any], width: int, tiny: bool) -> dict[str, Way]:
    ways = {'xla': Way(call, False), 'own': Way(call, True)}
    for forward, backward in () if tiny else _TILINGS:
        name = f'own, {forward.rows(width)} rows, {forward.warps} warps'
        name += f'; {backward.tiles} times {backward.rows(width)} rows, {backward.warps} warps'
        settings = ((norm_kernels, 'FORWARD', forward), (norm_kernels, 'BACKWARD', backward))
        ways[name] = Way(call, True, settings)
    return ways


def _attention_ways(own: Way) -> dict[str, Way]:
    """Other settings of the backward pass: as one kernel, and as two."""
    ways = {}
    for turn in _TURNS:
        settings = ((attention_kernels, 'TURNS', {256: turn}), (attention_kernels, 'SPLITS', {}))
        ways[f'own, {turn.queries} queries, {turn.warps} warps, {turn.stages} stages'] = own._replace(settings=settings)
    for split in _SPLITS:
        name = f'own, {split.queries} queries, {split.programs} programs, {split.warps} warps, {split.stages} stages'
        name += f'; {split.keys} keys, {split.key_queries} queries, {split.key_warps} warps, {split.key_stages} stages'
        ways[name] = own._replace(settings=((attention_kernels, 'SPLITS', {256: split}),))
    return ways


def _forward(way: Callable[..., Any], inputs: tuple) -> Any:
    """As it is where a gradient is asked for: elsewhere norms are plain ones."""
    return jax.vjp(way, *inputs)[0]


def _both(way: Callable[..., Any], inputs: tuple, weights: list) -> Any:
    found, backward = jax.vjp(way, *inputs)
    one = not isinstance(found, tuple)
    return found, backward(weights[0] if one else tuple(weights[: len(found)]))


def _ms(call: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready([call() for _ in range(2)])
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats * 1e3


def _error(found: Any, exact: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    pairs = ((np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9)) for a, b in pairs)


@contextlib.contextmanager
def _set_to(kernels: bool | None, settings: tuple[tuple[ModuleType, str, Any], ...] = ()) -> Iterator[None]:
    if kernels is not None:
        settings = (*settings, (norm_kernels, 'takes', norm_kernels.fits if kernels else lambda x: False))
    with contextlib.ExitStack() as stack:
        for each in settings:
            stack.enter_context(mock.patch.object(*each))
        jax.clear_caches()  # a trace knows nothing of what was set
        yield


def _chained(call: Callable[..., Any], times: int, inputs: tuple, *more: Any) -> list:
    """All that so many calls return, of which each has to wait for the one before and shares nothing with it."""
    every = []
    for _ in range(times):
        every.append(call(inputs, *more))
        last = jax.tree.leaves(every[-1])[-1]
        inputs, _ = jax.lax.optimization_barrier((inputs, last))
    return every


def _measured(part: Part, way: Way, args: argparse.Namespace) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(part.inputs) + 2)
    drawn = [jax.random.normal(key, shape) + (len(shape) == 1) for key, shape in zip(keys, part.inputs, strict=False)]
    inputs = tuple(x if x.ndim == 1 else x.astype(jnp.bfloat16) for x in drawn)
    weights = [jax.random.normal(key, part.inputs[0]).astype(jnp.bfloat16) for key in keys[-2:]]
    times = args.chained
    with _set_to(way.norm_kernels, way.settings):
        forward = jax.jit(partial(_chained, partial(_forward, way.call), times))
        both = jax.jit(partial(_chained, partial(_both, way.call), times))
        found = {'ms_forward': round(_ms(lambda: forward(inputs), args.repeats) / times, 4)}
        found['ms_both'] = round(_ms(lambda: both(inputs, weights), args.repeats) / times, 4)
        results = both(inputs, weights)[0]
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, inputs, results, weights)))
    found['ms_by_bytes'] = round(moved / args.terabytes / 1e9, 4)
    with _set_to(False), jax.default_matmul_precision('highest'):
        plain = next(iter(part.ways.values())).call
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, weights))
        found['error'] = round(_error(results, jax.jit(partial(_both, plain))(*wide)), 5)
    return found


def _chosen(args: argparse.Namespace) -> list[Part]:
    known = {part.name: part for part in parts(args.tiny)}
    names = [name.strip() for name in args.parts.split(',')] if args.parts else list(known)
    for name in names:
        if name not in known:
            raise UserError(f'--parts={name!r} is no part of a layer: take some of {", ".join(known)}')
    if args.chained < 1:
        raise UserError(f'--chained={args.chained} calls in a program: give 1 or more')
    return [known[name] for name in names]


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each part in each way."""
    for part in _chosen(args):
        for name, way in part.ways.items():
            about = {'part': part.name, 'way': name, 'shape': part.inputs[0]}
            try:
                yield about | _measured(part, way, args)
            except RuntimeError as error:  # a kernel that this chip does not take: the others may
                yield about | {'failed': str(error).strip().splitlines()[0][:300]}
