"""What the benches share: the time of a call, its share of the chip's peak, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from muse.train.flops import peak_flops
from muse.train.rates import peak_memory_gib as peak_memory_gib  # the benches' as well


def timed(call: Callable[[], Any], *, repeats: int, warmup: int = 2) -> dict[str, Any]:
    """Milliseconds of a call, each waited for: the median and the extremes of `repeats`."""
    for _ in range(warmup):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return {
        'ms': round(statistics.median(times), 3),
        'ms_min': round(min(times), 3),
        'ms_max': round(max(times), 3),
        'repeats': repeats,
    }


def share_of_peak(flops: float, ms: float) -> dict[str, float | None]:
    """TFLOP/s, and what share of the first device's dense bfloat16 peak they are (None where that is not known)."""
    per_second = flops / ms * 1e3
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        'tflops_per_s': round(per_second / 1e12, 3),
        'share_of_peak': round(per_second / peak, 4) if peak else None,
    }


def compiled_memory(compiled: Any) -> dict[str, float]:
    """GiB that a compiled program needs on a device: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {'memory_gib': round(needed / 2**30, 6), 'temporaries_gib': round(memory.temp_size_in_bytes / 2**30, 6)}
