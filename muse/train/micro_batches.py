"""Gradient accumulation: a batch in micro-batches of equal size, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

MeanT = TypeVar('MeanT')


def over_micro_batches(
    of: Callable[[dict[str, Array]], tuple[MeanT, Any]], batch: dict[str, Array], accumulate: int
) -> tuple[MeanT, Any]:
    """The mean of what `of` gives for each of `accumulate` micro-batches.

    Args:
        of: batch → (a tree of arrays to be averaged, a tree of arrays with one row for each row of the batch, or more).
        batch: arrays with a leading axis of rows, a multiple of `accumulate`.
        accumulate: number of micro-batches.

    Returns:
        The mean of the first trees, and the second ones joined along their rows.
    """
    if accumulate == 1:
        return of(batch)

    # Micro-batch i takes rows i, i + A, i + 2A …: each device keeps the rows it already holds.
    def split(x: Array) -> Array:
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro_batch: dict[str, Array]) -> tuple[Any, Any]:
        found, rows = of(micro_batch)
        return jax.tree.map(lambda t, x: t + x / accumulate, total, found), rows

    micro_batches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], micro_batches))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, rows = jax.lax.scan(add, zeros, micro_batches)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
