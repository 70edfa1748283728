"""The adversary of the tokenizer (§2.2): a PatchGAN critic, its losses, and the R1 penalty on real pictures.

Each logit judges one patch of the picture (70 pixels wide). GroupNorm in place of batch norm: a score then depends on
its own picture alone, whatever the batch or the number of devices. The paper gives the weight of the adversarial loss
(0.1, Table 5) and leaves the form open; it is the non-saturating one here, as in MaskGIT's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from muse.config import Dtype
from muse.nn.convolutions import Conv
from muse.nn.group_norm import GroupNorm
from muse.nn.rows import mean_rows, weigh

_LEAK = 0.2


class Discriminator(nnx.Module):
    """Pictures in [-1, 1] `[B, H, W, 3]` → logits `[B, H/8, W/8]`, float32; above 0 is "real"."""

    def __init__(self, channels: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.conv_in = Conv(3, channels, 4, stride=2, rngs=rngs)
        widths = [channels, 2 * channels, 4 * channels, 8 * channels]
        strides = (2, 2, 1)
        self.convs = nnx.List(
            [Conv(widths[i], widths[i + 1], 4, stride=stride, rngs=rngs) for i, stride in enumerate(strides)]
        )
        self.norms = nnx.List([GroupNorm(width, rngs=rngs) for width in widths[1:]])
        self.conv_out = Conv(widths[-1], 1, 4, rngs=rngs)
        self.dtype: Dtype = dtype

    def __call__(self, img_BHWC: Float[Array, 'B H W 3']) -> Float[Array, 'B h w']:
        x_BHWC = jax.nn.leaky_relu(self.conv_in(img_BHWC.astype(self.dtype)), _LEAK)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = jax.nn.leaky_relu(norm(conv(x_BHWC)), _LEAK)
        return self.conv_out(x_BHWC)[..., 0].astype(jnp.float32)


def generator_loss(fake: Float[Array, 'B h w'], weight_B: Float[Array, ' B'] | None = None) -> Float[Array, '']:
    """Non-saturating loss of the tokenizer, over the logits of its reconstructions; `weight_B`: how rows count."""
    return mean_rows(jax.nn.softplus(-fake), weight_B)


def discriminator_loss(
    real: Float[Array, 'B h w'], fake: Float[Array, 'B h w'], weight_B: Float[Array, ' B'] | None = None
) -> Float[Array, '']:
    """Logistic loss of the critic; 2 ln 2 when it cannot tell."""
    return mean_rows(jax.nn.softplus(-real), weight_B) + mean_rows(jax.nn.softplus(fake), weight_B)


def r1_penalty(
    score: Callable[[Array], Array], real_BHWC: Float[Array, 'B H W 3'], weight_B: Float[Array, ' B'] | None = None
) -> Float[Array, '']:
    """½·|∇ score|² at real pictures, for an average patch: the squared gradient of the summed logits over their number.

    Args:
        score: pictures → logits `[B, h, w]`.
        real_BHWC: the real pictures.
        weight_B: how they count; None: all alike.
    """
    logits_Bhw, pull = jax.vjp(score, real_BHWC)
    (grad_BHWC,) = pull(jnp.ones_like(logits_Bhw))
    return 0.5 * jnp.sum(weigh(jnp.square(grad_BHWC.astype(jnp.float32)), weight_B)) / logits_Bhw.size


def lecam_penalty(
    real: Float[Array, 'B h w'],
    fake: Float[Array, 'B h w'],
    means: Float[Array, 2],
    weight_B: Float[Array, ' B'] | None = None,
) -> Float[Array, '']:
    """LeCam regularisation: squares of how far logits of one side run beyond the average of the other.

    Args:
        real: logits of real pictures.
        fake: logits of reconstructions.
        means: averages over earlier steps of the logits of real pictures and of reconstructions.
        weight_B: how rows count; None: all alike.
    """
    beyond = jnp.square(jax.nn.relu(real - means[1])), jnp.square(jax.nn.relu(means[0] - fake))
    return mean_rows(beyond[0], weight_B) + mean_rows(beyond[1], weight_B)
