"""Averages of metrics over steps or batches: plain means of scalars, and sums over rows that are divided at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float


class Buckets(NamedTuple):
    """What the rows of a batch gave, by bucket of something between 0 and 1 (the mask ratio): sums, not means.

    Attributes:
        total_K: sum over the rows of each bucket.
        rows_K: their number (the sum of their weights).
    """

    total_K: Float[Array, ' K']
    rows_K: Float[Array, ' K']


def average(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One number a name for a run of steps or batches.

    Args:
        found: at least one dict, all of the same names; values are scalars or `Buckets`, fetched from the devices.

    Returns:
        Scalars as the mean over `found`. Buckets as the mean over all of their rows, each under '<name>_<from>_<to>' in
        percent ('loss_mask_80_100'); a bucket that no row fell into is left out.
    """
    means: dict[str, float] = {}
    for name, first in found[0].items():
        if isinstance(first, Buckets):
            means |= _divide(name, [metrics[name] for metrics in found])
        else:
            means[name] = float(np.mean([metrics[name] for metrics in found]))
    return means


def _divide(name: str, parts: Sequence[Buckets]) -> dict[str, float]:
    total_K, rows_K = np.array([[part.total_K, part.rows_K] for part in parts], np.float64).sum(axis=0)
    width = 100 // len(rows_K)
    return {
        f'{name}_{k * width}_{(k + 1) * width}': float(total / rows)
        for k, (total, rows) in enumerate(zip(total_K, rows_K, strict=True))
        if rows > 0
    }
