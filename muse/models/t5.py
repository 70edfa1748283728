"""T5 encoder (§2.1): token ids in, one state a token out. Version 1.1 (gated GELU) and 1.0 (ReLU).

Muse conditions on the states of a frozen T5-XXL encoder. Module and parameter names are T5X's, so that its checkpoints
map one to one; layers are stacked for one scan. T5 has no 1/√d in its attention (the initialisation absorbs it), no
biases, and one table of relative-position biases that all layers share. Left out: the decoder and dropout.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.config import Backend, T5Config
from muse.nn.attention import attention, has_cudnn
from muse.nn.layers import Linear, RMSNorm, look_up, param, scan_layers, stack


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, 'S S']:
    """Bucket of each (query, key) pair: half of the buckets for keys behind or at the query, half for those ahead.

    Of each half, the first half are single distances and the rest widen logarithmically up to `max_distance`, past
    which all distances share the last bucket.
    """
    distance_SS = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far_SS = np.maximum(np.abs(distance_SS), exact) / exact
    # The small term keeps exact powers (16, 32, 64) in the bucket they open, whatever the logarithm's rounding.
    wide_SS = np.log(far_SS + np.finfo(np.float32).eps) / math.log(max_distance / exact) * (half - exact)
    wide_SS = np.minimum(exact + wide_SS.astype(np.int32), half - 1)
    bucket_SS = np.where(np.abs(distance_SS) < exact, np.abs(distance_SS), wide_SS)
    return (bucket_SS + half * (distance_SS > 0)).astype(np.int32)


def native(config: T5Config) -> T5Config:
    """The config with the fastest attention of this machine: cuDNN's where there is one and it takes the type."""
    fast = config.dtype == 'bfloat16' and has_cudnn()
    return dataclasses.replace(config, attention='cudnn' if fast else 'xla')


class TokenEmbedder(nnx.Module):
    """The table of token vectors, under T5X's name for it; see `muse.nn.layers.look_up`."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(nnx.initializers.normal(1.0), rngs, (rows, width), ('vocab', 'embed'))

    def __call__(self, ids_or_weights: Array, dtype: str) -> Float[Array, 'B S D']:
        return look_up(self.embedding[...], ids_or_weights, dtype)


class RelativePositionBias(nnx.Module):
    """One learned bias a head and bucket, added to the attention logits of every layer."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        init = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
        self.rel_embedding = param(init, rngs, (config.heads, config.relative_buckets), ('heads', None))

    def __call__(self, length: int) -> Float[Array, '1 N S S']:
        return self.rel_embedding[...][:, relative_buckets(length, self.buckets, self.max_distance)][None]


class T5Attention(nnx.Module):
    """Multi-head self-attention with a position bias; logits are not scaled."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.backend: Backend = config.attention
        self.query = Linear(config.width, inner, ('embed', 'heads'), rngs=rngs, scale=config.head_dim**-0.5)
        self.key = Linear(config.width, inner, ('embed', 'heads'), rngs=rngs)
        self.value = Linear(config.width, inner, ('embed', 'heads'), rngs=rngs)
        self.out = Linear(inner, config.width, ('heads', 'embed'), rngs=rngs)

    def __call__(
        self, x_BSD: Float[Array, 'B S D'], bias_1NSS: Float[Array, '1 N S S'], lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'B S D']:
        q_BSNH, k_BSNH, v_BSNH = (
            project(x_BSD).reshape(*x_BSD.shape[:2], self.heads, -1) for project in (self.query, self.key, self.value)
        )
        y_BSNH = attention(
            q_BSNH, k_BSNH, v_BSNH, lengths_B=lengths_B, bias_1NTS=bias_1NSS, scale=1.0, backend=self.backend
        )
        return self.out(y_BSNH.reshape(*x_BSD.shape[:2], -1))


class GatedMLP(nnx.Module):
    """T5 v1.1: GELU(x·wi_0) times x·wi_1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.width, config.mlp_dim, ('embed', 'mlp'), rngs=rngs)
        self.wi_1 = Linear(config.width, config.mlp_dim, ('embed', 'mlp'), rngs=rngs)
        self.wo = Linear(config.mlp_dim, config.width, ('mlp', 'embed'), rngs=rngs)

    def __call__(self, x_BSD: Float[Array, 'B S D']) -> Float[Array, 'B S D']:
        return self.wo(nnx.gelu(self.wi_0(x_BSD), approximate=True) * self.wi_1(x_BSD))


class ReluMLP(nnx.Module):
    """T5 1.0."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi = Linear(config.width, config.mlp_dim, ('embed', 'mlp'), rngs=rngs)
        self.wo = Linear(config.mlp_dim, config.width, ('mlp', 'embed'), rngs=rngs)

    def __call__(self, x_BSD: Float[Array, 'B S D']) -> Float[Array, 'B S D']:
        return self.wo(nnx.relu(self.wi(x_BSD)))


class T5Layer(nnx.Module):
    """Self-attention, then MLP; each behind a norm, each added to the stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.pre_attention_layer_norm = RMSNorm(config.width, rngs=rngs)
        self.attention = T5Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = RMSNorm(config.width, rngs=rngs)
        self.mlp = (GatedMLP if config.gated else ReluMLP)(config, rngs=rngs)

    def __call__(
        self, x_BSD: Float[Array, 'B S D'], bias_1NSS: Float[Array, '1 N S S'], lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'B S D']:
        x_BSD = x_BSD + self.attention(self.pre_attention_layer_norm(x_BSD), bias_1NSS, lengths_B)
        return x_BSD + self.mlp(self.pre_mlp_layer_norm(x_BSD))


class Encoder(nnx.Module):
    """The stack of layers under one position bias, and the last norm."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.remat, self.unroll = config.remat, config.unroll
        self.relpos_bias = RelativePositionBias(config, rngs=rngs)
        self.layers = stack(lambda rngs: T5Layer(config, rngs=rngs), config.layers, rngs=rngs)
        self.encoder_norm = RMSNorm(config.width, rngs=rngs)

    def __call__(self, x_BSD: Float[Array, 'B S D'], lengths_B: Int[Array, ' B']) -> Float[Array, 'B S D']:
        bias_1NSS = self.relpos_bias(x_BSD.shape[1])

        def apply(layer: T5Layer, x_BSD, _):
            return layer(x_BSD, bias_1NSS, lengths_B)

        return self.encoder_norm(scan_layers(self.layers, apply, x_BSD, remat=self.remat, unroll=self.unroll))


class T5Encoder(nnx.Module):
    """Token ids and their number → states, zero behind each row's end."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedder = TokenEmbedder(config.vocab_size, config.width, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)

    def __call__(
        self, ids_BS: Int[Array, 'B S'] | Float[Array, 'B S V'], len_B: Int[Array, ' B']
    ) -> Float[Array, 'B S D']:
        """States in the compute dtype.

        Args:
            ids_BS: ids in 0..vocab_size-1, with </s> as the last real one; or weights over the first V ids.
            len_B: how many positions of each row are real, </s> included. What stands behind them never influences
                anything. A row of length 0 (no text) comes out as zeros.
        """
        x_BSD = self.token_embedder(ids_BS, self.config.dtype)
        # A row without text attends to one pad instead of to nothing, which would be 0/0.
        x_BSD = self.encoder(x_BSD, jnp.maximum(len_B, 1))
        real_BS = jnp.arange(x_BSD.shape[1]) < len_B[:, None]
        return jnp.where(real_BS[:, :, None], x_BSD, 0)
