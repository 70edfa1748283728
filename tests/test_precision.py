"""Drawing with products of one-byte numbers: from the flag to the pictures, and what is written beside them."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from shell import run_all

import muse
from muse import drawing
from muse.config import DataConfig
from muse.errors import InputWarning, UserError
from muse.jobs.run import identity
from muse.models.transformer import Block
from muse.nn.quantized import QuantizedLinear
from muse.pipeline import Row
from muse.release.format import load_part
from tools import bench, eval_precision


@pytest.fixture(scope='module')
def small_model(release_folder):
    return muse.load(release_folder, precision='int8')


def test_pictures_are_drawn_by_rounded_layers(small_model, tiny_model):
    rows = [Row(prompt='a red apple', index=i) for i in range(3)]
    found = [drawn.low for drawn in small_model.draw(rows, small_model.settings(seed=7))]
    [alone] = small_model.draw(rows[1:2], small_model.settings(seed=7))
    np.testing.assert_array_equal(alone.low, found[1])
    # Some tokens were near a tie; the others are those of the release's own way, and not of another prompt.
    plain = [drawn.low for drawn in tiny_model.draw(rows, tiny_model.settings(seed=7))]
    others = [Row(prompt='two dogs', index=i) for i in range(3)]
    other = [drawn.low for drawn in tiny_model.draw(others, tiny_model.settings(seed=7))]
    same, by_chance = np.mean(np.equal(found, plain)), np.mean(np.equal(other, plain))
    assert by_chance + 0.3 < same < 1, (by_chance, same)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(small_model.cascade.base.params)}
    assert kinds == {jnp.dtype('int8'), jnp.dtype('float32')}


def test_edits_are_drawn_so_too(small_model):
    picture, mask = Image.new('RGB', (16, 16), 'red'), Image.new('L', (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    painted = np.asarray(small_model.inpaint(picture, mask, 'two dogs', context=9.0))
    assert (painted[:, :8] == (255, 0, 0)).all() and (painted[:, 8:] != (255, 0, 0)).any()


def test_weights_are_held_once(small_model, tiny_model):
    """In the type that they are drawn in: those of the release are shapes."""
    for model in (small_model, tiny_model):
        held = [leaf for part in (model.release.base, model.release.tokenizer) for leaf in jax.tree.leaves(part.params)]
        assert held and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in held)
        shapes = jax.tree.leaves(model.release.base.params)
        assert sum(math.prod(leaf.shape) for leaf in shapes) == sum(x.size for x in held[: len(shapes)])


def test_what_is_written_of_a_model(small_model, tiny_model):
    plain = identity(tiny_model)
    assert 'precision' not in plain and identity(small_model) == {**plain, 'precision': 'int8'}


def test_own_kernels_are_not_for_rounded_layers(small_model, monkeypatch):
    monkeypatch.setattr(drawing, 'platform', lambda: 'gpu')
    monkeypatch.setattr(drawing, 'drawing_kernels', lambda dtype: True)
    graph, params = small_model.cascade.base
    model = drawing._merged(graph, params)
    assert isinstance(model.blocks, nnx.List) and isinstance(model.blocks[0], Block)
    layer = model.blocks[1].mlp.down
    assert isinstance(layer, QuantizedLinear)
    assert (layer.values[...] == params['blocks']['mlp']['down']['values'][...][1]).all()
    monkeypatch.setenv('MUSE_GPU_KERNELS', '1')
    with pytest.warns(InputWarning, match='own kernels take no products of one-byte numbers'):
        drawing._merged(graph, params)


def test_an_unknown_precision_is_refused_ahead_of_all_else():
    with pytest.raises(UserError, match=r"^precision 'fp4' does not exist; did you mean 'fp8'\?$"):
        muse.load('nowhere', precision='fp4')  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::muse.errors.InputWarning')
@pytest.mark.parametrize('precision', ['int8', 'fp8'])
def test_both_levels_are_drawn_in_both_precisions(cascade_folder, cascade_model, precision):
    model = muse.load(cascade_folder, precision=precision)
    settings = model.settings(seed=3)
    [found] = model.draw([Row(prompt='a red apple')], settings)
    [over] = model.draw([Row(prompt='a red apple', low=found.low)], settings)
    np.testing.assert_array_equal(found.high, over.high)
    [plain] = cascade_model.draw([Row(prompt='a red apple', low=found.low)], settings)
    assert 0.3 < np.mean(plain.high == found.high) < 1


@pytest.mark.slow
def test_the_scripts(release_folder, tmp_path):
    model, out = f'--model={release_folder}', tmp_path / 'out'
    draw = ['--prompt=a red apple', model, f'--out={out}', '--steps=2']
    [(code, _, said)] = run_all('sample', [[*draw, '--precision=int8']])
    assert code == 0, said
    [about] = [json.loads(path.read_text()) for path in out.glob('*.json')]
    assert about['precision'] == 'int8'
    other, wrong = run_all('sample', [draw, [*draw, '--precision=int4']])
    assert other[0] == 2 and 'drawn otherwise (precision was "int8", now null)' in other[2], other
    assert wrong[0] == 2 and wrong[2].count('\n') == 1 and 'precision' in wrong[2], wrong
    image, edited = next(out.glob('*.png')), tmp_path / 'edited'
    [(code, _, said)] = run_all(
        'edit', [[f'--image={image}', '--variation=0.5', model, f'--out={edited}', '--precision=fp8']]
    )
    assert code == 0, said
    [about] = [json.loads(path.read_text()) for path in edited.glob('*.json')]
    assert about['precision'] == 'fp8'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::muse.errors.InputWarning')  # the tiny vocabulary knows few words
def test_the_tool_says_what_each_precision_costs(tiny_model, release_folder):
    base, data = load_part(release_folder, 'base'), DataConfig(kind='scenes', split='heldout_pairs', image_size=16)
    knobs = {'number': 16, 'seed': 0, 'masks': 1, 'draw': 8}
    rows = {row['precision']: row for row in eval_precision.measure(tiny_model, base, data, **knobs)}
    assert list(rows) == ['float32', 'bfloat16', 'int8', 'fp8']
    errors = [row['logits_error'] for row in rows.values()]
    assert errors == sorted(errors) and errors[0] == 0 < errors[1] and errors[3] < 0.3
    assert rows['float32']['cost'] == 0 and rows['float32']['same_top'] == 1
    for row in rows.values():
        assert row['loss'] == pytest.approx(rows['float32']['loss'] + row['cost']) and row['drawn'] == 8
    assert rows['int8']['mib'] < rows['bfloat16']['mib'] < rows['float32']['mib']
    with pytest.raises(UserError, match='^4 pictures can be used: give at least 8'):
        next(eval_precision.measure(tiny_model, base, data, number=4, seed=0, masks=1, draw=2))


@pytest.mark.slow
def test_the_bench_draws_in_each_precision(capsys):
    case = ['sample', '--tiny', '--cases=cascade_3b', '--batches=1', '--repeats=1', '--peer_modes=']
    bench.main([*case, '--precision=none,int8'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['precision'] for row in rows] == ['none', 'int8'] and rows[0]['same_tokens'] == 1
    assert rows[1]['memory_gib'] < rows[0]['memory_gib'] and rows[1]['same_tokens'] > 0.5
