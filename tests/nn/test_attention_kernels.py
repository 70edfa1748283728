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
from muse.nn import attention_kernels
from muse.nn.attention import CrossAttention, MultiAxisAttention, SelfAttention, with_null
from muse.nn.attention_kernels import Split, fits, normed_attention

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


FORMS = ['one kernel', pytest.param('two kernels', marks=pytest.mark.slow)]


@pytest.fixture
def form(request, monkeypatch):
    """Of the backward pass."""
    if request.param == 'two kernels':
        monkeypatch.setattr(attention_kernels, 'SPLITS', {256: Split(16, 2, 4, 16, 32, 4)})
        monkeypatch.setattr(attention_kernels, '_backward', None)
    return request.param


@pytest.mark.parametrize('form', FORMS, indirect=True)
@pytest.mark.parametrize(('make', 'tokens'), KINDS)
def test_kernels_are_plain_attention_in_float32(make, tokens, form):
    x_BTD = jax.random.normal(jax.random.key(1), (2, tokens, WIDTH))
    plain, fused = (results(make, backend, x_BTD) for backend in ('xla', 'fused'))
    close(fused, plain, 2e-5)
    assert not all(np.array_equal(a, b) for a, b in zip(fused, plain, strict=True)), 'the kernels did not run'


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS, indirect=True)
@pytest.mark.parametrize(('make', 'tokens'), KINDS)
def test_kernels_in_bfloat16_are_as_near_to_float32_as_the_plain_way(make, tokens, form):
    x_BTD = jax.random.normal(jax.random.key(1), (2, tokens, WIDTH)).astype(jnp.bfloat16)
    exact = results(make, 'xla', x_BTD.astype(jnp.float32))
    plain, fused = (results(make, backend, x_BTD) for backend in ('xla', 'fused'))

    def error(found):
        pairs = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, exact, strict=True))
        return np.array([np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), 1e-6)) for a, b in pairs])

    assert (error(fused) < 1.3 * error(plain) + 2e-3).all(), (error(fused), error(plain))


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS, indirect=True)
@pytest.mark.parametrize('make', [self_attention, cross_attention])
def test_kernels_on_a_mesh(make, form):
    x_BTD = jax.random.normal(jax.random.key(1), (8, 32, WIDTH))
    expected = results(make, 'xla', x_BTD)
    close(results(make, 'fused', x_BTD, MeshConfig(data=2, fsdp=2, tensor=2)), expected, 2e-5)


def gradients(queries, keys, head, dtype='float32'):
    """Of queries, keys, values and both scales, by the kernels and by the formula in float32; rows' lengths differ."""
    draw = jax.random.split(jax.random.key(0), 4)
    q, w = (jax.random.normal(key, (2, queries, 2, head)).astype(dtype) for key in draw[:2])
    k, v = (jax.random.normal(key, (2, keys, 2, head)).astype(dtype) for key in draw[2:])
    scales, lengths = (jnp.linspace(0.5, 1.5, head), jnp.linspace(1.3, 0.4, head)), jnp.array([keys - 3, 1 + keys // 4])
    assert fits(q, k)

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def plain(q, k, v, *scales):
        logits = jnp.einsum('btnh,bsnh->bnts', norm(q, scales[0]), norm(k, scales[1])) * 0.125
        logits = jnp.where((jnp.arange(keys) < lengths[:, None])[:, None, None], logits, -jnp.inf)
        return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(logits), v)

    def fused(q, k, v, *scales):
        return normed_attention(q, k, v, *scales, lengths, scale=0.125, epsilon=1e-6)

    def gradient(run, *inputs):
        return jax.jit(jax.grad(lambda *a: jnp.sum(run(*a).astype('float32') * w), argnums=(0, 1, 2, 3, 4)))(*inputs)

    return gradient(fused, q, k, v, *scales), gradient(plain, *(x.astype('float32') for x in (q, k, v)), *scales)


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS, indirect=True)
@pytest.mark.parametrize(('queries', 'keys'), [(256, 256), (256, 128)])
def test_kernels_at_the_papers_sizes(queries, keys, form):
    """More turns of the backward pass than one, and as many keys as there may be."""
    close(*gradients(queries, keys, 64), 2e-5)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('split', [Split(16, 2, 4, 16, 32, 4), Split(64, 8, 4, 128, 16, 4)])
def test_a_backward_pass_of_two_kernels(split, dtype, monkeypatch):
    """Several programs and turns of each; settings larger than there are queries or keys."""
    one_kernel, expected = gradients(64, 32, 16, dtype)
    monkeypatch.setattr(attention_kernels, 'SPLITS', {256: split})
    monkeypatch.setattr(attention_kernels, '_backward', None)
    found, _ = gradients(64, 32, 16, dtype)
    close(found, expected, 2e-5 if dtype == 'float32' else 0.03)
    close(found, one_kernel, 5e-6 if dtype == 'float32' else 0.004)


def test_other_shapes_are_left_to_other_kernels():
    def shape(tokens, head=64):
        return jnp.zeros((1, tokens, 2, head))

    assert fits(shape(256), shape(256)) and fits(shape(4096), shape(4096), groups=64)
    assert not fits(shape(256), shape(384)) and not fits(shape(256), shape(257)), 'more keys than registers hold'
    assert not fits(shape(256, 128), shape(256, 128)) and not fits(shape(100), shape(128))
    assert not fits(shape(1024), shape(1024), groups=64), 'blocks of 64 tokens, but 16 of them'
