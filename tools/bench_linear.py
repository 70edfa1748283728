"""A layer's products in drawing: own kernels in several tilings beside what XLA makes of the same formula.

    python tools/bench.py linear                                        the paper's models at batch 1 and 8
    python tools/bench.py linear --nets=base_632m --batches=1 --seconds=60 --out=tiles.json
    python tools/bench.py sample --tiles=tiles.json                     draws with the fastest of each
    python tools/bench.py linear --tiny --batches=1                     on a CPU, interpreted: no times to trust

One line a product: microseconds of XLA's way and of each tiling (rows, columns, depth, stages, warps), with the norms,
GELU or addition around it, over enough copies of the weights that they come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muse.config import SuperresConfig
from muse.errors import UserError, nearest
from muse.nn import fused_linear
from muse.nn.fused_linear import Product, Readers, Tiles, add_product, fits, normed_gelu, normed_heads, stream_of
from tools import cases as what
from tools.timing import timed
from tools.tokenizer_trials import numbers

NETS = ('base_632m', 'superres_770m', 'base_3b')
TILINGS = (
    Tiles(128, 128, 64, 4, 8),
    Tiles(128, 128, 64, 3, 4),
    Tiles(64, 128, 64, 4, 4),
    Tiles(64, 64, 64, 5, 4),
    Tiles(128, 256, 64, 3, 8),
    Tiles(64, 64, 128, 4, 4),
    Tiles(128, 64, 64, 4, 4),
    Tiles(64, 128, 128, 3, 4),
    Tiles(256, 128, 64, 3, 8),
    Tiles(32, 64, 128, 4, 4),
    Tiles(64, 32, 128, 4, 4),
)
_TINY = (Tiles(16, 16, 16, 2, 4), Tiles(16, 32, 16, 2, 4))
_COLD = 120e6  # bytes of weights that no cache holds


class Case(NamedTuple):
    """A product of a layer of `net` when `batch` pictures are drawn."""

    net: str
    batch: int
    name: str
    product: Product
    readers: Readers | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--nets', default=','.join(NETS), help=f'with commas: {", ".join(NETS)}')
    parser.add_argument('--batches', type=numbers, default=(1, 8), help='guided pictures a call, with commas')
    parser.add_argument('--repeats', type=int, default=10, help='calls timed')
    parser.add_argument('--seconds', type=float, default=600.0, help='no further product after so long')
    parser.add_argument('--out', help='a file for the fastest of each product, for `bench.py sample --tiles`')
    parser.add_argument('--tiny', action='store_true', help='models for a CPU')


def products(net: str, batch: int, *, tiny: bool) -> Iterator[Case]:
    """The products of a layer, in its order; the base's second branch reads no text."""
    config = what.net(net, tiny=tiny, dtype='bfloat16')
    tokens, width, hidden = config.grid[0] * config.grid[1], config.width, config.mlp_dim
    head = width // config.heads
    m = 2 * batch * tokens
    readers = None if isinstance(config, SuperresConfig) else Readers(tokens, 2)
    run, some = (m, m) if readers is None else (tokens, m // 2)
    for name, product, who in (
        ('queries, keys, values', Product('heads', m, width, 3 * width, m, head, 3), None),
        ('attention out', Product('add', m, width, width, m), None),
        ('cross queries', Product('heads', some, width, width, run, head), readers),
        ('cross out', Product('add', m, width, width, run), readers),
        ('up', Product('gelu', m, width, hidden, m), None),
        ('down', Product('add', m, hidden, width, m), None),
    ):
        yield Case(net, batch, name, product, who)


def _inputs(case: Case, copies: int) -> tuple[Any, ...]:
    """A stream, what comes back into it, kernels, scales."""
    _, m, k, n, *_ = case.product
    every = 1 if case.readers is None else case.readers.every
    adds = case.product.kind == 'add'

    def make(key: Any) -> Any:
        a, b, c = jax.random.split(key, 3)
        x_MD = jax.random.normal(a, (m if adds else m * every, n if adds else k), jnp.bfloat16)
        y_MK = jax.random.normal(b, (m // every, k), jnp.bfloat16) if adds else None
        kernels = [jax.random.normal(each, (k, n), jnp.bfloat16) * k**-0.5 for each in jax.random.split(c, copies)]
        return stream_of(x_MD), y_MK, kernels, jnp.ones(n)

    return jax.jit(make)(jax.random.key(0))


def _program(case: Case, tiles: Tiles | None) -> Callable[..., Any]:
    """All copies, one after the other."""
    product, readers = case.product, case.readers

    def run(stream, y_MK, kernels, ones_N):
        made = []
        for kernel_KN in kernels:
            match product.kind:
                case 'heads':
                    made.append(
                        normed_heads(
                            stream,
                            kernel_KN,
                            ones_N,
                            parts=product.parts,
                            normed=min(2, product.parts),
                            head=product.head,
                            epsilon=1e-6,
                            readers=readers,
                            tiles=tiles,
                        )
                    )
                case 'gelu':
                    made.append(normed_gelu(stream, kernel_KN, epsilon=1e-6, tiles=tiles))
                case 'add':
                    nothing_N = ones_N.astype(jnp.bfloat16)
                    stream = add_product(stream, y_MK, kernel_KN, nothing_N=nothing_N, readers=readers, tiles=tiles)
        return made or stream

    return run


def _compiled(case: Case, tiles: Tiles | None, shapes: Any) -> Any:
    return jax.jit(_program(case, tiles)).lower(*shapes).compile()


def _copies(case: Case, tiny: bool) -> int:
    """At most a gigabyte of results."""
    _, m, k, n, *_ = case.product
    return 2 if tiny else max(2, min(int(_COLD // (2 * k * n)) + 1, int(1e9 // (2 * m * n)), 24))


def _microseconds(program: Any, inputs: Any, copies: int, repeats: int) -> float:
    return round(timed(lambda: program(*inputs), repeats=repeats)['ms'] * 1e3 / copies, 2)


def _measured(case: Case, own: dict[Tiles, Future[Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each way. What a tiling asks for may be more than the chip has: it says so."""
    copies = _copies(case, args.tiny)
    inputs = _inputs(case, copies)
    xla = _microseconds(_compiled(case, None, inputs), inputs, copies, args.repeats)
    found: dict[Tiles, float] = {}
    failed: dict[str, str] = {}
    for tiles, future in own.items():
        try:
            found[tiles] = _microseconds(future.result(), inputs, copies, args.repeats)
        except RuntimeError as error:
            failed[_name(tiles)] = str(error).strip().splitlines()[0][:120]
    best = min(found, key=lambda tiles: found[tiles]) if found else None
    least = min([xla, *found.values()])
    every = 1 if case.readers is None else case.readers.every
    flops = case.product.flops / (every if case.product.kind == 'add' else 1)
    return {
        'net': case.net,
        'batch': case.batch,
        'name': case.name,
        'm k n': case.product[1:4],
        'xla_us': xla,
        'own_us': found[best] if best else None,
        'tiles': _name(best) if best else None,
        'tflops_per_s': round(flops / least / 1e6, 1),
        'all_us': {_name(tiles): us for tiles, us in sorted(found.items(), key=lambda item: item[1])},
        'failed': failed,
        'winner': list(best) if best and found[best] < xla else None,
    }


def _name(tiles: Tiles) -> str:
    return 'x'.join(str(each) for each in tiles)


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a product; kernels are compiled side by side ahead of their turn."""
    for net in args.nets.split(','):
        if net not in NETS:
            raise UserError(f"--nets names '{net}'{nearest(net, NETS)}")
    begun, fastest = time.monotonic(), []
    with ThreadPoolExecutor(12) as pool:
        queue = []
        for batch in args.batches:
            for net in args.nets.split(','):
                for case in products(net, batch, tiny=args.tiny):
                    shapes = jax.eval_shape(lambda case=case: _inputs(case, _copies(case, args.tiny)))
                    fitting = [tiles for tiles in (_TINY if args.tiny else TILINGS) if fits(tiles, case.product)]
                    queue.append((case, {tiles: pool.submit(_compiled, case, tiles, shapes) for tiles in fitting}))
        for case, own in queue:
            if time.monotonic() - begun > args.seconds:
                break
            row = _measured(case, own, args)
            fastest.append({'product': list(case.product), 'tiles': row.pop('winner')})
            if args.out:
                Path(args.out).write_text(json.dumps(fastest))
            yield row
        pool.shutdown(cancel_futures=True)


def use_tiles(path: str) -> None:
    """Lets drawing use what `--out` holds."""
    try:
        rows = json.loads(Path(path).read_text())
        found = {Product(*row['product']): row['tiles'] and Tiles(*row['tiles']) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--tiles={path} is not what `bench.py linear --out` writes ({error})') from None
    fused_linear.TUNED.update(found)
