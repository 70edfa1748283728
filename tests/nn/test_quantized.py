"""Products of one-byte numbers: against integers in NumPy, against what a release stores, and in a whole model."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx

from muse.errors import UserError
from muse.nn.layers import Linear
from muse.nn.quantized import Precision, QuantizedLinear, check_precision, is_quantized, quantized, rounded
from muse.release.format import graphdef_and_template
from muse.release.storage import SCALE, pack_tensor, unpack

OUTLIERS = np.array([1.0, 1.0, 40.0, 1e-3, 0.0])[:, None]  # rows of very different size, and one of nothing


def linear(in_features: int, out_features: int) -> Linear:
    return Linear(in_features, out_features, ('embed', 'mlp'), rngs=nnx.Rngs(params=0))


def test_int8_holds_the_very_numbers_that_a_release_stores():
    """From the weights, and again from what a release gives back of them: nothing is lost twice."""
    kernel_LKN = np.random.default_rng(0).normal(size=(3, 64, 48)).astype(np.float32) ** 3
    packed = pack_tensor('up', kernel_LKN, 1, 'int8')
    for given in (kernel_LKN, unpack(packed, 'up')):
        values, scale = rounded(jnp.asarray(given), jnp.int8, -2)
        assert values.dtype == jnp.int8
        np.testing.assert_array_equal(values, packed['up'])
        np.testing.assert_allclose(scale, packed['up' + SCALE], rtol=3e-7)


def test_float8_is_the_nearest_and_reaches_its_largest():
    x = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32) * OUTLIERS
    values, scale = (np.asarray(part) for part in rounded(jnp.asarray(x, jnp.float32), jnp.float8_e4m3fn, -1))
    codes = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    codes = np.unique(codes[np.isfinite(codes)])
    wanted = x / scale
    at = np.clip(np.searchsorted(codes, wanted), 1, len(codes) - 1)
    nearest = np.minimum(np.abs(codes[at] - wanted), np.abs(codes[at - 1] - wanted))
    np.testing.assert_allclose(np.abs(values.astype(np.float64) - wanted), nearest, rtol=0, atol=1e-4)
    assert (np.abs(values.astype(np.float64)).max(axis=1) == [448, 448, 448, 448, 0]).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_an_int8_product_is_that_of_integers(dtype):
    layer = linear(96, 40)
    small = QuantizedLinear(layer, 'int8')
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 96)) * OUTLIERS, dtype)

    def bytes_of(x: Any, axis: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(x, np.float32).astype(np.float64)
        peak = np.abs(x).max(axis=axis, keepdims=True)
        scale = np.where(peak > 0, peak, 1) / 127
        return np.rint(x / scale).astype(np.int64), scale

    (rows, row_scale), (values, scale) = bytes_of(x, -1), bytes_of(layer.kernel[...], 0)
    expected = (rows @ values) * row_scale * scale
    found = small(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-3
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance * row_scale.min()
    )
    assert (np.asarray(found, np.float32)[4] == 0).all() and np.abs(expected[3]).max() > 0
    # A row's result depends on no other row, and need not be one of several.
    np.testing.assert_array_equal(small(x[2]), found[2])


@pytest.mark.parametrize(('precision', 'bound'), [('int8', 0.015), ('fp8', 0.05)])
def test_a_product_is_near_the_true_one_row_by_row(precision, bound):
    """Each row and each column by a scale of its own: neither is lost beside a thousand times larger ones."""
    layer = linear(256, 64)
    columns = np.logspace(-3, 3, 64)
    layer.kernel[...] = layer.kernel[...] * columns
    x = np.random.default_rng(2).normal(size=(5, 256)) * OUTLIERS
    found = np.asarray(QuantizedLinear(layer, precision)(jnp.asarray(x, jnp.float32)), np.float64) / columns
    true = x @ np.asarray(layer.kernel[...], np.float64) / columns
    for row in range(4):
        error = np.linalg.norm(found[row] - true[row]) / np.linalg.norm(true[row])
        assert bound / 10 < error < bound, (row, error)


@pytest.mark.parametrize(('precision', 'operand', 'sums'), [('int8', 'i8', 'i32'), ('fp8', 'f8E4M3FN', 'bf16')])
def test_the_compiler_is_given_a_product_of_bytes(precision, operand, sums):
    small = QuantizedLinear(linear(32, 16), precision)
    text = jax.jit(lambda x: small(x)).lower(jnp.ones((2, 4, 32), jnp.bfloat16)).as_text()
    [product] = [line for line in text.splitlines() if 'dot_general' in line]
    assert re.search(rf'tensor<2x4x32x{operand}>, tensor<32x16x{operand}>\) -> tensor<2x4x16x{sums}>', product)


def inputs(part: str, config: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    low = (jnp.asarray(rng.integers(0, 64, (2, 16))),) if part == 'superres' else ()
    txt_BSD = jnp.asarray(rng.normal(size=(2, 24, 32)), jnp.float32)
    tok_BT = jnp.asarray(rng.integers(0, 65, (2, config.grid[0] * config.grid[1])))
    return tok_BT, *low, txt_BSD, jnp.array([5, 24])


@pytest.mark.parametrize(
    ('part', 'config'), [('base', tiny.BASE), pytest.param('superres', tiny.SUPERRES, marks=pytest.mark.slow)]
)
def test_all_products_of_the_layers_and_nothing_else(part, config):
    graph, params = graphdef_and_template(part, config)[0], tiny.random_params(part, config)
    given = inputs(part, config)
    true = nnx.merge(graph, params)(*given)
    bounds: dict[Precision, float] = {'int8': 0.06, 'fp8': 0.3}
    for precision, bound in bounds.items():
        small_graph, small_params = quantized(graph, params, precision)
        model = nnx.merge(small_graph, small_params)
        assert all(is_quantized(getattr(model, stack)) for stack in model.stacks())
        paths = {'.'.join(map(str, path)): variable for path, variable in nnx.to_flat_state(small_params)}
        kernels = {path for path in paths if path.endswith('kernel')}
        assert kernels == {'text_projection.kernel', 'head.kernel'}
        before = {'.'.join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
        for path, variable in before.items():
            if path in paths:
                assert (variable[...] == paths[path][...]).all()
            else:
                values = paths[path.removesuffix('kernel') + 'values']
                assert values.shape == variable.shape and values.dtype.itemsize == 1
        found = model(*given)
        error = float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))
        assert bound / 30 < error < bound, error
    assert not is_quantized(nnx.merge(graph, params))


def test_other_precisions_are_refused():
    check_precision(None)
    with pytest.raises(UserError, match=r"^precision 'int4' does not exist; did you mean 'int8'\?$"):
        check_precision('int4')
