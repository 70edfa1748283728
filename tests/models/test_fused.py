"""Fused layers against the layers they are made of, with kernels (interpreted) and without."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from muse.models import fused
from muse.models.fused import FusedLayers
from muse.nn.fused_linear import Product, Tiles, fits
from muse.nn.layers import cast_matrices, unstack
from muse.release.format import graphdef_and_template


def small_tiles(product: Product, dtype: Any) -> Tiles:
    tiles = Tiles(16, 16, 16, 2, 4)
    assert fits(tiles, product)
    return tiles


def model_of(part: str, config: Any) -> Any:
    """Norms have scales that matter."""
    rng = np.random.default_rng(3)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * rng.uniform(0.5, 1.5, x.shape) if 'norm' in jax.tree_util.keystr(path) else x,
        tiny.random_params(part, config, seed=2),
    )
    return nnx.merge(graphdef_and_template(part, config)[0], cast_matrices(params, config.dtype))


def logits_of(model: Any, part: str, lengths: list[int]) -> np.ndarray:
    """Four rows of tokens; the texts of four, or of two, so that every second row reads nothing."""
    rng = np.random.default_rng(1)
    tok_BT = jnp.asarray(rng.integers(0, 65, (4, np.prod(model.config.grid))))
    txt_BSD = jnp.asarray(rng.normal(size=(len(lengths), model.config.text_length, 32)), jnp.float32)
    low_BT = jnp.asarray(rng.integers(0, 64, (4, 16)))

    @jax.jit
    def run():
        memory = model.memory(txt_BSD) if part == 'base' else model.memory(low_BT, txt_BSD)
        return model.logits(tok_BT, memory, jnp.asarray(lengths))

    return np.asarray(run(), np.float32)


@pytest.mark.parametrize(
    ('part', 'lengths', 'dtype', 'kernels'),
    [
        ('base', [5, 24], 'float32', True),
        ('superres', [5, 0, 24, 1], 'float32', True),
        pytest.param('base', [5, 24], 'bfloat16', True, marks=pytest.mark.slow),
        pytest.param('base', [5, 24], 'float32', False, marks=pytest.mark.slow),
        pytest.param('base', [5, 0, 24, 1], 'float32', True, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 24, 1], 'bfloat16', True, marks=pytest.mark.slow),
        pytest.param('base', [5, 0, 24, 1], 'float32', False, marks=pytest.mark.slow),
        pytest.param('base', [5, 24], 'bfloat16', False, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 24, 1], 'float32', False, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 24, 1], 'bfloat16', False, marks=pytest.mark.slow),
    ],
)
def test_fused_layers_are_the_layers(part, lengths, dtype, kernels, monkeypatch):
    config = dataclasses.replace(tiny.BASE if part == 'base' else tiny.SUPERRES, dtype=dtype, remat='none')
    monkeypatch.setattr(fused, 'tiles_for', small_tiles if kernels else lambda product, dtype: None)
    plain = logits_of(model_of(part, config), part, lengths)
    model = model_of(part, config)
    model.blocks = nnx.List([FusedLayers(unstack(model.blocks, config.layers))])
    error = np.abs(logits_of(model, part, lengths) - plain)
    if dtype == 'float32':
        assert error.max() < 1e-5 * np.abs(plain).max()
    else:
        # Both round: they are as far from each other as the plain one is from float32.
        exact = logits_of(model_of(part, dataclasses.replace(config, dtype='float32')), part, lengths)
        assert error.mean() < 1.5 * np.abs(plain - exact).mean()
        assert error.max() < 0.03 * np.abs(plain).max()
