"""FLOP formulas against XLA's own count, which is right where nothing is scanned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from filled import filled
from flax import nnx

from muse.config import T5Config
from muse.models.t5 import T5Encoder
from muse.train.flops import peak_flops, t5_flops


@pytest.mark.parametrize('gated', [True, False])
def test_t5_flops_equal_xlas_count(gated):
    config = T5Config(
        vocab_size=64, width=128, mlp_dim=320, head_dim=32, heads=4, layers=2, gated=gated, unroll=2, dtype='float32'
    )
    encoder = filled(lambda: T5Encoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, params = nnx.split(encoder, nnx.Param)
    encode = jax.jit(lambda params, ids, lengths: nnx.merge(graphdef, params)(ids, lengths))
    counted = encode.lower(params, jnp.zeros((3, 64), jnp.int32), jnp.array([64, 64, 64])).compile().cost_analysis()
    # XLA counts norms, softmax and GELU too.
    assert 1.0 <= counted['flops'] / t5_flops(config, 3, 64) < 1.06


def test_xxl():
    """§2.1: 4.6 B parameters beside the table of tokens, two operations each a token, and the attention."""
    per_token = t5_flops(T5Config(), 64, 128) / (64 * 128)
    assert per_token == 2 * 24 * (4 * 4096**2 + 3 * 4096 * 10240) + 24 * 4 * 128 * 4096


def test_peaks():
    assert peak_flops('NVIDIA H100 80GB HBM3') == 989e12 and peak_flops('cpu') is None
