"""What each trick of docs/performance.md can bring, from operations and bytes alone, before anything is measured.

Printed by `tools/bench.py floors --tricks`. A trick saves operations, which cost 1/--tflops, or bytes, which cost
1/--terabytes. Launches, waves of blocks and the like do not show here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from muse.train.flops import transformer_flops
from tools import cases as what

_FLOAT32_RATE = 67e12  # operations a second of float32 products, from the maker's data sheet of the H100
_MASKED = 2 / math.pi  # mean share of masked tokens in training (§2.6)


class Trick(NamedTuple):
    """What is saved in one drawing or one training step."""

    name: str
    flops: float = 0.0
    gigabytes: float = 0.0
    ms: float = 0.0  # beside what the rates give


def unknown_share(steps: int) -> float:
    """Mean share of tokens that are unknown at the beginning of a step of the cosine schedule (§2.8)."""
    return sum(math.cos(0.5 * math.pi * step / steps) for step in range(steps)) / steps


def drawing_tricks(rows: int, weights: int) -> Iterator[Trick]:
    """Of the 632M base in 12 guided steps."""
    case = what.drawing('base_632m', tiny=False)
    config, steps = case.base, case.base_steps
    tokens, width, keys = rows * math.prod(config.grid), config.width, 1 + config.text_length
    layers, codes = config.layers, config.codebook_size
    cross = layers * 2 * tokens * width * (2 * width + 2 * keys)
    memory = layers * 2 * 2 * rows * config.text_length * width**2
    head = 2 * 2 * tokens * width * codes
    logits = 4 * tokens * codes / 1e9
    yield Trick('no cross-attention over nothing', flops=steps * cross)
    yield Trick('keys and values of the text once, not once a step and branch', flops=(2 * steps - 1) * memory)
    yield Trick('weights in bfloat16 ahead of the steps', gigabytes=steps * 2 * weights / 1e9)
    yield Trick('logits of unknown tokens alone', flops=steps * head * (1 - unknown_share(steps)))
    yield Trick('one float32 array of logits less, written and read', gigabytes=steps * 2 * logits)
    yield Trick('weights in int8, read as such', gigabytes=steps * weights / 1e9)
    yield Trick('layers apart: weights copied once, not in each step', gigabytes=(steps - 1) * 2 * 2 * weights / 1e9)
    # Elements written and read again: both branches' norms of stream, queries and keys, additions and hidden units; the
    # reading branch's norms of stream and queries, and addition.
    both, reading = 2 * tokens * (12 * width + 2 * config.mlp_dim), tokens * 6 * width
    passes = steps * layers * 2 * (both + reading) / 1e9
    yield Trick('norms, GELU and additions inside the products', gigabytes=passes)


def training_tricks(rows: int, weights: int) -> Iterator[Trick]:
    """Of a step of the 632M base under remat 'dots'."""
    config = what.net('base_632m', tiny=False)
    tokens, width, layers, codes = rows * math.prod(config.grid), config.width, config.layers, config.codebook_size
    keys = math.prod(config.grid) + 1 + config.text_length
    table = 2 * tokens * width * codes
    kept = 2 * (12 * width + config.mlp_dim) * tokens * layers / 1e9
    logits = tokens * codes / 1e9
    passed = 2 * tokens * width * layers / 1e9  # one reading or writing of the stream in all layers
    yield Trick("the table's gradient from bfloat16", flops=-table, ms=table / _FLOAT32_RATE * 1e3)
    yield Trick(
        "the loss' gradient in one pass: two float32 arrays of logits less, written and read", gigabytes=16 * logits
    )
    yield Trick('weights cast once a step, not again in the backward pass', gigabytes=6 * weights / 1e9)
    yield Trick('gradients of stacked layers held in bfloat16', gigabytes=6 * weights / 1e9)
    yield Trick('attention not run again', flops=layers * 4 * tokens * width * keys)
    yield Trick('layers unrolled: what is kept is not copied into stacked arrays and out', gigabytes=4 * kept)
    yield Trick("text's keys and values not copied behind the null, nor their gradients", gigabytes=6 * passed)
    yield Trick("norms and their gradients in a pass each: sums, rows' and columns' sums apart", gigabytes=21 * passed)
    yield Trick('nothing but products and the stream made again: norms, sums, GELU', gigabytes=22 * passed)
    yield Trick('GELU written by the product ahead of it; its gradient without writing it again', gigabytes=8 * passed)
    yield Trick("norms of queries and keys within attention's kernels", gigabytes=15 * passed)
    yield Trick('sums of gradients and of the stream within products', gigabytes=8 * passed)
    yield Trick('logits of masked tokens alone', flops=3 * table * (1 - _MASKED))
    yield Trick('no norms of parameters and updates', gigabytes=2 * 4 * weights / 1e9)
    yield Trick('no moving average', gigabytes=2 * 4 * weights / 1e9)
    yield Trick('nothing made again (remat full instead: this more)', flops=transformer_flops(config, rows))


def rows_of(args: Any, weights: int) -> Iterator[dict[str, Any]]:
    """JSON-ready: milliseconds of each at batch 1 and 8 (drawing) and 64 (training)."""
    for case, batch, tricks in (
        ('draw base_632m', 1, drawing_tricks(1, weights)),
        ('draw base_632m', 8, drawing_tricks(8, weights)),
        ('train base_632m', 64, training_tricks(64, weights)),
    ):
        for trick in tricks:
            ms = trick.flops / args.tflops / 1e9 + trick.gigabytes / args.terabytes + trick.ms
            saved = {'tflop': round(trick.flops / 1e12, 3), 'gigabytes': round(trick.gigabytes, 3)}
            yield {'case': case, 'batch': batch, 'trick': trick.name, **saved, 'ms': round(ms, 2)}
