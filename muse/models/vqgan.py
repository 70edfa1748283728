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

from muse.config import PublicVQConfig, VQConfig
from muse.errors import UserError
from muse.models import quantize
from muse.models.quantizers import Quantizer, make_quantizer
from muse.nn.convolutions import Conv, UpConv
from muse.nn.group_norm import GroupNorm
from muse.nn.layers import param


def to_float(img_BHWC: UInt8[Array, '... H W 3']) -> Float[Array, '... H W 3']:
    """uint8 pixels 0..255 → float32 in [-1, 1]."""
    return img_BHWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(img_BHWC: Float[Array, '... H W 3']) -> UInt8[Array, '... H W 3']:
    """Float pixels, clipped to [-1, 1] → uint8 0..255, rounded."""
    clipped = jnp.clip(img_BHWC.astype(jnp.float32), -1.0, 1.0)
    return jnp.round((clipped + 1.0) * 127.5).astype(jnp.uint8)


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, rngs=rngs, scale=0.5)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B H W c']:
        y_BHWC = self.conv1(self.norm1.swish(x_BHWC))
        y_BHWC = self.conv2(self.norm2.swish(y_BHWC))
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
        return self.conv_out(self.norm_out.swish(_run(self.middle, x_BHWC)))


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
                ups.append(UpConv(width, width, rngs=rngs))
            levels.append(_blocks(width, channels * mult, depth, rngs))
            width = channels * mult
        self.levels, self.ups = nnx.List(levels), nnx.List(ups)
        self.norm_out = GroupNorm(width, rngs=rngs)
        self.conv_out = Conv(width, 3, rngs=rngs)

    def __call__(self, x_BhwC: Float[Array, 'B h w C']) -> Float[Array, 'B H W 3']:
        x_BHWC = _run(self.middle, self.conv_in(x_BhwC))
        for level, blocks in enumerate(self.levels):
            if level > 0:
                x_BHWC = self.ups[level - 1](x_BHWC)
            x_BHWC = _run(blocks, x_BHWC)
        return self.conv_out(self.norm_out.swish(x_BHWC))


class Reconstruction(NamedTuple):
    """What one pass through the tokenizer gives."""

    img_BHWC: Float[Array, 'B H W 3']  # float32, not clipped
    ids_Bhw: Int[Array, 'B h w']
    latents_BhwC: Float[Array, 'B h w C']  # float32, as they are compared with the codes
    quantised_BhwC: Float[Array, 'B h w C']  # the codes in value, the latents in gradient: what was decoded


def _check(config: VQConfig) -> None:
    """Raises UserError when a size of the model is out of range."""
    sizes = {name: getattr(config, name) for name in ('channels', 'num_res_blocks', 'codebook_size', 'code_dim')}
    sizes |= {f'channel_mult[{i}]': mult for i, mult in enumerate(config.channel_mult or (0,))}
    for name in ('decoder_channels', 'decoder_num_res_blocks'):
        if getattr(config, name) is not None:
            sizes[name] = getattr(config, name)
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f'model.{name} is {size}: give at least 1')


class VQTokenizer(nnx.Module):
    """What all tokenizers share: encoder outputs, the codes nearest to them, and pictures of codes.

    Pixels are floats in [-1, 1]; both sides must be multiples of `config.factor`.
    """

    config: VQConfig | PublicVQConfig
    quantizer: Quantizer
    codebook: nnx.Param | None  # None: the quantizer's table is fixed
    encoder: Any
    decoder: Any

    def _run_encoder(self, x_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
        """Pictures → encoder outputs in the code space, in the compute dtype."""
        return self.encoder(x_BHWC)

    def _run_decoder(self, codes_BhwC: Float[Array, 'B h w C']) -> Float[Array, 'B H W 3']:
        """Codes → pictures, in the compute dtype."""
        return self.decoder(codes_BhwC)

    def codes(self) -> Float[Array, 'V C']:
        """The codebook as it is compared and decoded, float32; of unit length when config.l2_normalize."""
        return self.quantizer.codes(None if self.codebook is None else self.codebook[...])

    def latents(self, img_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
        """Encoder outputs in the space of the codes, before quantisation, float32.

        Raises:
            UserError: the picture's sides are not multiples of the downsampling factor.
        """
        height, width, factor = img_BHWC.shape[1], img_BHWC.shape[2], self.config.factor
        if height % factor or width % factor:
            raise UserError(
                f'a picture of {height}x{width} pixels does not divide into tokens of {factor}x{factor}: '
                f'resize or crop both sides to multiples of {factor}'
            )
        with jax.named_scope('encoder'):
            z_BhwC = self._run_encoder(img_BHWC.astype(self.config.dtype)).astype(jnp.float32)
        return self.quantizer.project(z_BhwC)

    def lookup(self, latents_BhwC: Float[Array, 'B h w C']) -> Int[Array, 'B h w']:
        """Ids of the codes nearest to latents."""
        flat_NC = latents_BhwC.reshape(-1, latents_BhwC.shape[-1])
        with jax.named_scope('search'):
            ids_N = self.quantizer.ids(*jax.lax.stop_gradient((flat_NC, self.codes())))
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
        with jax.named_scope('decoder'):
            return self._run_decoder(codes_BhwC.astype(self.config.dtype)).astype(jnp.float32)


class VQGAN(VQTokenizer):
    """The paper's tokenizer.

    Raises:
        UserError: sizes that are out of range, or do not fit the quantizer.
    """

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        _check(config)
        self.config = config
        self.quantizer = make_quantizer(config)
        self.encoder = Encoder(config, rngs=rngs)
        shape = (config.codebook_size, config.code_dim)
        learned = self.quantizer.learned
        self.codebook = param(nnx.initializers.normal(1.0), rngs, shape, (None, None)) if learned else None
        self.decoder = Decoder(config, rngs=rngs)


def _blocks(inputs: int, outputs: int, depth: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([ResBlock(inputs if i == 0 else outputs, outputs, rngs=rngs) for i in range(depth)])


def _run(blocks: nnx.List, x_BHWC: Array) -> Array:
    for block in blocks:
        x_BHWC = block(x_BHWC)
    return x_BHWC
