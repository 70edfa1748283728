"""The benches of sampling and training: tiny ones run, variants change nothing else, FLOPs are XLA's."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import SuperresConfig, TransformerConfig
from muse.errors import UserError
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.nn import fused_linear
from muse.train.flops import superres_flops, transformer_flops
from tools import bench, bench_floors, bench_sample
from tools import cases as what
from tools.bench_linear import use_tiles
from tools.random_weights import random_weights
from tools.variants import DRAWING_VARIANTS, PATCHES, TRAINING_VARIANTS, combined, patched

SMALL = {'codebook_size': 256, 'width': 128, 'mlp_dim': 512, 'heads': 4, 'layers': 2, 'text_width': 64}
SMALL |= {'text_length': 31, 'remat': 'none', 'unroll': 2}


def run(capsys, *flags: str) -> list[dict]:
    bench.main(list(flags))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize('kind', [Transformer, pytest.param(Superres, marks=pytest.mark.slow)])
def test_flops_equal_xlas_count_of_an_unrolled_model(kind):
    """XLA also counts norms, softmax and GELU: more of them in a small model than in a large one."""
    extra = []
    if kind is Superres:
        low = {'low_codebook_size': 256, 'low_grid': (8, 8), 'low_layers': 2, 'block': 4}
        config, formula = SuperresConfig(grid=(16, 16), **low, **SMALL), superres_flops
        extra = [jnp.zeros((2, 64), jnp.int32)]
    else:
        config, formula = TransformerConfig(grid=(8, 16), **SMALL), transformer_flops
    graphdef, params = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    tokens = config.grid[0] * config.grid[1]
    arguments = (jnp.zeros((2, tokens), jnp.int32), *extra, jnp.zeros((2, 31, 64)), jnp.full(2, 31))

    def forward(params, *arguments):
        return nnx.merge(graphdef, params)(*arguments)

    def loss(params, *arguments):
        return jnp.square(forward(params, *arguments)).mean()

    def flops(function):
        return jax.jit(function).lower(params, *arguments).compile().cost_analysis()['flops']

    once = formula(config, 2)
    assert 1.0 <= flops(forward) / once < 1.08
    # The gradient of the table of tokens is one more product, of 257 rows filled up to 384.
    tables = 2 * 2 * 128 * (tokens * 384 + (64 * 256 if kind is Superres else 0))
    assert 1.0 <= flops(jax.grad(loss)) / (3 * once + tables) < 1.12


def test_floors_follow_from_the_formulas():
    """The base's drawing: 12 steps read 626M weights in bfloat16; operations of a token, both branches."""
    case = what.drawing('base_632m', tiny=False)
    moved = bench_floors.drawing_bytes(case, 1)
    assert 12 * 2 * 620e6 < moved < 12 * 2 * 660e6
    per_token = 36 * 2 * 1024 * (2 * (4 * 1024 + 2 * 256 + 2 * 4096) + 2 * 1024 + 2 * 128) + 4 * 1024 * 8192
    once = 36 * 4 * 127 * 1024**2 + 2 * 127 * 1024 * 4096
    drawn = bench_sample.flops(case, 1) - bench_sample.decoder_flops(case.decoder, 256**2)
    assert drawn == 12 * 256 * per_token + once


@pytest.mark.slow
def test_random_weights_have_unit_gain_and_the_models_types():
    config = what.net('base_632m', tiny=True)
    graphdef, params = random_weights(lambda: Transformer(config, rngs=nnx.Rngs(params=0)), jnp.bfloat16)
    flat = dict(nnx.to_flat_state(params))
    up, scale = flat['blocks', 'mlp', 'up', 'kernel'], flat['blocks', 'self_norm', 'scale']
    assert up.dtype == jnp.bfloat16 and scale.dtype == jnp.float32 and bool((scale[...] == 1).all())
    assert abs(float(jnp.std(up[...].astype(jnp.float32))) - 32**-0.5) < 0.01
    assert nnx.merge(graphdef, params).config == config


def test_patches_are_taken_back():
    before = {name: vars(module).copy() for name, module in _patched_modules().items()}
    for name in PATCHES:
        with patched([name]):
            pass
    assert {name: vars(module) for name, module in _patched_modules().items()} == before
    both = combined('unroll_2+plain_gelu', TRAINING_VARIANTS)
    assert both.config == {'unroll': 2} and both.patches == ('plain_gelu',)


def _patched_modules():
    from muse import drawing, masking
    from muse.models import fused, transformer
    from muse.nn import attention, attention_kernels, few_keys, fused_linear, layers, norm_kernels
    from muse.train import masked

    nets = (fused, transformer, attention, attention_kernels, few_keys, fused_linear, layers, norm_kernels)
    modules = (drawing, masking, *nets, masked)
    return {module.__name__: module for module in modules}


def test_wrong_names_are_refused(capsys):
    for flags, said in (
        (('sample', '--cases=cascade'), "--cases names 'cascade'; did you mean 'cascade_3b'?"),
        (('train', '--variants=now,plain_glu'), "did you mean 'plain_gelu'?"),
        (('parts', '--parts=gelu,norm'), "--parts='norm' is no part of a layer"),
        (('parts', '--chained=0'), 'give 1 or more'),
    ):
        with pytest.raises(SystemExit) as caught:
            bench.main(list(flags))
        assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_sample(capsys):
    """Every variant draws the tokens of the plain way in float32."""
    names = ','.join(name for name in DRAWING_VARIANTS if not name.startswith('unroll') or name == 'unroll_2')
    flags = ('--tiny', '--batches=2', '--repeats=2', '--peer_modes=eager', '--dtype=float32', f'--variants={names}')
    *ours, peer = run(capsys, 'sample', *flags)
    assert {line['case'] for line in ours} == {'base_632m', 'cascade_3b'} and 'failed' in peer
    for line in ours:
        assert line['same_tokens'] == 1.0 and line['ms_min'] <= line['ms'] <= line['ms_max'], line
        assert line['ms_per_image'] == round(line['ms'] / 2, 3) and line['compile_s'] > 0


@pytest.mark.slow
def test_train(capsys):
    """Every variant starts at the same loss, within rounding."""
    names = ','.join(name for name in TRAINING_VARIANTS if name[-1].isalpha() or name in ('unroll_2', 'accumulate_2'))
    flags = ('--tiny', '--cases=base_632m', '--batches=8', '--repeats=1', '--peer_modes=', f'--variants={names}')
    lines = run(capsys, 'train', *flags)
    losses = np.array([line['first_loss'] for line in lines])
    np.testing.assert_allclose(losses, losses[0], rtol=0.02)
    [line, profile] = run(
        capsys, 'train', '--tiny', '--cases=superres_770m', '--batches=2', '--repeats=1', '--peer_modes=', '--profile=3'
    )
    assert line['images_per_s'] > 0 and {'part', 'kind', 'op'} <= {key for row in profile['profile'] for key in row}


@pytest.mark.slow
def test_parts(capsys):
    """The kernels are no farther from float32 than what they stand in for."""
    lines = run(capsys, 'parts', '--tiny', '--repeats=1')
    lines[4:6] = run(capsys, 'parts', '--tiny', '--repeats=1', '--parts=gelu', '--chained=2')
    assert len(lines) == 12 and all(line['ms_both'] > 0 and 0 < line['error'] < 0.02 for line in lines), lines
    for plain, own in zip(lines[::2], lines[1::2], strict=True):
        assert plain['part'] == own['part'] and own['error'] < 1.3 * plain['error'] + 1e-3, (plain, own)


@pytest.mark.slow
def test_floors(capsys):
    lines = run(capsys, 'floors')
    assert len(lines) == 7 and all(0 < line['most_share_of_peak'] <= 0.8 for line in lines)


@pytest.mark.slow
def test_linear(capsys, tmp_path):
    """Every product of the models, and a file from which drawing takes its tilings."""
    path = tmp_path / 'tiles.json'
    flags = ('linear', '--tiny', '--batches=1', '--repeats=1', f'--out={path}')
    lines = run(capsys, *flags)
    assert len(lines) == 18 and len(json.loads(path.read_text())) == 18
    assert all(line['xla_us'] > 0 and not line['failed'] for line in lines)
    before = dict(fused_linear.TUNED)
    use_tiles(str(path))
    assert len(fused_linear.TUNED) > len(before)
    fused_linear.TUNED.clear()
    fused_linear.TUNED.update(before)
    with pytest.raises(UserError, match='--tiles'):
        use_tiles(str(tmp_path / 'none.json'))
