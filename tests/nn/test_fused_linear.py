"""Products with what surrounds them inside: kernels (interpreted here) and XLA's own way against plain NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse.nn import fused_linear
from muse.nn.fused_linear import (
    Product,
    Readers,
    Tiles,
    add_product,
    fits,
    normed_gelu,
    normed_heads,
    stream_of,
    tiles_for,
)

TILES = Tiles(16, 16, 32, 2, 4)
EPSILON, TOKENS, WIDTH, HEAD = 1e-2, 32, 64, 8  # a large epsilon: it must be where it belongs
WAYS = pytest.mark.parametrize('tiles', [TILES, None], ids=['kernel', 'xla'])
READERS = pytest.mark.parametrize('readers', [None, Readers(TOKENS, 2)], ids=['all', 'half'])


def draws(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def reading(x_MD: np.ndarray, readers: Readers | None) -> np.ndarray:
    if readers is None:
        return x_MD
    return x_MD.reshape(-1, readers.every, readers.tokens, x_MD.shape[1])[:, 0].reshape(-1, x_MD.shape[1])


def close(found: jax.Array, wanted: np.ndarray, dtype: str) -> None:
    """In bfloat16 within three roundings: of the kernel's weights, of the product, of the result."""
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - wanted)
    assert error.max() < (1e-5 if dtype == 'float32' else 3 * 2**-8) * np.abs(wanted).max(), error.max()


@WAYS
@READERS
@pytest.mark.parametrize(('parts', 'dtype'), [(3, 'float32'), (1, 'float32'), (3, 'bfloat16')])
def test_heads(tiles, readers, parts, dtype):
    """Queries and keys have head norms, values have none."""
    x_MD, kernel, scale = draws((4 * TOKENS, WIDTH), (WIDTH, parts * WIDTH), (parts * WIDTH,))
    x_MD, kernel = np.asarray(jnp.asarray(x_MD, dtype), np.float64), np.asarray(jnp.asarray(kernel / 8, dtype))
    count = min(parts, 2)
    scale[count * WIDTH :] = 1
    y_MN = normed(reading(x_MD, readers)) @ kernel.astype(np.float64)
    heads = y_MN.reshape(len(y_MN), -1, HEAD)
    wanted = np.where(np.arange(heads.shape[1])[:, None] < count * WIDTH // HEAD, normed(heads), heads)
    wanted = (wanted.reshape(y_MN.shape) * scale).reshape(len(y_MN), parts, WIDTH)
    found = normed_heads(
        stream_of(jnp.asarray(x_MD, dtype)),
        jnp.asarray(kernel, dtype),
        jnp.asarray(scale, jnp.float32),
        parts=parts,
        normed=count,
        head=HEAD,
        epsilon=EPSILON,
        readers=readers,
        tiles=tiles,
    )
    assert len(found) == parts
    for part, each in enumerate(found):
        close(each, wanted[:, part], dtype)


@WAYS
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gelu(tiles, dtype):
    x_MD, kernel = draws((2 * TOKENS, WIDTH), (WIDTH, 2 * WIDTH))
    x_MD = np.asarray(jnp.asarray(10 * x_MD, dtype), np.float64)
    kernel = np.asarray(jnp.asarray(kernel, dtype), np.float64)
    y_MN = normed(x_MD) @ kernel
    wanted = 0.5 * y_MN * (1 + np.tanh(np.sqrt(2 / np.pi) * (y_MN + 0.044715 * y_MN**3)))
    stream = stream_of(jnp.asarray(x_MD, dtype))
    close(normed_gelu(stream, jnp.asarray(kernel, dtype), epsilon=EPSILON, tiles=tiles), wanted, dtype)


def test_gelu_has_its_limits():
    x = jnp.array([-1e4, -30.0, -0.0, 30.0, 1e4])
    np.testing.assert_array_equal(fused_linear._gelu(x), [0, 0, 0, 30, 1e4])


@WAYS
@READERS
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_addition_and_its_sum_of_squares(tiles, readers, dtype):
    rows = 4 * TOKENS // (1 if readers is None else readers.every)
    x_MD, y_MK, kernel, nothing = draws((4 * TOKENS, WIDTH), (rows, 3 * TOKENS), (3 * TOKENS, WIDTH), (WIDTH,))
    x, y, k, n = (jnp.asarray(each, dtype) for each in (x_MD, y_MK, kernel / 8, nothing))
    x_MD, y_MK, kernel, nothing = (np.asarray(each, np.float64) for each in (x, y, k, n))
    wanted = x_MD + (y_MK @ kernel if readers is None else nothing)
    if readers is not None:
        first = wanted.reshape(-1, readers.every, TOKENS, WIDTH)[:, 0]  # a view
        first += (y_MK @ kernel - nothing).reshape(first.shape)
    found = add_product(stream_of(x), y, k, nothing_N=n, readers=readers, tiles=tiles)
    close(found.x_MD, wanted, dtype)
    squares_M = np.sum(np.asarray(found.x_MD, np.float64) ** 2, axis=1)
    np.testing.assert_allclose(np.asarray(found.squares_PM).sum(axis=0), squares_M, rtol=1e-5)


def test_tiles_are_for_bfloat16(monkeypatch):
    """And for products that they cut evenly; large ones are left to cuBLAS."""
    small = Product('heads', 512, 1024, 3072, 512, 64, 3)
    elsewhere = tiles_for(small, jnp.bfloat16)  # chips of less shared memory than a Hopper has
    assert elsewhere is not None and fits(elsewhere, small)
    assert 2 * elsewhere.stages * elsewhere.depth * (elsewhere.rows + elsewhere.columns) <= 2**16
    monkeypatch.setattr(fused_linear, 'is_hopper', lambda: True)
    assert tiles_for(small, jnp.bfloat16) == Tiles(128, 128, 64, 4, 8)
    for product in (small, Product('heads', 256, 1024, 1024, 256, 64), Product('add', 512, 1024, 1024, 256)):
        tiles = tiles_for(product, jnp.bfloat16)
        assert tiles is not None and fits(tiles, product)
    assert tiles_for(small, jnp.float32) is None
    assert tiles_for(small._replace(m=65536, run=65536), jnp.bfloat16) is None
    assert tiles_for(small._replace(k=4096), jnp.bfloat16) is None
    assert tiles_for(small._replace(k=1000), jnp.bfloat16) is None
    assert not fits(Tiles(64, 64, 64, 3, 4), Product('add', 512, 64, 64, 96))
    assert not fits(Tiles(64, 64, 64, 3, 4), Product('heads', 512, 64, 192, 512, 128))
    monkeypatch.setitem(fused_linear.TUNED, small, None)
    assert tiles_for(small, jnp.bfloat16) is None
