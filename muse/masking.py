"""The training side of masked modelling (§2.3, §2.4, §2.6, §2.7): masks, loss, dropped texts, corrupted tokens.

Row i of a batch draws from `fold_in(key, i)`, so that a row's mask is the same on any mesh and in any batch size.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def row_keys(key: Key[Array, ''], rows: int) -> Key[Array, ' B']:
    """One key a row: `fold_in(key, row)`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))


def mask_ratio(key: Key[Array, ''], rows: int) -> Float[Array, ' B']:
    """Mask ratios with density (2/π)(1−r²)^(−1/2) on [0, 1], mean 2/π (§2.6): r = cos(πu/2), u uniform."""
    uniform_B = jax.vmap(jax.random.uniform)(row_keys(key, rows))
    return jnp.cos(0.5 * jnp.pi * uniform_B)


def random_mask(key: Key[Array, ''], ratio_B: Float[Array, ' B'], tokens: int) -> Bool[Array, 'B T']:
    """Masks round(ratio·T) tokens of each row (at least one), every subset equally likely."""
    count_B = jnp.clip(jnp.round(ratio_B * tokens), 1, tokens).astype(jnp.int32)
    noise_BT = jax.vmap(lambda k: jax.random.uniform(k, (tokens,)))(row_keys(key, ratio_B.shape[0]))
    rank_BT = jnp.argsort(jnp.argsort(noise_BT, axis=1), axis=1)
    return rank_BT < count_B[:, None]


def drop_text(key: Key[Array, ''], len_B: Int[Array, ' B'], rate: float) -> Int[Array, ' B']:
    """Lengths with a share `rate` of them set to 0, which is "no text": what guidance trains on (§2.7)."""
    dropped_B = jax.vmap(jax.random.uniform)(row_keys(key, len_B.shape[0])) < rate
    return jnp.where(dropped_B, 0, len_B)


def corrupt_tokens(
    key: Key[Array, ''], tok_BT: Int[Array, 'B T'], most: float, codebook_size: int
) -> Int[Array, 'B T']:
    """Replaces tokens by random codes: each row a share of its own, drawn evenly from 0 to `most`.

    The super-res reads true low-res tokens in training and sampled ones afterwards, which are wrong here and there:
    so it learns not to trust each of them.
    """

    def row(key, tok_T):
        share_key, place_key, code_key = jax.random.split(key, 3)
        share = jax.random.uniform(share_key, (), maxval=most)
        random_T = jax.random.randint(code_key, tok_T.shape, 0, codebook_size, tok_T.dtype)
        return jnp.where(jax.random.uniform(place_key, tok_T.shape) < share, random_T, tok_T)

    return jax.vmap(row)(row_keys(key, tok_BT.shape[0]), tok_BT)


def masked_ce(
    logits_BTV: Float[Array, 'B T V'],
    tok_BT: Int[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    label_smoothing: float = 0.0,
) -> Float[Array, ' B']:
    """Cross-entropy of the masked tokens in nats per token, one mean for each example (§2.3).

    Args:
        logits_BTV: over the codebook, any float dtype; the softmax is taken in float32.
        tok_BT: true ids. A row with nothing masked gives 0.
        mask_BT: True where the model had to guess.
        label_smoothing: share of the target spread evenly over the codebook.
    """
    with jax.named_scope('loss'):
        return _masked_mean(smoothed_ce(logits_BTV, tok_BT, label_smoothing), mask_BT)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def smoothed_ce(
    logits_BTV: Float[Array, 'B T V'], tok_BT: Int[Array, 'B T'], label_smoothing: float
) -> Float[Array, 'B T']:
    """Cross-entropy of each token in nats, float32; the target is the id with `label_smoothing` spread over all.

    Its backward pass writes the logits' gradient once, in their own type; derived by JAX it holds several arrays of
    their size in float32 and scatters into one of them.
    """
    return _smoothed_ce_forward(logits_BTV, tok_BT, label_smoothing)[0]


def _smoothed_ce_forward(logits_BTV, tok_BT, label_smoothing):
    logits32_BTV = logits_BTV.astype(jnp.float32)
    norm_BT = jax.nn.logsumexp(logits32_BTV, axis=-1)
    true_BT = jnp.take_along_axis(logits_BTV, tok_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    nats_BT = norm_BT - (1 - label_smoothing) * true_BT
    if label_smoothing:
        nats_BT = nats_BT - label_smoothing * jnp.mean(logits32_BTV, axis=-1)
    return nats_BT, (logits_BTV, tok_BT, norm_BT)


def _smoothed_ce_backward(label_smoothing, residuals, grad_BT):
    logits_BTV, tok_BT, norm_BT = residuals
    codes = logits_BTV.shape[-1]
    share_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - norm_BT[..., None])
    true_BTV = tok_BT[..., None] == jnp.arange(codes, dtype=tok_BT.dtype)
    target_BTV = jnp.where(true_BTV, 1 - label_smoothing, 0) + label_smoothing / codes
    return (grad_BT[..., None] * (share_BTV - target_BTV)).astype(logits_BTV.dtype), None


smoothed_ce.defvjp(_smoothed_ce_forward, _smoothed_ce_backward)


def masked_accuracy(
    logits_BTV: Float[Array, 'B T V'], tok_BT: Int[Array, 'B T'], mask_BT: Bool[Array, 'B T']
) -> Float[Array, ' B']:
    """Share of the masked tokens whose most likely id is the true one, for each example."""
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == tok_BT).astype(jnp.float32)
    return _masked_mean(right_BT, mask_BT)


def _masked_mean(x_BT: Float[Array, 'B T'], mask_BT: Bool[Array, 'B T']) -> Float[Array, ' B']:
    return jnp.sum(jnp.where(mask_BT, x_BT, 0), axis=1) / jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
