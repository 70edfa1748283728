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

from muse.config import SuperresConfig, TransformerConfig
from muse.errors import InputWarning
from muse.models import fused
from muse.models.fused import FusedLayers
from muse.nn import few_keys
from muse.nn.devices import capability
from muse.nn.fused_linear import Product, Tiles, fits
from muse.nn.layers import cast_matrices, unstack
from muse.release.format import graphdef_and_template

# With 32 keys, which the kernel for few keys takes.
BASE = dataclasses.replace(tiny.BASE, text_length=31)
SUPERRES = dataclasses.replace(tiny.SUPERRES, grid=(16, 16), text_length=15)


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
    low_BT = jnp.asarray(rng.integers(0, 64, (4, 16 if part == 'base' else np.prod(model.config.low_grid))))

    @jax.jit
    def run():
        memory = model.memory(txt_BSD) if part == 'base' else model.memory(low_BT, txt_BSD)
        return model.logits(tok_BT, memory, jnp.asarray(lengths))

    return np.asarray(run(), np.float32)


def test_shapes_that_no_kernel_takes_are_the_plain_way_and_said_where_kernels_were_asked_for(monkeypatch):
    """A text of 25 keys, and products that no tiles cut."""
    config = dataclasses.replace(tiny.BASE, remat='none', layers=1, dtype='bfloat16')
    plain = logits_of(model_of('base', config), 'base', [5, 24])
    model = model_of('base', config)
    model.blocks = nnx.List([FusedLayers(unstack(model.blocks, config.layers))])
    monkeypatch.setenv('MUSE_GPU_KERNELS', '1')
    with pytest.warns(InputWarning) as said:
        found = logits_of(model, 'base', [5, 24])
    assert np.abs(found - plain).max() < 0.03 * np.abs(plain).max()
    messages = ' | '.join(str(each.message) for each in said)
    assert 'attention of 16 queries over 25 keys in heads of 16' in messages
    assert 'products of 64x32x96 for heads of 16' in messages


@pytest.mark.parametrize(
    ('part', 'lengths', 'dtype', 'kernels'),
    [
        ('base', [5, 31], 'float32', True),
        ('superres', [5, 0, 15, 1], 'float32', True),
        pytest.param('base', [5, 31], 'bfloat16', True, marks=pytest.mark.slow),
        pytest.param('base', [5, 31], 'float32', False, marks=pytest.mark.slow),
        pytest.param('base', [5, 0, 15, 1], 'float32', True, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 15, 1], 'bfloat16', True, marks=pytest.mark.slow),
        pytest.param('base', [5, 0, 15, 1], 'float32', False, marks=pytest.mark.slow),
        pytest.param('base', [5, 31], 'bfloat16', False, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 15, 1], 'float32', False, marks=pytest.mark.slow),
        pytest.param('superres', [5, 0, 15, 1], 'bfloat16', False, marks=pytest.mark.slow),
    ],
)
def test_fused_layers_are_the_layers(part, lengths, dtype, kernels, monkeypatch):
    config = dataclasses.replace(BASE if part == 'base' else SUPERRES, dtype=dtype, remat='none')
    monkeypatch.setattr(fused, 'tiles_for', small_tiles if kernels else lambda product, dtype: None)
    if not kernels:
        monkeypatch.setattr(few_keys, 'fits', lambda q, k: False)
        monkeypatch.setattr(few_keys, 'fits_axes', lambda q, tokens: False)
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


# Layers of the paper's sizes (632M base, super-res), whose kernels are those that users get.
PAPER = {'width': 1024, 'mlp_dim': 4096, 'heads': 16, 'layers': 2, 'text_length': 127, 'codebook_size': 64}
PAPER |= {'text_width': 32, 'remat': 'none', 'dtype': 'bfloat16'}


@pytest.mark.skipif(capability() < 8, reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('part', ['base', 'superres'])
def test_on_a_gpu(part):
    """As near to float32 as the layers without kernels."""
    low = {'low_codebook_size': 64, 'low_layers': 0}
    config = TransformerConfig(**PAPER) if part == 'base' else SuperresConfig(**PAPER, **low)
    lengths = [5, 127] if part == 'base' else [5, 0, 127, 1]

    def logits(dtype: str, *, fuse: bool) -> np.ndarray:
        attention = 'xla' if dtype == 'float32' else 'auto'
        model = model_of(part, dataclasses.replace(config, dtype=dtype, attention=attention))
        if fuse:
            model.blocks = nnx.List([FusedLayers(unstack(model.blocks, config.layers))])
        with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
            return logits_of(model, part, lengths)

    exact, plain, fast = logits('float32', fuse=False), logits('bfloat16', fuse=False), logits('bfloat16', fuse=True)
    assert np.abs(fast - exact).mean() < 1.3 * np.abs(plain - exact).mean()
    assert np.abs(fast - exact).max() < 2 * np.abs(plain - exact).max()
