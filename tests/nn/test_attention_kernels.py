"""The GPU's attention kernels, interpreted, against plain attention behind plain norms: results and all gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx

from muse.config import MeshConfig
from muse.mesh import make_mesh
from muse.nn.attention import CrossAttention, MultiAxisAttention, SelfAttention, with_null
from muse.nn.attention_kernels import fits, normed_attention

WIDTH, HEADS = 64, 4


def self_attention(backend):
    return filled(lambda: SelfAttention(WIDTH, HEADS, rngs=nnx.Rngs(params=0), backend=backend))


def multi_axis(backend):
    return filled(lambda: MultiAxisAttention(WIDTH, HEADS, block=4, rngs=nnx.Rngs(params=0), backend=backend))


def cross_attention(backend):
    return filled(lambda: CrossAttention(WIDTH, HEADS, WIDTH, rngs=nnx.Rngs(params=0), backend=backend))


def read(module, x_BTD):
    """Itself, or for cross-attention a memory of 15 rows, of which the first rows read 15, 4, 0 …"""
    if not isinstance(module, CrossAttention):
        return module(x_BTD)
    memory_BSD = with_null(jnp.cos(3 * x_BTD[:, :15]))
    return module(x_BTD, module.keys_values(memory_BSD), jnp.array([15, 4, 0, 1, 2, 3, 5, 6])[: len(x_BTD)])


def results(make, backend, x_BTD, mesh=None):
    """The output, and the gradients of the input and of every parameter."""
    graphdef, params = nnx.split(make(backend), nnx.Param)
    weights = jax.random.normal(jax.random.key(3), x_BTD.shape)

    def loss(params, x_BTD):
        y_BTD = read(nnx.merge(graphdef, params), x_BTD)
        return jnp.sum(y_BTD.astype(jnp.float32) * weights), y_BTD

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        return jax.tree.leaves(run(params, x_BTD))
    with jax.set_mesh(make_mesh(mesh)):
        return jax.tree.leaves(run(params, x_BTD))


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-3))


# Multi-axis attention over 16 blocks of 16 tokens; the others over 32 tokens.
KINDS = [(self_attention, 32), (cross_attention, 32), pytest.param(multi_axis, 256, marks=pytest.mark.slow)]


@pytest.mark.parametrize(('make', 'tokens'), KINDS)
def test_kernels_are_plain_attention_in_float32(make, tokens):
    x_BTD = jax.random.normal(jax.random.key(1), (2, tokens, WIDTH))
    plain, fused = (results(make, backend, x_BTD) for backend in ('xla', 'fused'))
    close(fused, plain, 2e-5)
    assert not all(np.array_equal(a, b) for a, b in zip(fused, plain, strict=True)), 'the kernels did not run'


@pytest.mark.slow
@pytest.mark.parametrize(('make', 'tokens'), KINDS)
def test_kernels_in_bfloat16_are_as_near_to_float32_as_the_plain_way(make, tokens):
    x_BTD = jax.random.normal(jax.random.key(1), (2, tokens, WIDTH)).astype(jnp.bfloat16)
    exact = results(make, 'xla', x_BTD.astype(jnp.float32))
    plain, fused = (results(make, backend, x_BTD) for backend in ('xla', 'fused'))

    def error(found):
        pairs = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, exact, strict=True))
        return np.array([np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), 1e-6)) for a, b in pairs])

    assert (error(fused) < 1.3 * error(plain) + 2e-3).all(), (error(fused), error(plain))


@pytest.mark.slow
@pytest.mark.parametrize('make', [self_attention, cross_attention])
def test_kernels_on_a_mesh(make):
    x_BTD = jax.random.normal(jax.random.key(1), (8, 32, WIDTH))
    expected = results(make, 'xla', x_BTD)
    close(results(make, 'fused', x_BTD, MeshConfig(data=2, fsdp=2, tensor=2)), expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(('queries', 'keys'), [(256, 256), (256, 128)])
def test_kernels_at_the_papers_sizes(queries, keys):
    """More turns of the backward pass than one, and as many keys as there may be."""
    draw = jax.random.split(jax.random.key(0), 4)
    q, w = (jax.random.normal(key, (1, queries, 2, 64)) for key in draw[:2])
    k, v = (jax.random.normal(key, (1, keys, 2, 64)) for key in draw[2:])
    scale, lengths = jnp.linspace(0.5, 1.5, 64), jnp.array([keys - 3])
    assert fits(q, k)

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def plain(q, k, v, scale):
        logits = jnp.einsum('btnh,bsnh->bnts', norm(q, scale), norm(k, jnp.flip(scale))) * 0.125
        logits = jnp.where(jnp.arange(keys) < keys - 3, logits, -jnp.inf)
        return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(logits), v)

    def fused(q, k, v, scale):
        return normed_attention(q, k, v, scale, jnp.flip(scale), lengths, scale=0.125, epsilon=1e-6)

    found, expected = (
        jax.grad(lambda *a, run=run: jnp.sum(run(*a) * w), argnums=(0, 1, 2, 3))(q, k, v, scale)
        for run in (fused, plain)
    )
    close(found, expected, 2e-5)


def test_other_shapes_are_left_to_other_kernels():
    def shape(tokens, head=64):
        return jnp.zeros((1, tokens, 2, head))

    assert fits(shape(256), shape(256)) and fits(shape(4096), shape(4096), groups=64)
    assert not fits(shape(256), shape(384)) and not fits(shape(256), shape(257)), 'more keys than registers hold'
    assert not fits(shape(256, 128), shape(256, 128)) and not fits(shape(100), shape(128))
    assert not fits(shape(1024), shape(1024), groups=64), 'blocks of 64 tokens, but 16 of them'
