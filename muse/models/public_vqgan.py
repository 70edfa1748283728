"""The VQGAN that others published (Esser et al. 2021; as in latent diffusion, MoVQ and diffusers' VQModel).

It can stand in the place of `muse.models.vqgan.VQGAN`, the paper's own tokenizer (§2.2). What differs, since published
weights were trained with it: groups of a fixed number, attention in the middle and at chosen levels, 1x1 convolutions
on both sides of the codebook, one more block a level in the decoder, and in MoVQ (Zheng et al. 2022) decoder norms that
the codes scale and shift.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from muse.config import PublicVQConfig
from muse.models.quantizers import Learned
from muse.models.vqgan import VQTokenizer
from muse.nn.convolutions import Conv, enlarge
from muse.nn.layers import param

_EPSILON = 1e-6


class Norm(nnx.Module):
    """Group norm in float32, variance in a second pass as PyTorch has it; with `code_dim` scaled by the codes."""

    def __init__(self, channels: int, groups: int, code_dim: int | None, *, rngs: nnx.Rngs):
        self.groups = groups
        self.scale = param(nnx.initializers.ones, rngs, (channels,), ('norm',))
        self.bias = param(nnx.initializers.zeros, rngs, (channels,), ('norm',))
        self.gain = None if code_dim is None else Conv(code_dim, channels, 1, rngs=rngs)
        self.shift = None if code_dim is None else Conv(code_dim, channels, 1, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, 'B H W C'], codes_BhwE: Array | None) -> Float[Array, 'B H W C']:
        grouped = x_BHWC.astype(jnp.float32).reshape(*x_BHWC.shape[:3], self.groups, -1)
        centred = grouped - jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(1, 2, 4), keepdims=True)
        y_BHWC = (centred * jax.lax.rsqrt(variance + _EPSILON)).reshape(x_BHWC.shape)
        y_BHWC = (y_BHWC * self.scale[...] + self.bias[...]).astype(x_BHWC.dtype)
        if self.gain is None or self.shift is None:
            return y_BHWC
        assert codes_BhwE is not None
        times = x_BHWC.shape[1] // codes_BhwE.shape[1]
        return y_BHWC * enlarge(self.gain(codes_BhwE), times) + enlarge(self.shift(codes_BhwE), times)


class Block(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, code_dim: int | None, *, rngs: nnx.Rngs):
        self.norm1 = Norm(inputs, groups, code_dim, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = Norm(outputs, groups, code_dim, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_BHWC: Float[Array, 'B H W C'], codes_BhwE: Array | None) -> Float[Array, 'B H W c']:
        y_BHWC = self.conv1(jax.nn.silu(self.norm1(x_BHWC, codes_BhwE)))
        y_BHWC = self.conv2(jax.nn.silu(self.norm2(y_BHWC, codes_BhwE)))
        return y_BHWC + (x_BHWC if self.shortcut is None else self.shortcut(x_BHWC))


class Attention(nnx.Module):
    """x + attention of every place to every other, one head, softmax in float32."""

    def __init__(self, channels: int, groups: int, code_dim: int | None, *, rngs: nnx.Rngs):
        self.norm = Norm(channels, groups, code_dim, rngs=rngs)
        self.query = Conv(channels, channels, 1, rngs=rngs)
        self.key = Conv(channels, channels, 1, rngs=rngs)
        self.value = Conv(channels, channels, 1, rngs=rngs)
        self.out = Conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, 'B H W C'], codes_BhwE: Array | None) -> Float[Array, 'B H W C']:
        y_BHWC, (batch, height, width, channels) = self.norm(x_BHWC, codes_BhwE), x_BHWC.shape
        q_BTC, k_BTC, v_BTC = (
            part(y_BHWC).reshape(batch, height * width, channels) for part in (self.query, self.key, self.value)
        )
        scores_BTT = jnp.einsum('btc,bsc->bts', q_BTC, k_BTC, preferred_element_type=jnp.float32) * channels**-0.5
        mixed_BTC = jnp.einsum('bts,bsc->btc', jax.nn.softmax(scores_BTT, axis=-1).astype(x_BHWC.dtype), v_BTC)
        return x_BHWC + self.out(mixed_BTC.reshape(x_BHWC.shape))


class Middle(nnx.Module):
    """Block, attention where the config has it, block; at the coarsest level."""

    def __init__(self, config: PublicVQConfig, code_dim: int | None, *, rngs: nnx.Rngs):
        width, groups = config.level_channels[-1], config.norm_groups
        self.block1 = Block(width, width, groups, code_dim, rngs=rngs)
        self.attention = Attention(width, groups, code_dim, rngs=rngs) if config.middle_attention else None
        self.block2 = Block(width, width, groups, code_dim, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, 'B H W C'], codes_BhwE: Array | None) -> Float[Array, 'B H W C']:
        x_BHWC = self.block1(x_BHWC, codes_BhwE)
        x_BHWC = x_BHWC if self.attention is None else self.attention(x_BHWC, codes_BhwE)
        return self.block2(x_BHWC, codes_BhwE)


class Level(nnx.Module):
    """The blocks of one resolution, each followed by attention or none, and the convolution of a change of size."""

    def __init__(
        self,
        widths: tuple[int, int],
        depth: int,
        attention: bool,
        groups: int,
        code_dim: int | None,
        resize: Conv | None,
        *,
        rngs: nnx.Rngs,
    ):
        inputs, outputs = widths
        self.blocks = nnx.List(
            [Block(inputs if j == 0 else outputs, outputs, groups, code_dim, rngs=rngs) for j in range(depth)]
        )
        self.attentions = nnx.List(
            [Attention(outputs, groups, code_dim, rngs=rngs) for _ in range(depth if attention else 0)]
        )
        self.resize = resize

    def __call__(self, x_BHWC: Float[Array, 'B H W C'], codes_BhwE: Array | None) -> Float[Array, 'B H W c']:
        for j, block in enumerate(self.blocks):
            x_BHWC = block(x_BHWC, codes_BhwE)
            if self.attentions:
                x_BHWC = self.attentions[j](x_BHWC, codes_BhwE)
        return x_BHWC


class Encoder(nnx.Module):
    """Pixels → latents, before the 1x1 convolution into the code space."""

    def __init__(self, config: PublicVQConfig, *, rngs: nnx.Rngs):
        widths, last = config.level_channels, len(config.level_channels) - 1
        self.conv_in = Conv(3, widths[0], rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    (widths[max(i - 1, 0)], width), config.num_res_blocks, config.encoder_attention[i],
                    config.norm_groups, None, Conv(width, width, stride=2, rngs=rngs) if i < last else None, rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )  # fmt: skip
        self.middle = Middle(config, None, rngs=rngs)
        self.norm_out = Norm(widths[-1], config.norm_groups, None, rngs=rngs)
        self.conv_out = Conv(widths[-1], config.latent_dim, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w Z']:
        x_BHWC = self.conv_in(x_BHWC)
        for level in self.levels:
            x_BHWC = level(x_BHWC, None)
            # On even sides 'SAME' pads below and to the right alone, as these models do.
            x_BHWC = x_BHWC if level.resize is None else level.resize(x_BHWC)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x_BHWC, None), None)))


class Decoder(nnx.Module):
    """Latents (and, in MoVQ, the codes they were made from) → pixels. Its levels run from the coarsest."""

    def __init__(self, config: PublicVQConfig, *, rngs: nnx.Rngs):
        widths, last = config.level_channels[::-1], len(config.level_channels) - 1
        code_dim = config.code_dim if config.spatial_norm else None
        self.conv_in = Conv(config.latent_dim, widths[0], rngs=rngs)
        self.middle = Middle(config, code_dim, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    (widths[max(i - 1, 0)], width), config.num_res_blocks + 1, config.decoder_attention[last - i],
                    config.norm_groups, code_dim, Conv(width, width, rngs=rngs) if i < last else None, rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )  # fmt: skip
        self.norm_out = Norm(widths[-1], config.norm_groups, code_dim, rngs=rngs)
        self.conv_out = Conv(widths[-1], 3, rngs=rngs)

    def __call__(self, z_BhwZ: Float[Array, 'B h w Z'], codes_BhwE: Float[Array, 'B h w E']) -> Float[Array, 'B H W 3']:
        x_BHWC = self.middle(self.conv_in(z_BhwZ), codes_BhwE)
        for level in self.levels:
            x_BHWC = level(x_BHWC, codes_BhwE)
            x_BHWC = x_BHWC if level.resize is None else level.resize(enlarge(x_BHWC, 2))
        return self.conv_out(jax.nn.silu(self.norm_out(x_BHWC, codes_BhwE)))


class PublicVQGAN(VQTokenizer):
    """Encoder, codebook, decoder, and the 1x1 convolutions on both sides of the codebook."""

    def __init__(self, config: PublicVQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.quantizer = Learned(l2_normalize=False)
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Conv(config.latent_dim, config.code_dim, 1, rngs=rngs)
        self.codebook = param(nnx.initializers.normal(1.0), rngs, (config.codebook_size, config.code_dim), (None, None))
        self.post_quant_conv = Conv(config.code_dim, config.latent_dim, 1, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def _run_encoder(self, x_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w E']:
        return self.quant_conv(self.encoder(x_BHWC))

    def _run_decoder(self, codes_BhwE: Float[Array, 'B h w E']) -> Float[Array, 'B H W 3']:
        return self.decoder(self.post_quant_conv(codes_BhwE), codes_BhwE)
