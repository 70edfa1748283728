"""Group norm of pictures, alone or with the swish behind it, and its gradients in two readings of the picture."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from muse.nn.layers import param


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

    def inner(x_BHWC: Array, grad_BHWC: Array) -> Array:
        """Gradient at the input of the swish."""
        u_BHWC = _affine(x_BHWC, mean_BC, inverse_BC, scale_C, bias_C)
        share_BHWC = jax.nn.sigmoid(u_BHWC)
        return grad_BHWC.astype(jnp.float32) * share_BHWC * (1.0 + u_BHWC * (1.0 - share_BHWC))

    du_BHWC = inner(x_BHWC, grad_BHWC)
    sum_BC, product_BC = jnp.sum(du_BHWC, axis=(1, 2)), jnp.sum(du_BHWC * x_BHWC.astype(jnp.float32), axis=(1, 2))
    dot_BC = (product_BC - mean_BC * sum_BC) * inverse_BC  # with the normalised picture
    # Behind the barrier it is computed again. XLA would else keep it in float32, twice the bytes of what it is made of.
    x_BHWC, grad_BHWC, sum_BC, dot_BC = jax.lax.optimization_barrier((x_BHWC, grad_BHWC, sum_BC, dot_BC))

    def group_mean(x_BC: Array) -> Array:
        size = channels // groups
        mean_BG = jnp.mean(x_BC.reshape(batch, groups, size), axis=-1) / (height * width)
        return jnp.repeat(mean_BG, size, axis=-1)

    # d/dx of the norm: scale·inverse·du less its part along 1 and along the normalised picture.
    along_BC = group_mean(dot_BC * scale_C) * inverse_BC
    gain_BC = scale_C * inverse_BC
    slope_BC = -along_BC * inverse_BC
    offset_BC = -inverse_BC * group_mean(sum_BC * scale_C) - slope_BC * mean_BC
    du_BHWC = inner(x_BHWC, grad_BHWC) * gain_BC[:, None, None]
    dx_BHWC = du_BHWC + x_BHWC.astype(jnp.float32) * slope_BC[:, None, None] + offset_BC[:, None, None]
    return dx_BHWC.astype(x_BHWC.dtype), jnp.sum(dot_BC, axis=0), jnp.sum(sum_BC, axis=0)


_norm_swish.defvjp(_norm_swish_forward, _norm_swish_backward)
