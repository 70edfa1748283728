"""Convolutions of pictures, plain or of the picture doubled, which is one transposed convolution on accelerators.

Kernels are split by output channels over 'fsdp'; the pictures of a batch stay split, or the compiler would gather them
and split their channels instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from muse.nn.layers import param, split_rows

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


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
        x_BHWC = split_rows(x_BHWC)
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, 'SAME', dimension_numbers=_DIMENSIONS) + bias


class UpConv(Conv):
    """A 3x3 convolution of the picture doubled by nearest neighbour."""

    def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B h w c']:
        return _up_convolve(split_rows(x_BHWC), self.kernel[...]) + self.bias[...].astype(x_BHWC.dtype)


def enlarge(x_BhwC: Array, times: int) -> Array:
    """Nearest-neighbour upsampling, as one broadcast."""
    batch, height, width, channels = x_BhwC.shape
    x = jnp.broadcast_to(x_BhwC[:, :, None, :, None], (batch, height, times, width, times, channels))
    return x.reshape(batch, times * height, times * width, channels)


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
