"""Norms and their gradients, plain and as the GPU's kernels, against what JAX derives from the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse.config import MeshConfig
from muse.mesh import make_mesh
from muse.nn import norm_kernels
from muse.nn.devices import platform
from muse.nn.norms import norm_after, norm_beside, rms_norm

EPSILON = 1e-3


def formula(x, scale):
    x32 = x.astype(jnp.float32)
    return (x32 / jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + EPSILON) * scale).astype(x.dtype)


def cases(x, more, scale):
    """Name: (ours, the same by the formula, arguments)."""
    return {
        'alone': (lambda x, s: (rms_norm(x, s, EPSILON),), lambda x, s: (formula(x, s),), (x, scale)),
        'beside': (lambda x, s: norm_beside(x, s, EPSILON), lambda x, s: (x, formula(x, s)), (x, scale)),
        'after': (
            lambda x, m, s: norm_after(x, m, s, EPSILON),
            lambda x, m, s: (x + m, formula(x + m, s)),
            (x, more, scale),
        ),
    }


def results(run, arguments, weights):
    """What it returns, and gradients of a weighted sum of it."""

    def loss(*arguments):
        found = run(*arguments)
        weighed = (w * y.astype(jnp.float32) for w, y in zip(weights[-len(found) :], found, strict=True))
        return sum(map(jnp.sum, weighed)), found

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))(*arguments)


def inputs(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    x, more, *weights = (jax.random.normal(key, shape) for key in keys[:4])
    return x.astype(dtype), more.astype(dtype), jax.random.normal(keys[4], shape[-1:]), weights


@pytest.fixture(params=['plain', 'kernels'])
def way(request, monkeypatch):
    """Kernels are interpreted here; tests/nn of a machine with a GPU run them."""
    if request.param == 'kernels' and platform() == 'cpu':
        monkeypatch.setattr(norm_kernels, 'takes', norm_kernels.fits)
    elif request.param == 'plain':
        monkeypatch.setattr(norm_kernels, 'takes', lambda x: False)
    return request.param


SHAPES = [(2, 8, 1024), (2, 16, 8, 64)]


@pytest.mark.parametrize('name', ['alone', 'beside', 'after'])
@pytest.mark.parametrize('shape', SHAPES)
def test_results_and_gradients_are_the_formulas(name, shape, way):
    x, more, scale, weights = inputs(shape, jnp.float32)
    assert norm_kernels.takes(x) == (way == 'kernels')
    ours, plain, arguments = cases(x, more, scale)[name]
    found, expected = (results(run, arguments, weights) for run in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize('shape', SHAPES)
def test_bfloat16_is_within_its_rounding(shape, way):
    """Against the formula in float32 of the same numbers; the kernel rounds no sooner than the plain way."""
    x, more, scale, weights = inputs(shape, jnp.bfloat16)
    ours, plain, arguments = cases(x, more, scale)['after']
    wide = [each.astype(jnp.float32) for each in arguments]
    (found, outputs), (expected, wide_outputs) = results(ours, arguments, weights), results(plain, wide, weights)
    assert [each.dtype for each in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip((*found, *outputs), (*expected, *wide_outputs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.012 * float(jnp.abs(b).max()))


def test_rows_that_are_no_whole_tiles_are_left_to_the_plain_way():
    assert norm_kernels.fits(jnp.zeros((4, 2, 1024))) and norm_kernels.fits(jnp.zeros((64, 64)))
    assert not norm_kernels.fits(jnp.zeros((3, 1024))) and not norm_kernels.fits(jnp.zeros((8, 768)))
    assert not norm_kernels.takes(jnp.zeros((64, 64))) or platform() != 'cpu'


@pytest.mark.slow
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('tilings', [((1024, 1, 1), (2048, 4, 4)), ((8192, 8, 1), (512, 1, 16))])
def test_any_tiling_gives_the_same(tilings, shape, monkeypatch):
    """Also one of less than a row, which then holds one."""
    for name, tiling in zip(('FORWARD', 'BACKWARD'), tilings, strict=True):
        monkeypatch.setattr(norm_kernels, name, norm_kernels.Tiling(*tiling))
    monkeypatch.setattr(norm_kernels, 'takes', norm_kernels.fits)
    x, more, scale, weights = inputs(shape, jnp.float32)
    assert norm_kernels.fits(x)
    ours, plain, arguments = cases(x, more, scale)['after']
    found, expected = (results(run, arguments, weights) for run in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
def test_kernels_on_a_mesh(mesh, monkeypatch):
    monkeypatch.setattr(norm_kernels, 'takes', norm_kernels.fits)
    for shape in ((8, 8, 1024), (8, 64, 4, 64)):
        x, more, scale, weights = inputs(shape, jnp.float32)
        ours, plain, arguments = cases(x, more, scale)['after']
        expected = results(plain, arguments, weights)
        with jax.set_mesh(make_mesh(mesh)):
            found = results(ours, arguments, weights)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
