"""The least time that each case of the benches can take on an H100: its operations, and its bytes, at the chip's rates.

    python tools/bench.py floors                                 needs no accelerator: everything is counted
    python tools/bench.py floors --tricks                        what single tricks can save
    python tools/bench.py floors --tflops=790 --terabytes=3.0    rates that were measured on an H100

Operations are those of `muse.train.flops`. Bytes are the fewest that must go through memory. Drawing: all weights in
bfloat16 once a step, keys and values of the text once a step, the decoder's weights once. Training: parameters, their
average and the optimiser's moments read and written once in float32, gradients written and read once in bfloat16, and
what the backward pass needs of the forward pass (matrix products and attention under remat 'dots', each layer's input
under 'full') written and read once in bfloat16. What stays on the chip between two operations is not counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from muse.config import SuperresConfig
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN
from muse.train import masked
from muse.train.flops import PEAKS, step_flops
from tools import bench_sample, bench_train, tricks
from tools import cases as what

_BF16, _F32 = 2, 4


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--tflops', type=float, default=790.0, help='10^12 operations a second')
    parser.add_argument('--terabytes', type=float, default=3.0, help='10^12 bytes a second')
    parser.add_argument('--tricks', action='store_true', help='what single tricks can save, instead')


def _params(make: Any) -> Any:
    return nnx.split(nnx.eval_shape(make), nnx.Param)[1]


def _net_params(config: Any) -> Any:
    kind: Any = Superres if isinstance(config, SuperresConfig) else Transformer
    return _params(lambda: kind(config, rngs=bench_sample.rngs()))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _weights(config: Any) -> int:
    return _count(_net_params(config))


def drawing_bytes(case: what.Drawing, rows: int) -> float:
    """Bytes of drawing `rows` pictures."""
    total = _BF16 * _count(_params(lambda: VQGAN(case.decoder, rngs=bench_sample.rngs()).decoder))
    for config, steps in ((case.base, case.base_steps), (case.superres, case.superres_steps)):
        if config is not None:
            low = math.prod(config.low_grid) if isinstance(config, SuperresConfig) else 0
            keys = 1 + low + config.text_length + (1 + low if low else 0)  # the other branch reads the low-res tokens
            total += steps * _BF16 * (_weights(config) + rows * config.layers * 2 * keys * config.width)
    return float(total)


def training_bytes(run: Any) -> float:
    """Bytes of one step."""
    model = run.model
    params = _net_params(model)
    moments = jax.eval_shape(masked.make_optimizer(run.optim, run.train.steps).init, params)
    kept = model.width if model.remat == 'full' else 12 * model.width + model.mlp_dim
    tokens = run.train.batch_size * math.prod(model.grid)
    activations = 2 * _BF16 * tokens * model.layers * kept
    return float(2 * _F32 * (2 * _count(params) + _count(moments)) + 2 * _BF16 * _count(params) + activations)


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Drawing at batch 1 and 8, then a training step of each model at the batch of tools/bench_train.py."""
    if args.tricks:
        yield from tricks.rows_of(args, _weights(what.net('base_632m', tiny=False)))
        return
    for name in ('base_632m', 'cascade_3b'):
        case = what.drawing(name, tiny=False, dtype='bfloat16')
        for rows in (1, 8):
            counts = bench_sample.flops(case, rows), drawing_bytes(case, rows)
            yield {'case': f'draw {name}', 'batch': rows, **_floor(*counts, rows, args)}
    for name in ('base_632m', 'base_3b', 'superres_770m'):
        run = bench_train.make_run(name, bench_train.BATCHES[name])
        rows = run.train.batch_size
        counts = step_flops(run), training_bytes(run)
        yield {'case': f'train {name}', 'batch': rows, 'remat': run.model.remat, **_floor(*counts, rows, args)}


def _floor(flops: float, moved: float, rows: int, args: argparse.Namespace) -> dict[str, float]:
    by_operations, by_bytes = flops / args.tflops / 1e9, moved / args.terabytes / 1e9
    least = max(by_operations, by_bytes)
    return {
        'tflop': round(flops / 1e12, 2),
        'gigabytes': round(moved / 1e9, 2),
        'ms_operations': round(by_operations, 2),
        'ms_bytes': round(by_bytes, 2),
        'floor_ms_per_image': round(least / rows, 3),
        'most_share_of_peak': round(flops / PEAKS['H100'] / least * 1e3, 3),
        'share_of_peak_in_turn': round(flops / PEAKS['H100'] / (by_operations + by_bytes) * 1e3, 3),
    }
