"""Means over the rows of a batch, some of which count for nothing (`muse.train.row_weights`)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def weigh(x: Float[Array, 'B ...'], weight_B: Float[Array, ' B'] | None) -> Float[Array, 'B ...']:
    """`x` times its rows' weights; None: all count."""
    return x if weight_B is None else x * weight_B.reshape(-1, *[1] * (x.ndim - 1))


def mean_rows(x: Float[Array, 'B ...'], weight_B: Float[Array, ' B'] | None) -> Float[Array, '']:
    """The mean of `x` over its rows, as they count, and over all else. The weights have a mean of 1."""
    return jnp.mean(weigh(x, weight_B))
