"""The VQGAN tokenizer (§2.2, Table 5): pictures to a grid of code ids and back, fully convolutional, no attention.

Residual blocks of GroupNorm, swish and 3x3 convolutions, as in the tokenizer of MaskGIT; every resolution but the
last ends in a stride-2 convolution (encoder) or begins with nearest-neighbour doubling and a convolution (decoder).
The decoder may be larger than the encoder (appendix A.2). A linear 1x1 convolution leads into the code space.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from muse.config import VQConfig
from muse.errors import UserError
from muse.models import quantize
from muse.nn.layers import param

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def to_float(img_BHWC: UInt8[Array, '... H W 3']) -> Float[Array, '... H W 3']:
    """uint8 pixels 0..255 → float32 in [-1, 1]."""
    return img_BHWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(img_BHWC: Float[Array, '... H W 3']) -> UInt8[Array, '... H W 3']:
    """Float pixels, clipped to [-1, 1] → uint8 0..255, rounded."""
    clipped = jnp.clip(img_BHWC.astype(jnp.float32), -1.0, 1.0)
    return jnp.round((clipped + 1.0) * 127.5).astype(jnp.uint8)


class Conv(nnx.Module):
    """A 2-D convolution with bias and 'SAME' padding. `scale` multiplies the fan-in initialisation."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, *, rngs: nnx.Rngs, stride: int = 1, scale: float = 1.0
    ):
        init = nnx.initializers.variance_scaling(scale**2, 'fan_in', 'truncated_normal')
        self.kernel = param(init, rngs, (size, size, inputs, outputs), (None, None, 'conv_in', 'conv_out'))
        self.bias = param(nnx.initializers.zeros, rngs, (outputs,), ('norm',))
        self.stride = stride

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B h w c']:
        kernel, bias = self.kernel[...].astype(x_BHWC.dtype), self.bias[...].astype(x_BHWC.dtype)
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, 'SAME', dimension_numbers=_DIMENSIONS) + bias


class GroupNorm(nnx.Module):
    """Norm over the picture and a group of channels, statistics in float32.

    Up to 32 groups of at least 4 channels, so that narrow models keep their channels' contrast.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, epsilon: float = 1e-6):
        self.groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
        self.scale = param(nnx.initializers.ones, rngs, (channels,), ('norm',))
        self.bias = param(nnx.initializers.zeros, rngs, (channels,), ('norm',))
        self.epsilon = epsilon

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        batch, height, width, channels = x_BHWC.shape
        x32 = x_BHWC.astype(jnp.float32)
        # Both moments in one reading of the picture; per channel first, since groups are only a few channels.
        moments_2BC = jnp.stack([jnp.mean(x32, axis=(1, 2)), jnp.mean(jnp.square(x32), axis=(1, 2))])
        moments_2BG = jnp.mean(moments_2BC.reshape(2, batch, self.groups, channels // self.groups), axis=-1)
        variance_BG = jnp.maximum(moments_2BG[1] - jnp.square(moments_2BG[0]), 0.0)
        inverse_BC = jnp.repeat(jax.lax.rsqrt(variance_BG + self.epsilon), channels // self.groups, axis=-1)
        mean_BC = jnp.repeat(moments_2BG[0], channels // self.groups, axis=-1)
        gain_BC = inverse_BC * self.scale[...]
        offset_BC = self.bias[...] - mean_BC * gain_BC
        return (x32 * gain_BC[:, None, None] + offset_BC[:, None, None]).astype(x_BHWC.dtype)


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, rngs=rngs, scale=0.5)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B H W c']:
        y_BHWC = self.conv1(jax.nn.silu(self.norm1(x_BHWC)))
        y_BHWC = self.conv2(jax.nn.silu(self.norm2(y_BHWC)))
        return y_BHWC + (x_BHWC if self.shortcut is None else self.shortcut(x_BHWC))


class Encoder(nnx.Module):
    """Pixels → latents in the code space, `2^(levels - 1)` times smaller."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.conv_in = Conv(3, config.channels * config.channel_mult[0], rngs=rngs)
        width, levels, downs = config.channels * config.channel_mult[0], [], []
        for level, mult in enumerate(config.channel_mult):
            levels.append(_blocks(width, config.channels * mult, config.num_res_blocks, rngs))
            width = config.channels * mult
            if level < len(config.channel_mult) - 1:
                downs.append(Conv(width, width, stride=2, rngs=rngs))
        self.levels, self.downs = nnx.List(levels), nnx.List(downs)
        self.middle = _blocks(width, width, config.num_res_blocks, rngs)
        self.norm_out = GroupNorm(width, rngs=rngs)
        self.conv_out = Conv(width, config.code_dim, 1, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
        x_BHWC = self.conv_in(x_BHWC)
        for level, blocks in enumerate(self.levels):
            x_BHWC = _run(blocks, x_BHWC)
            if level < len(self.downs):
                x_BHWC = self.downs[level](x_BHWC)
        return self.conv_out(jax.nn.silu(self.norm_out(_run(self.middle, x_BHWC))))


class Decoder(nnx.Module):
    """Codes → pixels; the mirror of the encoder, with its own width and depth."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        channels = config.decoder_channels or config.channels
        depth = config.decoder_num_res_blocks or config.num_res_blocks
        width, levels, ups = channels * config.channel_mult[-1], [], []
        self.conv_in = Conv(config.code_dim, width, rngs=rngs)
        self.middle = _blocks(width, width, depth, rngs)
        for level, mult in enumerate(reversed(config.channel_mult)):
            if level > 0:
                ups.append(Conv(width, width, rngs=rngs))
            levels.append(_blocks(width, channels * mult, depth, rngs))
            width = channels * mult
        self.levels, self.ups = nnx.List(levels), nnx.List(ups)
        self.norm_out = GroupNorm(width, rngs=rngs)
        self.conv_out = Conv(width, 3, rngs=rngs)

    def __call__(self, x_BhwC: Float[Array, 'B h w C']) -> Float[Array, 'B H W 3']:
        x_BHWC = _run(self.middle, self.conv_in(x_BhwC))
        for level, blocks in enumerate(self.levels):
            if level > 0:
                x_BHWC = self.ups[level - 1](_double(x_BHWC))
            x_BHWC = _run(blocks, x_BHWC)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BHWC)))


class Reconstruction(NamedTuple):
    """What one pass through the tokenizer gives."""

    img_BHWC: Float[Array, 'B H W 3']  # float32, not clipped
    ids_Bhw: Int[Array, 'B h w']
    latents_BhwC: Float[Array, 'B h w C']  # float32; of unit length when config.l2_normalize
    quantised_BhwC: Float[Array, 'B h w C']  # the codes in value, the latents in gradient: what was decoded


class VQGAN(nnx.Module):
    """Encoder, codebook, decoder. Pixels are floats in [-1, 1]; both sides must be multiples of `config.factor`."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.codebook = param(nnx.initializers.normal(1.0), rngs, (config.codebook_size, config.code_dim), (None, None))
        self.decoder = Decoder(config, rngs=rngs)

    def codes(self) -> Float[Array, 'V C']:
        """The codebook as it is compared and decoded: of unit length when config.l2_normalize. float32."""
        return quantize.unit(self.codebook[...]) if self.config.l2_normalize else self.codebook[...]

    def latents(self, img_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
        """Encoder outputs before quantisation, float32.

        Raises:
            UserError: the picture's sides are not multiples of the downsampling factor.
        """
        height, width, factor = img_BHWC.shape[1], img_BHWC.shape[2], self.config.factor
        if height % factor or width % factor:
            raise UserError(
                f'a picture of {height}x{width} pixels does not divide into tokens of {factor}x{factor}: '
                f'resize or crop both sides to multiples of {factor}'
            )
        z_BhwC = self.encoder(img_BHWC.astype(self.config.dtype)).astype(jnp.float32)
        return quantize.unit(z_BhwC) if self.config.l2_normalize else z_BhwC

    def lookup(self, latents_BhwC: Float[Array, 'B h w C']) -> Int[Array, 'B h w']:
        """Ids of the codes nearest to latents."""
        flat_NC = latents_BhwC.reshape(-1, latents_BhwC.shape[-1])
        ids_N = quantize.nearest(*jax.lax.stop_gradient((flat_NC, self.codes())))
        return ids_N.reshape(latents_BhwC.shape[:-1])

    def encode(self, img_BHWC: Float[Array, 'B H W 3']) -> Int[Array, 'B h w']:
        """Pictures in [-1, 1] → ids 0..V-1, int32, one for each `factor` x `factor` pixels."""
        return self.lookup(self.latents(img_BHWC))

    def decode(self, ids_or_weights: Int[Array, 'B h w'] | Float[Array, 'B h w V']) -> Float[Array, 'B H W 3']:
        """Code ids, or weights over the codes (soft one-hots, through which a gradient flows) → float32 pixels.

        The pixels are not clipped: `to_uint8` does that.
        """
        codes_VC = self.codes()
        if jnp.issubdtype(ids_or_weights.dtype, jnp.integer):
            return self._decode(codes_VC[ids_or_weights])
        return self._decode(jnp.matmul(ids_or_weights.astype(jnp.float32), codes_VC, precision='highest'))

    def __call__(self, img_BHWC: Float[Array, 'B H W 3']) -> Reconstruction:
        """Encodes, quantises with the straight-through gradient, and decodes."""
        latents_BhwC = self.latents(img_BHWC)
        ids_Bhw = self.lookup(latents_BhwC)
        quantised_BhwC = quantize.straight_through(latents_BhwC, self.codes()[ids_Bhw])
        return Reconstruction(self._decode(quantised_BhwC), ids_Bhw, latents_BhwC, quantised_BhwC)

    def _decode(self, codes_BhwC: Any) -> Float[Array, 'B H W 3']:
        return self.decoder(codes_BhwC.astype(self.config.dtype)).astype(jnp.float32)


def _blocks(inputs: int, outputs: int, depth: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([ResBlock(inputs if i == 0 else outputs, outputs, rngs=rngs) for i in range(depth)])


def _run(blocks: nnx.List, x_BHWC: Array) -> Array:
    for block in blocks:
        x_BHWC = block(x_BHWC)
    return x_BHWC


def _double(x_BHWC: Array) -> Array:
    """Nearest-neighbour upsampling by 2, as one broadcast."""
    batch, height, width, channels = x_BHWC.shape
    x_B = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x_B.reshape(batch, 2 * height, 2 * width, channels)
