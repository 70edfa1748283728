"""Root-mean-square norms, alone or with the residual stream they read, and their gradients in the fewest passes.

Between its products a transformer layer only passes over memory, and the passes are what it costs. So a sum and its
norm are one function, whose gradient adds the stream's own to the norm's, and nothing but the stream is kept for it. On
a GPU each direction is one kernel (`muse.nn.norm_kernels`), where it takes the shape; elsewhere, and where no gradient
is asked for, plain JAX. Statistics are float32 whatever the type of x.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muse.nn import norm_kernels


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, '... D'], scale_D: Float[Array, ' D'], epsilon: float) -> Float[Array, '... D']:
    """x over the root of the mean of its squares along the last axis, times `scale_D`."""
    return _normed(x, scale_D, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def norm_beside(x: Float[Array, '... D'], scale_D: Float[Array, ' D'], epsilon: float) -> tuple[Array, Array]:
    """(x, its norm)."""
    return x, _normed(x, scale_D, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_after(
    x: Float[Array, '... D'], more: Float[Array, '... D'], scale_D: Float[Array, ' D'], epsilon: float
) -> tuple[Array, Array]:
    """(x + more, the norm of the sum)."""
    total = x + more
    return total, _normed(total, scale_D, epsilon)


def _normed(x, scale_D, epsilon):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale_D).astype(x.dtype)


def _forward(x, more, scale_D, epsilon):
    """(x + more, its norm); `more` may be None."""
    if norm_kernels.takes(x):
        return norm_kernels.forward(x, more, scale_D, epsilon)
    total = x if more is None else x + more
    return total, _normed(total, scale_D, epsilon)


def _backward(epsilon, residuals, grad, stream_grad=None):
    """Gradients of x, with the stream's own added, and of the scale."""
    x, scale_D = residuals
    if norm_kernels.takes(x):
        return norm_kernels.backward(x, scale_D, grad, stream_grad, epsilon)
    x32, grad32 = x.astype(jnp.float32), grad.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    scaled = grad32 * scale_D
    along = jnp.mean(scaled * x32, axis=-1, keepdims=True) * inverse**2
    grad_x = inverse * (scaled - x32 * along)
    if stream_grad is not None:
        grad_x = grad_x + stream_grad.astype(jnp.float32)
    grad_scale_D = jnp.sum(grad32 * x32 * inverse, axis=tuple(range(x.ndim - 1)))
    return grad_x.astype(x.dtype), grad_scale_D.astype(scale_D.dtype)


def _rms_norm_forward(x, scale_D, epsilon):
    return _forward(x, None, scale_D, epsilon)[1], (x, scale_D)


def _rms_norm_backward(epsilon, residuals, grad):
    return _backward(epsilon, residuals, grad)


def _norm_beside_forward(x, scale_D, epsilon):
    return _forward(x, None, scale_D, epsilon), (x, scale_D)


def _norm_beside_backward(epsilon, residuals, grads):
    return _backward(epsilon, residuals, grads[1], grads[0])


def _norm_after_forward(x, more, scale_D, epsilon):
    total, normed = _forward(x, more, scale_D, epsilon)
    return (total, normed), (total, scale_D)


def _norm_after_backward(epsilon, residuals, grads):
    grad_total, grad_scale_D = _backward(epsilon, residuals, grads[1], grads[0])
    return grad_total, grad_total, grad_scale_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
norm_beside.defvjp(_norm_beside_forward, _norm_beside_backward)
norm_after.defvjp(_norm_after_forward, _norm_after_backward)
