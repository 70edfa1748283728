"""What makes drawing fast draws the same: against the plain way, token for token in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from muse import drawing
from muse.aot.count import count
from muse.aot.hlo import parse
from muse.config import DecodeConfig
from muse.models import fused
from muse.models.fused import FusedLayers
from muse.models.superres import Superres
from muse.models.transformer import Block, Transformer
from muse.nn import few_keys
from muse.nn.fused_linear import Tiles
from muse.release.format import graphdef_and_template
from muse.train.flops import base_draw_flops, superres_draw_flops

STEPS = 3
# With 32 and 16 keys, which the kernel for few keys takes.
BASE_OF_KERNELS = dataclasses.replace(tiny.BASE, text_length=31)
SUPERRES_OF_KERNELS = dataclasses.replace(tiny.SUPERRES, grid=(16, 16), text_length=15)
DECODE = DecodeConfig(steps=STEPS)


def loud(part: str, config: Any) -> tuple[Any, Any]:
    """A model whose text and neighbours change the tokens drawn."""
    return graphdef_and_template(part, config)[0], tiny.random_params(part, config, seed=2)


def batch(config: Any, *, states_of_both: bool, rows: int = 2) -> drawing.Batch:
    """Guided against no text, with states that are not read for the second branch, or without any."""
    rng = np.random.default_rng(0)
    txt_1BSD = jnp.asarray(rng.normal(size=(1, rows, config.text_length, config.text_width)), jnp.float32)
    txt_GBSD = jnp.concatenate([txt_1BSD, 9 * txt_1BSD]) if states_of_both else txt_1BSD
    len_GB = np.array([[5, config.text_length][:rows], [0, 0][:rows]], np.int32)
    return drawing.batch_of(DECODE, txt_GBSD, len_GB, np.zeros(rows, np.uint32), np.arange(rows, dtype=np.int32))


def compiled(fill: Any, part: str, config: Any, *before: Any, states_of_both: bool) -> tuple[Any, Any]:
    graph, params = loud(part, config)
    canvas_BT = np.zeros((2, config.grid[0] * config.grid[1]), np.int32)
    arguments = (params, *before, canvas_BT, canvas_BT > 0, batch(config, states_of_both=states_of_both))
    program = drawing.program_of(DECODE)
    return fill.lower(*arguments, graph=graph, grid=config.grid, program=program).compile(), arguments


def test_the_base_without_attention_over_the_null_draws_the_same():
    """Nor does taking the layers' weights from their stack ahead of the steps change a token."""
    unrolled = dataclasses.replace(tiny.BASE, unroll=tiny.BASE.layers)
    fast, arguments = compiled(drawing.fill_base, 'base', unrolled, states_of_both=False)
    plain, plain_arguments = compiled(drawing.fill_base, 'base', tiny.BASE, states_of_both=True)
    tokens = np.asarray(fast(*arguments))
    np.testing.assert_array_equal(tokens, plain(*plain_arguments))
    assert len(np.unique(tokens[-1])) > 4
    # As many operations as the formula says, and fewer than with that attention.
    formula = base_draw_flops(tiny.BASE, 2, STEPS)
    # Each layer's constant, and the row of keys and values that its null overwrites.
    own = tiny.BASE.layers * (2 + 2 * 2 * 2) * tiny.BASE.width**2
    assert count(parse(fast.as_text()), 1).flops == pytest.approx(formula + own, rel=1e-3)
    assert count(parse(plain.as_text()), 1).flops > 1.03 * formula


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers apart and fused, their kernels interpreted; the list fills with the names of attention's kernels."""
    calls = []

    def counted(name: str) -> Any:
        kernel = getattr(few_keys, name)

        def call(*heads: Any, **options: Any) -> Any:
            calls.append(name)
            return kernel(*heads, **options)

        return call

    for name in ('attend', 'attend_axes'):
        monkeypatch.setattr(few_keys, name, counted(name))
    monkeypatch.setattr(drawing, 'platform', lambda: 'gpu')
    monkeypatch.setattr(drawing, 'drawing_kernels', lambda dtype: True)
    monkeypatch.setattr(fused, 'tiles_for', lambda product, dtype: Tiles(16, 16, 16, 2, 4))
    return calls


@pytest.mark.slow
def test_fused_layers_draw_the_same(monkeypatch):
    plain, arguments = compiled(drawing.fill_base, 'base', BASE_OF_KERNELS, states_of_both=False)
    calls = as_on_a_gpu(monkeypatch)
    jax.clear_caches()
    found, _ = compiled(drawing.fill_base, 'base', BASE_OF_KERNELS, states_of_both=False)
    np.testing.assert_array_equal(found(*arguments), plain(*arguments))
    assert set(calls) == {'attend'} and len(calls) >= 2 * BASE_OF_KERNELS.layers  # to itself and to the text
    jax.clear_caches()  # nobody else draws so


@pytest.mark.slow
def test_a_fused_super_res_draws_the_same(monkeypatch):
    """Also through windows, since the canvas is larger than the trained one."""
    low_BT = np.random.default_rng(1).integers(0, 64, (2, 24))
    grid = (16, 24)
    graph, params = loud('superres', SUPERRES_OF_KERNELS)
    canvas_BT = np.zeros((2, 16 * 24), np.int32)
    given = batch(SUPERRES_OF_KERNELS, states_of_both=False)

    def draw() -> np.ndarray:
        jax.clear_caches()
        program = drawing.program_of(DECODE)
        arguments = (params, low_BT, canvas_BT, canvas_BT > 0, given)
        return np.asarray(drawing.fill_superres(*arguments, graph=graph, grid=grid, program=program))

    plain = draw()
    calls = as_on_a_gpu(monkeypatch)
    np.testing.assert_array_equal(draw(), plain)
    assert {'attend', 'attend_axes'} == set(calls)
    jax.clear_caches()


def test_layers_are_fused_where_the_machine_has_kernels_for_their_type(monkeypatch):
    """`tests/nn/test_devices.py` says where."""
    monkeypatch.setattr(drawing, 'platform', lambda: 'gpu')
    kinds = []
    for dtype in ('float32', 'bfloat16'):
        graph, params = loud('base', dataclasses.replace(tiny.BASE, dtype=dtype))
        kinds.append(type(drawing._merged(graph, params).blocks[0]))
        monkeypatch.setattr(drawing, 'drawing_kernels', lambda dtype: dtype == 'bfloat16')
        kinds.append(type(drawing._merged(graph, params).blocks[0]))
    assert kinds == [Block, Block, FusedLayers, FusedLayers]


@pytest.mark.slow
def test_the_super_res_draws_the_same_and_as_many_operations_as_the_formula_says():
    low_BT = np.random.default_rng(1).integers(0, 64, (2, 16))
    fast, arguments = compiled(drawing.fill_superres, 'superres', tiny.SUPERRES, low_BT, states_of_both=False)
    plain, plain_arguments = compiled(drawing.fill_superres, 'superres', tiny.SUPERRES, low_BT, states_of_both=True)
    np.testing.assert_array_equal(fast(*arguments), plain(*plain_arguments))
    # The program reads pads of the text and the low-res tokens once for each branch.
    found = count(parse(fast.as_text()), 1).flops
    assert 1.0 <= found / superres_draw_flops(tiny.SUPERRES, 2, STEPS) < 1.25


def test_the_logits_are_the_same_in_bfloat16_within_rounding():
    config = dataclasses.replace(tiny.BASE, dtype='bfloat16')
    graph, params = loud('base', config)
    base = nnx.merge(graph, params)
    given = batch(config, states_of_both=False)
    tok_RT = jnp.asarray(np.random.default_rng(1).integers(0, 65, (4, 16)))
    len_B, none_B = jnp.asarray(given.len_GB)

    @jax.jit
    def fast(tok_RT):
        return base.logits(tok_RT, base.memory(given.txt_GBSD[0]), len_B)

    @jax.jit
    def plain(tok_RT):
        return base(tok_RT, jnp.repeat(given.txt_GBSD[0], 2, axis=0), jnp.stack([len_B, none_B], axis=1).reshape(-1))

    ours, theirs = (np.asarray(run(tok_RT), np.float32) for run in (fast, plain))
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1 * np.abs(theirs).max()  # the text does matter


@pytest.mark.parametrize('kind', [Transformer, Superres])
def test_weights_are_cast_ahead_of_the_steps(kind):
    """A step would read twice the bytes otherwise; norms and tables, which are used in float32, stay."""
    config = dataclasses.replace(tiny.BASE if kind is Transformer else tiny.SUPERRES, dtype='bfloat16')
    graph, template = graphdef_and_template('base' if kind is Transformer else 'superres', config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)
    cast = nnx.to_flat_state(nnx.split(drawing._merged(graph, params), nnx.Param)[1])
    for path, variable in cast:
        assert variable.dtype == (jnp.bfloat16 if path[-1] == 'kernel' else jnp.float32), path
