"""Guidance as one linear combination of stacked branches (§2.7).

Classifier-free guidance is the pair (conditional, unconditional) with weights (1+t, −t); a negative prompt takes the
place of the unconditional branch; guidance against a frozen reference or with three branches is another row of
weights. The branches run through the network as one batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from muse.config import GuidanceSchedule
from muse.errors import UserError


def guided_logits(
    logits_GBTV: Float[Array, 'G B T V'], weights_GB: Float[Array, 'G B'] | Float[Array, 'G 1']
) -> Float[Array, 'B T V']:
    """Σ_g weight_g · logits_g in float32. With weights (1, 0) it is the first branch, bit for bit."""
    weights_GB11 = weights_GB[..., None, None].astype(jnp.float32)
    # Branch by branch: a sum over an axis is a reduction to compilers, which on a CPU took longer than the logits.
    return sum(logits_BTV.astype(jnp.float32) * weights_GB11[g] for g, logits_BTV in enumerate(logits_GBTV))  # pyright: ignore[reportReturnType]


def cfg_weights(scale_B: Float[Array, ' B']) -> Float[Array, '2 B']:
    """Weights (1+t, −t) of the conditional and the unconditional (or negative) branch."""
    return jnp.stack([1.0 + scale_B, -scale_B])


def scale_at(
    scale_B: Float[Array, ' B'],
    progress: Float[Array, ''],
    schedule: GuidanceSchedule,
    interval: tuple[float | Array, float | Array] = (0.0, 1.0),
) -> Float[Array, ' B']:
    """The guidance scale t at `progress` in [0, 1], which is 0 at the first decoding step and 1 at the last.

    Args:
        scale_B: t of each row.
        progress: share of the way.
        schedule: 'linear' rises from 0 to t (§2.7), 'cosine' does so along half a wave, 'constant' is t throughout.
        interval: outside of it there is no guidance (Kynkäänniemi et al. 2024); both ends belong to it.
    """
    match schedule:
        case 'constant':
            ramp = jnp.ones_like(progress)
        case 'linear':
            ramp = progress
        case 'cosine':
            ramp = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
        case _:
            raise UserError(f"guidance schedule is {schedule!r}; choose 'constant', 'linear' or 'cosine'")
    within = (interval[0] <= progress) & (progress <= interval[1])
    return scale_B * jnp.where(within, ramp, 0.0)
