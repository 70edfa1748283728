"""The three ways from a latent to a code (§2.2 has the first): learned codes, rounded coordinates (FSQ), signs (LFQ).

Each is a table of codes `[V, C]`, a projection that brings encoder outputs into the space of that table, and a search
whose answer is always the id of the nearest code. So encoding, decoding and soft look-ups are the same for all. FSQ is
Mentzer et al. 2023, with evenly spaced levels in [-1, 1]; LFQ is Yu et al. 2023 (MAGVIT-v2). Their tables are fixed:
no code can die for want of a gradient, and nothing of them is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muse.config import VQConfig
from muse.errors import UserError
from muse.models import quantize


@dataclass(frozen=True)
class Learned:
    """A codebook trained by its own loss, on the unit sphere or not. The other two have the same six members."""

    l2_normalize: bool
    learned: ClassVar[bool] = True  # the table is a parameter

    def project(self, z: Float[Array, '... C']) -> Float[Array, '... C']:
        """Encoder outputs → latents, which are compared with the codes. float32, as everything here but the ids."""
        return quantize.unit(z) if self.l2_normalize else z

    def codes(self, codebook_VC: Float[Array, 'V C'] | None) -> Float[Array, 'V C']:
        """The codes as they are compared and decoded; `codebook_VC` is the parameter where there is one."""
        assert codebook_VC is not None
        return self.project(codebook_VC)

    def ids(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Int[Array, ' N']:
        """Ids of the nearest codes, int32; the lowest wins a tie."""
        return quantize.nearest(latents_NC, codes_VC)

    def losses(self, latents: Float[Array, '... C'], chosen: Float[Array, '... C']) -> dict[str, Array]:
        """Loss terms of latents and the codes chosen for them, by their name in `VQLossConfig`."""
        return {
            'commitment': quantize.commitment_loss(latents, chosen),
            'codebook': quantize.codebook_loss(latents, chosen),
        }

    def entropy(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Float[Array, '']:
        """Entropy of each token's soft assignment less the entropy of their mean."""
        return quantize.entropy_loss(latents_NC, codes_VC)


@dataclass(frozen=True)
class FSQ:
    """Finite scalar quantisation: coordinate i is squashed into [-1, 1] and rounded to `levels[i]` even steps.

    An id counts in mixed radix, the first coordinate fastest.
    """

    levels: tuple[int, ...]
    learned: ClassVar[bool] = False

    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.levels[:i]) for i in range(len(self.levels)))

    def project(self, z: Float[Array, '... C']) -> Float[Array, '... C']:
        return jnp.tanh(z)

    def codes(self, codebook_VC: Float[Array, 'V C'] | None) -> Float[Array, 'V C']:
        del codebook_VC
        levels_C, strides_C = jnp.asarray(self.levels), jnp.asarray(self._strides())
        steps_VC = jnp.arange(math.prod(self.levels))[:, None] // strides_C % levels_C
        return 2.0 * steps_VC / (levels_C - 1) - 1.0

    def ids(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Int[Array, ' N']:
        del codes_VC
        top_C = jnp.asarray(self.levels) - 1
        # Half a step exactly belongs to the lower level, as the lowest id wins a tie elsewhere.
        steps_NC = jnp.ceil((latents_NC + 1.0) / 2.0 * top_C - 0.5).astype(jnp.int32)
        return jnp.sum(jnp.clip(steps_NC, 0, top_C) * jnp.asarray(self._strides()), axis=-1, dtype=jnp.int32)

    def losses(self, latents: Float[Array, '... C'], chosen: Float[Array, '... C']) -> dict[str, Array]:
        del latents, chosen
        return {}

    def entropy(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Float[Array, '']:
        return quantize.entropy_loss(latents_NC, codes_VC)


@dataclass(frozen=True)
class LFQ:
    """Lookup-free quantisation: the signs of `bits` coordinates, on the unit sphere when asked. Bit i: coordinate i."""

    bits: int
    l2_normalize: bool
    learned: ClassVar[bool] = False

    @property
    def size(self) -> float:
        """Magnitude of a code's coordinates."""
        return 1.0 / math.sqrt(self.bits) if self.l2_normalize else 1.0

    def project(self, z: Float[Array, '... C']) -> Float[Array, '... C']:
        return quantize.unit(z) if self.l2_normalize else z

    def codes(self, codebook_VC: Float[Array, 'V C'] | None) -> Float[Array, 'V C']:
        del codebook_VC
        bits_VC = jnp.arange(2**self.bits)[:, None] >> jnp.arange(self.bits) & 1
        return (2.0 * bits_VC - 1.0) * self.size

    def ids(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Int[Array, ' N']:
        del codes_VC
        return jnp.sum((latents_NC > 0) * (1 << jnp.arange(self.bits)), axis=-1, dtype=jnp.int32)

    def losses(self, latents: Float[Array, '... C'], chosen: Float[Array, '... C']) -> dict[str, Array]:
        return {'commitment': quantize.commitment_loss(latents, chosen)}

    def entropy(self, latents_NC: Float[Array, 'N C'], codes_VC: Float[Array, 'V C']) -> Float[Array, '']:
        del codes_VC
        return quantize.bits_entropy_loss(latents_NC / self.size)


Quantizer = Learned | FSQ | LFQ


def make_quantizer(config: VQConfig) -> Quantizer:
    """The quantizer of a config.

    Raises:
        UserError: levels, code_dim and codebook_size do not fit the kind.
    """
    size, width, levels = config.codebook_size, config.code_dim, config.levels
    if config.quantizer != 'fsq' and levels:
        raise UserError(f"levels {levels} with quantizer '{config.quantizer}': only 'fsq' has levels; leave them empty")
    if config.quantizer == 'vq':
        return Learned(config.l2_normalize)
    if config.quantizer == 'lfq':
        if width > 24 or size != 2**width:
            raise UserError(
                f"quantizer 'lfq': codebook_size {size} must be 2^code_dim, code_dim is {width} (24 at most)"
            )
        return LFQ(width, config.l2_normalize)
    if not levels or min(levels) < 2 or len(levels) != width or math.prod(levels) != size:
        raise UserError(
            f"quantizer 'fsq': levels {levels} must be code_dim ({width}) numbers of 2 or more whose product is "
            f'codebook_size ({size}), as (8, 8, 8, 4, 4) for 8192'
        )
    if config.l2_normalize:
        raise UserError("quantizer 'fsq' has no unit sphere: set l2_normalize to False")
    return FSQ(levels)
