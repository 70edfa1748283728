"""The VQGAN tokenizer (§2.2, Table 5): pictures to a grid of code ids and back, fully convolutional, no attention.

Residual blocks of GroupNorm, swish and 3x3 convolutions, as in the tokenizer of MaskGIT; every resolution but the
last ends in a stride-2 convolution (encoder) or begins with nearest-neighbour doubling and a convolution (decoder).
The decoder may be larger than the encoder (appendix A.2). A linear 1x1 convolution leads into the code space.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from muse.config import PublicVQConfig, VQConfig
from muse.errors import UserError
from muse.models import quantize
from muse.models.quantizers import Quantizer, make_quantizer
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


class UpConv(Conv):
    """A 3x3 convolution of the picture doubled by nearest neighbour."""

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B h w c']:
        return _up_convolve(x_BHWC, self.kernel[...]) + self.bias[...].astype(x_BHWC.dtype)


def _convolve_doubled(x_BHWC: Array, kernel: Array) -> Array:
    kernel = kernel.astype(x_BHWC.dtype)
    return jax.lax.conv_general_dilated(enlarge(x_BHWC, 2), kernel, (1, 1), 'SAME', dimension_numbers=_DIMENSIONS)


def _strided_kernel(kernel: Array) -> Array:
    """The 4x4 kernel, in and out exchanged, of the stride-2 convolution whose transpose doubles and convolves.

    Doubling is a 2x2 box over a picture with zeros between its pixels; the box and the 3x3 kernel make one of 4x4.
    """
    padded = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
    # Taps are turned round by stacking: XLA knows a transposed convolution on GPUs by a reversal of its own.
    rows = jnp.stack([padded[3 - i] + padded[4 - i] for i in range(4)])
    return jnp.stack([rows[:, 3 - i] + rows[:, 4 - i] for i in range(4)], axis=1).swapaxes(2, 3)


def _shrink(y_BHWC: Array, strided: Array) -> Array:
    padding = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(y_BHWC, strided, (2, 2), padding, dimension_numbers=_DIMENSIONS)


def _convolve_doubled_merged(x_BHWC: Array, kernel: Array) -> Array:
    """`_convolve_doubled` as one transposed convolution: 4 of 9 products, and the doubled picture is never written."""
    batch, height, width, _ = x_BHWC.shape
    doubled = jnp.zeros((batch, 2 * height, 2 * width, kernel.shape[-1]), x_BHWC.dtype)
    strided = _strided_kernel(kernel).astype(x_BHWC.dtype)
    return jax.vjp(lambda y_BHWC: _shrink(y_BHWC, strided), doubled)[1](x_BHWC)[0]


def _convolve_doubled_merged_backward(x_BHWC: Array, kernel: Array, grad_BHWC: Array) -> tuple[Array, Array]:
    """Gradients as those of the stride-2 convolution, in the forms that GPUs have kernels for."""
    strided, pull_kernel = jax.vjp(lambda kernel: _strided_kernel(kernel).astype(x_BHWC.dtype), kernel)
    dx_BHWC, pull = jax.vjp(_shrink, grad_BHWC, strided)
    return dx_BHWC, pull_kernel(pull(x_BHWC)[1])[0]


def _convolve_doubled_backward(x_BHWC: Array, kernel: Array, grad_BHWC: Array) -> tuple[Array, Array]:
    return jax.vjp(_convolve_doubled, x_BHWC, kernel)[1](grad_BHWC)


@jax.custom_vjp
def _up_convolve(x_BHWC: Array, kernel: Array) -> Array:
    # On a CPU zeros between pixels are multiplied like any other number: there the picture is doubled first.
    return jax.lax.platform_dependent(x_BHWC, kernel, cpu=_convolve_doubled, default=_convolve_doubled_merged)


def _up_convolve_forward(x_BHWC, kernel):
    return _up_convolve(x_BHWC, kernel), (x_BHWC, kernel)


def _up_convolve_backward(residuals, grad_BHWC):
    """Of the platform's own form. JAX's rule for a choice of forms would keep what the backward pass of each needs."""
    forms = {'cpu': _convolve_doubled_backward, 'default': _convolve_doubled_merged_backward}
    return jax.lax.platform_dependent(*residuals, grad_BHWC, **forms)


_up_convolve.defvjp(_up_convolve_forward, _up_convolve_backward)


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
        mean_BC, inverse_BC = _moments(x_BHWC, self.groups, self.epsilon)
        return _affine(x_BHWC, mean_BC, inverse_BC, self.scale[...], self.bias[...]).astype(x_BHWC.dtype)

    def swish(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        """swish(norm(x)), with a backward pass that keeps nothing of the picture's size but x."""
        with jax.named_scope('norm'):
            return _norm_swish(x_BHWC, self.scale[...], self.bias[...], self.groups, self.epsilon)


def _moments(x_BHWC: Array, groups: int, epsilon: float) -> tuple[Array, Array]:
    """Mean and inverse deviation of each channel's group, both `[B, C]` float32."""
    batch, channels = x_BHWC.shape[0], x_BHWC.shape[-1]
    x32 = x_BHWC.astype(jnp.float32)
    # Both moments in one reading of the picture; per channel first, since groups are only a few channels.
    moments_2BC = jnp.stack([jnp.mean(x32, axis=(1, 2)), jnp.mean(jnp.square(x32), axis=(1, 2))])
    moments_2BG = jnp.mean(moments_2BC.reshape(2, batch, groups, channels // groups), axis=-1)
    variance_BG = jnp.maximum(moments_2BG[1] - jnp.square(moments_2BG[0]), 0.0)
    inverse_BC = jnp.repeat(jax.lax.rsqrt(variance_BG + epsilon), channels // groups, axis=-1)
    return jnp.repeat(moments_2BG[0], channels // groups, axis=-1), inverse_BC


def _affine(x_BHWC: Array, mean_BC: Array, inverse_BC: Array, scale_C: Array, bias_C: Array) -> Array:
    """The normalised picture, scaled and shifted, float32."""
    gain_BC = inverse_BC * scale_C
    offset_BC = bias_C - mean_BC * gain_BC
    return x_BHWC.astype(jnp.float32) * gain_BC[:, None, None] + offset_BC[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm_swish(x_BHWC: Array, scale_C: Array, bias_C: Array, groups: int, epsilon: float) -> Array:
    return _norm_swish_forward(x_BHWC, scale_C, bias_C, groups, epsilon)[0]


def _norm_swish_forward(x_BHWC, scale_C, bias_C, groups, epsilon):
    mean_BC, inverse_BC = _moments(x_BHWC, groups, epsilon)
    y_BHWC = jax.nn.silu(_affine(x_BHWC, mean_BC, inverse_BC, scale_C, bias_C)).astype(x_BHWC.dtype)
    return y_BHWC, (x_BHWC, mean_BC, inverse_BC, scale_C, bias_C)


def _norm_swish_backward(groups, epsilon, residuals, grad_BHWC):
    """Two readings of the picture and of its gradient: one for sums over them, one to write the result."""
    del epsilon
    x_BHWC, mean_BC, inverse_BC, scale_C, bias_C = residuals
    batch, height, width, channels = x_BHWC.shape

    def inner() -> Array:
        """Gradient at the input of the swish."""
        u_BHWC = _affine(x_BHWC, mean_BC, inverse_BC, scale_C, bias_C)
        share_BHWC = jax.nn.sigmoid(u_BHWC)
        return grad_BHWC.astype(jnp.float32) * share_BHWC * (1.0 + u_BHWC * (1.0 - share_BHWC))

    du_BHWC, x32 = inner(), x_BHWC.astype(jnp.float32)
    sum_BC = jnp.sum(du_BHWC, axis=(1, 2))
    dot_BC = (jnp.sum(du_BHWC * x32, axis=(1, 2)) - mean_BC * sum_BC) * inverse_BC  # with the normalised picture

    def group_mean(x_BC: Array) -> Array:
        size = channels // groups
        mean_BG = jnp.mean(x_BC.reshape(batch, groups, size), axis=-1) / (height * width)
        return jnp.repeat(mean_BG, size, axis=-1)

    # d/dx of the norm: scale·inverse·du less its part along 1 and along the normalised picture.
    along_BC = group_mean(dot_BC * scale_C) * inverse_BC
    gain_BC = scale_C * inverse_BC
    slope_BC = -along_BC * inverse_BC
    offset_BC = -inverse_BC * group_mean(sum_BC * scale_C) - slope_BC * mean_BC
    dx_BHWC = du_BHWC * gain_BC[:, None, None] + x32 * slope_BC[:, None, None] + offset_BC[:, None, None]
    return dx_BHWC.astype(x_BHWC.dtype), jnp.sum(dot_BC, axis=0), jnp.sum(sum_BC, axis=0)


_norm_swish.defvjp(_norm_swish_forward, _norm_swish_backward)


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


def enlarge(x_BhwC: Array, times: int) -> Array:
    """Nearest-neighbour upsampling, as one broadcast."""
    batch, height, width, channels = x_BhwC.shape
    x = jnp.broadcast_to(x_BhwC[:, :, None, :, None], (batch, height, times, width, times, channels))
    return x.reshape(batch, times * height, times * width, channels)
