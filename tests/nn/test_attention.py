"""The attention backends against each other and against a plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx

from muse.config import MeshConfig
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.nn.attention import MultiAxisAttention, attention, from_blocks, has_cudnn, to_blocks


def plain(q, k, v, lengths, scale, bias):
    """One row, one head, one query at a time, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            for t in range(q.shape[1]):
                logits = k[b, : lengths[b], n] @ q[b, t, n] * scale + bias[0, n, t, : lengths[b]]
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v[b, : lengths[b], n] / weights.sum()
    return out


def test_xla_backend_is_softmax_attention_over_a_prefix():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(2, 6, 3, 8)), rng.normal(size=(2, 6, 3, 8))
    bias = rng.normal(size=(1, 3, 5, 6))
    to32 = [jnp.array(x, jnp.float32) for x in (q, k, v)]
    out = attention(*to32, lengths_B=jnp.array([1, 4]), bias_1NTS=jnp.array(bias, jnp.float32), scale=0.7)
    np.testing.assert_allclose(out, plain(q, k, v, [1, 4], 0.7, bias), atol=2e-6)


@pytest.mark.parametrize(('queries', 'keys', 'lengths'), [(127, 127, [127, 3]), (5, 7, None), (16, 8, [8, 1])])
def test_what_cudnn_is_given_means_the_same(queries, keys, lengths, monkeypatch):
    """Its kernel is stood in for by the plain one, which gets what is filled up for it; the real one runs below."""
    rng = np.random.default_rng(0)
    q, k, v, bias = (
        jnp.array(rng.normal(size=shape), jnp.float32)
        for shape in ((2, queries, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8), (1, 3, queries, keys))
    )
    plain_kernel, seen = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, bias, **rest):
        assert implementation == 'cudnn'
        seen.append(bias.shape)
        return plain_kernel(q, k, v, bias=bias, implementation='xla', **rest)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
    options = {'lengths_B': lengths and jnp.array(lengths), 'bias_1NTS': bias, 'scale': 0.7}
    ours = attention(q, k, v, **options, backend='cudnn')
    np.testing.assert_allclose(ours, attention(q, k, v, **options, backend='xla'), atol=2e-6)
    assert all(side % 8 == 0 for side in seen[0][2:])


@pytest.mark.skipif(not has_cudnn(), reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('length', [127, 128, 31])
def test_cudnn_matches_xla(length):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (4, length, 6, 64), jnp.bfloat16) for key in keys[:3])
    bias = jax.random.normal(keys[3], (1, 6, length, length))
    options = {'lengths_B': jnp.array([1, 2, length - 1, length]), 'bias_1NTS': bias, 'scale': 0.125}
    ours, theirs = (attention(q, k, v, **options, backend=backend) for backend in ('cudnn', 'xla'))
    np.testing.assert_allclose(ours.astype('float32'), theirs.astype('float32'), atol=3e-2)


def test_splash_kernel_matches_xla_with_lengths_and_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 128, 2, 64))
    k, v = (jax.random.normal(key, (2, 256, 2, 64)) for key in keys[1:])
    lengths = jnp.array([1, 130])

    def run(backend):
        def loss(q, k, v):
            out = attention(q, k, v, lengths_B=lengths, scale=0.125, backend=backend)
            return (out * jnp.cos(jnp.arange(64))).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (grads, out), (splash_grads, splash_out) = run('xla'), run('splash')
    np.testing.assert_allclose(splash_out, out, atol=1e-5)
    for ours, theirs in zip(splash_grads, grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.parametrize('grid', [(4, 4), (6, 4)])
def test_multi_axis_attention_is_full_attention_under_two_masks(grid):
    """Half of the heads within 2x2 blocks, half over the tokens at the same place of each block; in raster order."""
    block, heads, width = 2, 4, 24
    module = filled(lambda: MultiAxisAttention(width, heads, block=block, rngs=nnx.Rngs(params=0)))
    tokens = grid[0] * grid[1]
    x_BTD = jax.random.normal(jax.random.key(1), (2, tokens, width))
    out = from_blocks(jax.jit(module)(to_blocks(x_BTD, grid, block)), grid, block)

    x, rows, columns = np.asarray(x_BTD, np.float64), np.arange(tokens) // grid[1], np.arange(tokens) % grid[1]
    place = np.stack([rows // block, columns // block, rows % block, columns % block], axis=1)
    same_block = (place[:, None, :2] == place[None, :, :2]).all(-1)
    same_place = (place[:, None, 2:] == place[None, :, 2:]).all(-1)
    project = lambda name: x @ np.asarray(getattr(module, name).kernel[...], np.float64)  # noqa: E731
    split = lambda y: y.reshape(2, tokens, heads, -1)  # noqa: E731
    norm = lambda y: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    q, k, v = norm(split(project('query'))), norm(split(project('key'))), split(project('value'))
    logits = np.einsum('btnh,bsnh->bnts', q, k) * (width // heads) ** -0.5
    seen = np.stack([same_block, same_place] * (heads // 2))
    weights = np.where(seen, np.exp(logits), 0)
    y = np.einsum('bnts,bsnh->btnh', weights / weights.sum(-1, keepdims=True), v).reshape(2, tokens, width)
    np.testing.assert_allclose(out, y @ np.asarray(module.out.kernel[...], np.float64), atol=2e-6)


def test_blocks_are_runs_of_the_sequence_and_undone_exactly():
    raster = np.arange(48).reshape(1, 48)
    blocks = np.asarray(to_blocks(jnp.array(raster), (6, 8), 2))
    np.testing.assert_array_equal(blocks[0, :8], [0, 1, 8, 9, 2, 3, 10, 11])
    np.testing.assert_array_equal(from_blocks(jnp.array(blocks), (6, 8), 2), raster)


def test_between_layers_only_half_of_the_heads_are_transposed():
    """The blocks lie as they are: no gather, and transposes only of what attends across blocks (q, k, v and back)."""
    module = filled(lambda: MultiAxisAttention(32, 4, block=2, rngs=nnx.Rngs(params=0)))
    jaxpr = jax.make_jaxpr(module)(jnp.zeros((2, 16, 32))).jaxpr
    names = [str(equation.primitive) for equation in jaxpr.eqns]
    moved = [e.outvars[0].aval for e in jaxpr.eqns if str(e.primitive) == 'transpose' and e.outvars[0].aval.ndim == 5]
    assert 'gather' not in names and len(moved) == 4 and all(m.size == 2 * 16 * 16 for m in moved)


@pytest.mark.parametrize(
    'mesh, rows',
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), 8),
        pytest.param(MeshConfig(data=1, fsdp=8), 3, marks=pytest.mark.slow),
    ],
)
def test_splash_on_a_mesh_attends_on_each_devices_rows_and_heads(mesh, rows):
    """100 keys, padded to 128, rows of any length; once with rows that divide over the mesh and once not."""
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (rows, 128, 2, 64))
    k, v = (jax.random.normal(key, (rows, 100, 2, 64)) for key in keys[1:])
    lengths = jnp.arange(1, rows + 1) * 12

    def run(q, k, v, lengths, backend):
        def loss(q, k, v):
            out = attention(q, k, v, lengths_B=lengths, scale=0.125, backend=backend)
            return (out * jnp.cos(jnp.arange(64))).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    plain_grads, plain_out = run(q, k, v, lengths, 'xla')
    with jax.set_mesh(make_mesh(mesh)):
        grads, out = jax.jit(run, static_argnames='backend')(q, k, v, lengths, backend='splash')
    np.testing.assert_allclose(out, plain_out, atol=1e-5)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_splash_names_a_number_of_queries_it_cannot_take():
    q, k = jnp.ones((1, 100, 2, 64)), jnp.ones((1, 128, 2, 64))
    with pytest.raises(UserError, match="'splash' wants a multiple of 128 queries, not 100: use 'xla'"):
        attention(q, k, k, scale=1.0, backend='splash')
