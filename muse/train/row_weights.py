"""Rows that do not count: the stand-ins of records that could not be read have weight 0.

A batch's 'weight' float32 `[B]` has a mean of 1 once `normalise` has seen the whole of it, so that a mean over rows
times their weights is the weighted mean, in one batch or over micro-batches. With all weights 1 every bit stays what it
is without them. A batch without 'weight' counts all of its rows.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from muse.train.task import Batch

WEIGHT = 'weight'


def normalise(batch: Batch) -> Batch:
    """The global batch with weights of mean 1; all 0 where no row counts."""
    if WEIGHT not in batch:
        return batch
    weight_B = batch[WEIGHT]
    return {**batch, WEIGHT: weight_B * (len(weight_B) / jnp.maximum(jnp.sum(weight_B), 1.0))}


def unread_rows(batch: Batch) -> Array:
    """How many rows of the global batch do not count, int32."""
    return jnp.sum(batch[WEIGHT] == 0) if WEIGHT in batch else jnp.zeros((), jnp.int32)
