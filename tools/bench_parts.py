"""Parts of a layer between its products, forward and backward: XLA's and cuDNN's ways beside this project's kernels.

    python tools/bench.py parts                        at sizes of the paper's 632M base (batch 64) and super-res (8)
    python tools/bench.py parts --tiny --repeats=1     on a CPU, where the kernels are interpreted

Each line is one part in one way: milliseconds of the forward pass, and of both; the milliseconds that its arrays would
take at --terabytes a second; and how far results and gradients are from those of float32 (root of the mean square of
the difference, as a share), which for the kernels must be about what it is for the others.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muse.nn import norm_kernels
from muse.nn.attention import attention
from muse.nn.attention_kernels import TURNS, normed_attention
from muse.nn.layers import gelu
from muse.nn.norms import norm_after, rms_norm

_EPSILON = 1e-6
_TURNS = ((16, 8), (32, 4), (32, 8), (32, 16), (64, 4), (64, 8), (64, 16))


class Way(NamedTuple):
    """How a part is computed; `norm_kernels` says which norms are used, None those of the chip; `turn` are queries and
    warps of the attention kernel's backward pass where they are not its own choice."""

    call: Callable[..., Any]
    norm_kernels: bool | None = None
    turn: tuple[int, int] | None = None


class Part(NamedTuple):
    """A way takes `inputs` and returns an array or two; the first one, without kernels, is run in float32 as well."""

    name: str
    inputs: tuple[tuple[int, ...], ...]  # shapes; those of one axis are scales, which stay float32
    ways: dict[str, Way]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--repeats', type=int, default=20, help='calls timed together')
    parser.add_argument('--terabytes', type=float, default=3.0, help='a second, of memory')
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

    yield Part('sum and norm', (x, x, (width,)), {'xla': Way(after, False), 'own': Way(after, True)})
    by_heads = (rows, tokens, heads, head)
    yield Part('heads norm', (by_heads, (head,)), {'xla': Way(alone, False), 'own': Way(alone, True)})
    derived = Way(lambda x: jax.nn.gelu(x, approximate=True))
    yield Part('gelu', ((rows, tokens, 4 * width),), {'derived': derived, 'own': Way(gelu)})
    large = (max(rows // 8, 1), high**2, heads, head)
    for name, queries, keys, groups, lengths in (
        ('self-attention', by_heads, by_heads, 1, None),
        ('cross-attention', by_heads, (rows, tokens // 2, heads, head), 1, tokens // 2 - 1),
        ('multi-axis attention', large, large, high, None),
    ):
        plain, own = (Way(partial(call, groups, lengths)) for call in (_plain_attention, _own_attention))
        ways = {'xla or cudnn': plain, 'own': own}
        for turn in () if tiny else _TURNS:
            ways[f'own, {turn[0]} queries, {turn[1]} warps'] = own._replace(turn=turn)
        yield Part(name, (queries, keys, keys, (head,), (head,)), ways)


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
def _set_to(kernels: bool | None, turn: tuple[int, int] | None = None) -> Iterator[None]:
    takes, turns = norm_kernels.takes, dict(TURNS)
    if kernels is not None:
        norm_kernels.takes = norm_kernels.fits if kernels else lambda x: False
    if turn is not None:
        TURNS.update(dict.fromkeys(TURNS, turn))
    jax.clear_caches()  # a trace knows nothing of what was set
    try:
        yield
    finally:
        norm_kernels.takes = takes
        TURNS.update(turns)


def _measured(part: Part, way: Way, args: argparse.Namespace) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(part.inputs) + 2)
    drawn = [jax.random.normal(key, shape) + (len(shape) == 1) for key, shape in zip(keys, part.inputs, strict=False)]
    inputs = tuple(x if x.ndim == 1 else x.astype(jnp.bfloat16) for x in drawn)
    weights = [jax.random.normal(key, part.inputs[0]).astype(jnp.bfloat16) for key in keys[-2:]]
    with _set_to(way.norm_kernels, way.turn):
        forward, both = jax.jit(way.call), jax.jit(partial(_both, way.call))
        found = {'ms_forward': round(_ms(lambda: forward(*inputs), args.repeats), 4)}
        found['ms_both'] = round(_ms(lambda: both(inputs, weights), args.repeats), 4)
        results = both(inputs, weights)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, inputs, results, weights)))
    found['ms_by_bytes'] = round(moved / args.terabytes / 1e9, 4)
    with _set_to(False), jax.default_matmul_precision('highest'):
        plain = next(iter(part.ways.values())).call
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, weights))
        found['error'] = round(_error(results, jax.jit(partial(_both, plain))(*wide)), 5)
    return found


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each part in each way."""
    for part in parts(args.tiny):
        for name, way in part.ways.items():
            about = {'part': part.name, 'way': name, 'shape': part.inputs[0]}
            try:
                yield about | _measured(part, way, args)
            except RuntimeError as error:  # a kernel that this chip does not take: the others may
                yield about | {'failed': str(error).strip().splitlines()[0][:300]}
