"""Drawing with random weights, text states in, pixels out: time, share of the chip's peak, memory, beside the peer.

    python tools/bench.py sample                                     both cases at batch 1 and 8, and the peer
    python tools/bench.py sample --cases=base_632m --batches=1 --variants=now,xla_attention --peer_modes=
    python tools/bench.py sample --cases=shipped --batches=1 --dtype=float32 --profile=12 --peer_modes=    on a CPU
    python tools/bench.py sample --precision=none,int8,fp8 --peer_modes=      products of one-byte numbers beside ours
    python tools/bench.py sample --tiny --batches=2 --repeats=2 --peer_modes=      models for a CPU

Cases: base_632m draws pictures of 256×256 in 12 guided steps, cascade_3b of 512×512 in 24 and 8, each as one program.
Every text has its full length. A variant is ours with one thing done differently, and says how many of its tokens are
those of the first one in the first precision; a share of the peak is always of bfloat16's. The peer (aMUSEd-256, also
12 guided steps) runs in a process of its own in each of --peer_modes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from muse import drawing
from muse.config import DecodeConfig, Dtype
from muse.errors import UserError, nearest
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN
from muse.nn.quantized import Precision, quantized
from muse.train.flops import base_draw_flops, decoder_flops, superres_draw_flops
from tools import cases as what
from tools.bench_linear import use_tiles
from tools.peers.run import run_peer
from tools.random_weights import random_weights
from tools.timing import compiled_memory, peak_memory_gib, share_of_peak, timed
from tools.tokenizer_case import profiled_calls
from tools.tokenizer_trials import numbers
from tools.variants import DRAWING_VARIANTS, combined, patched

PRECISIONS = ('none', *get_args(Precision))  # of the products in layers; none: --dtype
PEER = Path(__file__).resolve().parent / 'peers' / 'amused.py'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--cases', default='base_632m,cascade_3b', help=f'with commas: {", ".join(what.DRAWINGS)}')
    parser.add_argument('--batches', type=numbers, default=(1, 8), help='pictures a call to measure, with commas')
    parser.add_argument('--variants', default='now', help=f'with commas: {", ".join(DRAWING_VARIANTS)}')
    parser.add_argument('--dtype', default='bfloat16', help='of arithmetic: bfloat16 or float32')
    parser.add_argument('--precision', default='none', help=f'with commas: {", ".join(PRECISIONS)}')
    parser.add_argument('--repeats', type=int, default=15, help='calls timed')
    parser.add_argument('--profile', type=int, default=0, help='print so many of the costliest operations')
    parser.add_argument('--tiles', default='', help='what `bench.py linear --out` wrote, with commas')
    parser.add_argument('--tiny', action='store_true', help='models for a CPU')
    parser.add_argument(
        '--peer_modes',
        default='default,reduce-overhead,max-autotune',
        help="torch.compile modes of the peer, with commas; 'eager' is no compile; empty: no peer",
    )
    parser.add_argument('--peer_seconds', type=float, default=240.0, help='time limit of all peer modes together')


def _weights(case: what.Drawing, dtype: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Graphs and weights of the base, the super-res if any, and the decoder."""
    base, superres = case.base, case.superres
    nets = [random_weights(lambda: Transformer(base, rngs=rngs()), dtype)]
    if superres is not None:
        nets.append(random_weights(lambda: Superres(superres, rngs=rngs()), dtype))
    nets.append(random_weights(lambda: VQGAN(case.decoder, rngs=rngs()), dtype))
    graphs, params = zip(*nets, strict=True)
    return graphs, params


def rngs() -> nnx.Rngs:
    """For a module that is only traced."""
    return nnx.Rngs(params=0)


def _batch(config: Any, steps: int, rows: int) -> tuple[jax.Array, jax.Array, drawing.Batch, drawing.Program]:
    """An empty canvas of a model, which texts its program reads, and the program."""
    decode = DecodeConfig(steps=steps)
    shape = (1, rows, config.text_length, config.text_width)
    txt_GBSD = jax.random.normal(jax.random.key(7), shape, config.dtype)
    len_GB = np.stack([np.full(rows, config.text_length, np.int32), np.zeros(rows, np.int32)])
    index_B = np.arange(rows, dtype=np.int32)
    batch = drawing.batch_of(decode, txt_GBSD, len_GB, np.zeros(rows, np.uint32), index_B)
    tokens = config.grid[0] * config.grid[1]
    canvas_BT = jnp.zeros((rows, tokens), jnp.int32)
    return canvas_BT, canvas_BT > 0, batch, drawing.program_of(decode)


def program(case: what.Drawing, graphs: tuple[Any, ...], params: Any, rows: int) -> tuple[Any, tuple[Any, ...]]:
    """What draws `rows` pictures, jitted, and its arguments; the last of what it returns are the pixels."""
    low, keep, batch, how = _batch(case.base, case.base_steps, rows)
    if case.superres is None:

        def paint_base(*arguments: Any) -> Any:
            return drawing.paint_base(*arguments, graphs=graphs, grid=case.base.grid, program=how)

        return jax.jit(paint_base), (params, low, keep, batch)
    *high, high_how = _batch(case.superres, case.superres_steps, rows)
    grids, hows = (case.base.grid, case.superres.grid), (how, high_how)

    def paint_cascade(*arguments: Any) -> Any:
        return drawing.paint_cascade(*arguments, graphs=graphs, grids=grids, programs=hows)

    return jax.jit(paint_cascade), (params, (low, keep, batch), tuple(high))


def flops(case: what.Drawing, rows: int) -> float:
    """Operations of drawing `rows` pictures."""
    total = base_draw_flops(case.base, rows, case.base_steps)
    grid = case.base.grid
    if case.superres is not None:
        total, grid = total + superres_draw_flops(case.superres, rows, case.superres_steps), case.superres.grid
    return total + decoder_flops(case.decoder, rows * grid[0] * grid[1] * case.decoder.factor**2)


def _rounded(graphs: tuple[Any, ...], params: tuple[Any, ...], precision: str) -> tuple[Any, tuple[Any, ...]]:
    """Base, super-res and decoder with the products of the first two in a precision."""
    if precision == 'none':
        return graphs, params
    nets = [quantized(*net, precision) for net in zip(graphs[:-1], params[:-1], strict=True)]  # pyright: ignore[reportArgumentType]
    rounded, values = zip(*nets, strict=True)
    return (*rounded, graphs[-1]), (*values, params[-1])


def _measured(
    case: what.Drawing, nets: Any, rows: int, precision: str, variant: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Times of one variant in one precision, and its tokens under 'tokens'."""
    change = combined(variant, DRAWING_VARIANTS)
    case = dataclasses.replace(
        case,
        base=dataclasses.replace(case.base, **change.config),
        superres=case.superres and dataclasses.replace(case.superres, **change.config),
    )
    graphs, params = _rounded(tuple(_regraphed(case)), nets[1], precision)
    start = time.perf_counter()
    with patched(change.patches):
        jax.clear_caches()  # the trace of a program knows nothing of patches
        own = precision == 'none' and drawing.drawing_kernels(args.dtype)
        paint, arguments = program(case, graphs, params, rows)
        compiled = paint.lower(*arguments).compile(compiler_options=change.compiler)
    compile_s = time.perf_counter() - start
    times = timed(lambda: compiled(*arguments)[-1], repeats=args.repeats)
    found = {
        **times,
        'gpu_kernels': own,
        'ms_per_image': round(times['ms'] / rows, 3),
        **share_of_peak(flops(case, rows), times['ms']),
        **compiled_memory(compiled),
        'peak_gib': peak_memory_gib(),
        'compile_s': round(compile_s, 1),
        'tokens': np.asarray(compiled(*arguments)[-2][-1]),
    }
    if args.profile:
        found['profile'] = profiled_calls(lambda: compiled(*arguments)[-1], 1, str(compiled.as_text()), args.profile)
    return found


def _regraphed(case: what.Drawing) -> Iterator[Any]:
    """The structures of the models under the settings of a variant; weights stay what they are."""

    def graph(make: Any) -> Any:
        return nnx.split(nnx.eval_shape(make), nnx.Param)[0]

    superres = case.superres
    yield graph(lambda: Transformer(case.base, rngs=rngs()))
    if superres is not None:
        yield graph(lambda: Superres(superres, rngs=rngs()))
    yield graph(lambda: VQGAN(case.decoder, rngs=rngs()))


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ours, each case at each batch size in each variant; then the peer at each batch size in each mode."""
    for flag, given, known in (
        ('cases', args.cases, what.DRAWINGS),
        ('variants', args.variants, DRAWING_VARIANTS),
        ('precision', args.precision, PRECISIONS),
        ('dtype', args.dtype, Dtype.__args__),
    ):
        joined = given.replace('+', ',') if flag == 'variants' else given
        for name in filter(None, joined.split(',')):
            if name not in known:
                raise UserError(f"--{flag} names '{name}'{nearest(name, known)}")
    for path in filter(None, args.tiles.split(',')):
        use_tiles(path)
    for name in filter(None, args.cases.split(',')):
        case = what.drawing(name, tiny=args.tiny, dtype=args.dtype)
        nets = _weights(case, jnp.dtype(args.dtype))
        for rows in args.batches:
            first = None
            for precision, variant in product(filter(None, args.precision.split(',')), args.variants.split(',')):
                try:
                    found: dict[str, Any] = _measured(case, nets, rows, precision, variant, args)
                except RuntimeError as error:  # does not fit into the memory: the next may
                    found = {'failed': str(error).strip().splitlines()[0][:300]}
                tokens = found.pop('tokens', None)
                first = tokens if first is None else first
                if tokens is not None:
                    found['same_tokens'] = round(float(np.mean(tokens == first)), 4)
                profile = found.pop('profile', None)
                about = {'model': 'muse', 'case': name, 'batch': rows, 'variant': variant, 'dtype': args.dtype}
                about |= {'precision': precision}
                yield about | found | {'xla_flags': os.environ.get('XLA_FLAGS', '')}
                if profile:
                    yield about | {'profile': profile}
        for leaf in jax.tree.leaves(nets[1]):
            leaf.delete()
    setting = {'task': 'sample', 'repeats': args.repeats, 'steps': 12, 'tiny': args.tiny}
    yield from peer_cases(args.batches, args.peer_modes, args.peer_seconds, setting)


def peer_cases(
    batches: tuple[int, ...], modes: str, seconds: float, setting: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """aMUSEd at each batch size in each mode, each in a process of its own, ended when time is up."""
    about = {'model': 'amused-256', 'case': setting['task']}
    names = [mode for mode in modes.split(',') if mode]
    if names and not all(importlib.util.find_spec(name) for name in ('torch', 'diffusers')):
        yield about | {'failed': 'torch and diffusers are not installed'}
        return
    end = time.monotonic() + seconds
    for mode in names:
        for rows in batches:
            found = run_peer(PEER, setting | {'batch': rows, 'mode': mode}, max(1.0, end - time.monotonic()))
            if 'ms' in found:
                found['ms_per_image'] = round(found['ms'] / rows, 3)
            yield about | {'batch': rows, 'mode': mode} | found
