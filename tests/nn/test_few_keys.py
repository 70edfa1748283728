"""Attention over few keys as drawing's kernel, interpreted, against the reference; and which shapes it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.nn import few_keys
from muse.nn.attention import MultiAxisAttention, attention
from muse.nn.devices import platform
from muse.nn.few_keys import attend, attend_axes, fits, fits_axes

INTERPRETED = pytest.mark.skipif(platform() != 'cpu', reason='a GPU rounds float32 to TF32 in these kernels')


def draws(*shapes: tuple[int, ...], dtype: str = 'float32') -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(q: jax.Array, k: jax.Array, v: jax.Array, lengths: list[int], scale: float) -> np.ndarray:
    """In float64, row by row over the keys that are real."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows = []
    for q_TNH, k_SNH, v_SNH, length in zip(q, k, v, lengths, strict=True):
        logits_NTS = np.einsum('tnh,snh->nts', q_TNH, k_SNH[:length]) * scale
        powers = np.exp(logits_NTS - logits_NTS.max(axis=-1, keepdims=True))
        rows.append(np.einsum('nts,snh->tnh', powers / powers.sum(axis=-1, keepdims=True), v_SNH[:length]))
    return np.stack(rows)


@INTERPRETED
@pytest.mark.parametrize(
    ('queries', 'keys', 'lengths'),
    [(128, 384, [1, 300]), (64, 128, [128, 128]), (48, 32, [17, 32]), (16, 16, [1, 2])],
)
def test_attention(queries, keys, lengths):
    """Also where the last of several steps over the keys holds nothing real, and where steps are small."""
    q, k, v = draws((2, queries, 2, 16), (2, keys, 2, 16), (2, keys, 2, 16))
    assert fits(q, k)
    found = attend(q, 3 * k, v, jnp.asarray(lengths), scale=0.25)
    np.testing.assert_allclose(found, exact(q, 3 * k, v, lengths, 0.25), atol=2e-6)


def test_what_is_not_real_is_not_read():
    q, k, v = draws((1, 16, 2, 16), (1, 32, 2, 16), (1, 32, 2, 16))
    other = [x.at[:, 5:].set(1e4) for x in (k, v)]
    found, again = (attend(q, *each, jnp.asarray([5]), scale=0.25) for each in ((k, v), other))
    np.testing.assert_array_equal(found, again)


@INTERPRETED
def test_multi_axis_attention():
    q, k, v = draws(*[(2, 256, 4, 16)] * 3)
    module = MultiAxisAttention(64, 4, block=4, rngs=nnx.Rngs(params=0), backend='xla')
    assert fits_axes(q, module.block_tokens)
    found = attend_axes(q, 3 * k, v, scale=0.25)
    np.testing.assert_allclose(found, module.attend(q, 3 * k, v), atol=2e-6)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_way():
    q, k, v = draws((2, 64, 2, 64), (2, 128, 2, 64), (2, 128, 2, 64), dtype='bfloat16')
    wanted = exact(q, k, v, [77, 128], 0.125)
    ours = attend(q, k, v, jnp.asarray([77, 128]), scale=0.125)
    plain = attention(q, k, v, lengths_B=jnp.asarray([77, 128]), scale=0.125, backend='xla')
    ours, plain = (np.abs(np.asarray(x, np.float64) - wanted) for x in (ours, plain))
    assert ours.mean() < 1.1 * plain.mean() and ours.max() < 1.5 * plain.max()


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize(('queries', 'keys', 'width'), [(256, 256, 64), (256, 128, 128), (4096, 384, 64)])
def test_attention_at_the_papers_sizes(queries, keys, width):
    q, k, v = draws((2, queries, 2, width), (2, keys, 2, width), (2, keys, 2, width))
    assert fits(q, k)
    lengths = [keys - 1, keys // 2 + 3]
    found = attend(q, k, v, jnp.asarray(lengths), scale=width**-0.5)
    np.testing.assert_allclose(found, exact(q, k, v, lengths, width**-0.5), atol=3e-6)


@INTERPRETED
@pytest.mark.slow
def test_multi_axis_attention_at_the_papers_size():
    q, k, v = draws(*[(1, 4096, 2, 64)] * 3)
    module = MultiAxisAttention(128, 2, block=8, rngs=nnx.Rngs(params=0), backend='xla')
    assert fits_axes(q, module.block_tokens)
    found = attend_axes(q, k, v, scale=0.125)
    np.testing.assert_allclose(found, module.attend(q, k, v), atol=3e-6)


def test_other_shapes_are_left_to_other_kernels(monkeypatch):
    def pair(queries: int, keys: int, width: int = 64) -> list[jax.Array]:
        return [jnp.zeros((1, tokens, 2, width), jnp.bfloat16) for tokens in (queries, keys)]

    for queries, keys, width in ((256, 128, 64), (240, 96, 32), (512, 512, 128), (4096, 384, 64)):
        assert fits(*pair(queries, keys, width))
    # Steps of fewer than 16 rows; more keys than few; heads of no power of two, or too small or too wide a one.
    for queries, keys, width in ((250, 128, 64), (256, 78, 64), (8, 16, 64), (256, 1024, 64)):
        assert not fits(*pair(queries, keys, width))
    for width in (48, 8, 256):
        assert not fits(*pair(256, 128, width)) and not fits_axes(pair(4096, 4096, width)[0], 64)
    large = pair(4096, 4096)[0]
    assert fits_axes(large, 64) and not fits_axes(large, 16) and not fits_axes(pair(64 * 36, 1)[0], 36)
    assert not fits_axes(pair(16, 16)[0], 4) and not fits_axes(pair(2048, 1)[0], 64)
    # Other chips than the one measured have less shared memory.
    monkeypatch.setattr(few_keys, 'platform', lambda: 'gpu')
    assert fits(*pair(256, 128, 64)) and not fits(*pair(256, 128, 128))
    monkeypatch.setattr(few_keys, 'is_hopper', lambda: True)
    assert fits(*pair(256, 128, 128))
