"""Every shipped config against its golden text: a changed default shows up in review. Remake with MUSE_GOLDEN=write."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
from flax import nnx

from muse.config import read_run, to_dict
from muse.errors import UserError
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN
from muse.train.command_line import complete

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden' / 'configs'
NAMES = sorted(str(path.relative_to(ROOT / 'configs'))[:-3] for path in (ROOT / 'configs').rglob('*.py'))
PARAMETERS = {
    'paper/base_3b': 3.2e9,
    'paper/base_632m': 0.632e9,
    'paper/superres_770m': 0.768e9,
    'paper/superres_268m': 0.298e9,
    'emoji/base': 11.6e6,
    'paper/tokenizer_f16': 57.8e6,
    'paper/tokenizer_f8': 51.9e6,
    'paper/decoder_finetune': 222.0e6,
    'emoji/tokenizer': 3.93e6,
    'emoji/superres_tokenizer': 2.7e6,
}


def config(name):
    spec = importlib.util.spec_from_file_location('config', ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize('name', NAMES)
def test_golden(name):
    text = json.dumps(to_dict(read_run(config(name))), indent=2) + '\n'
    path = GOLDEN / (name.replace('/', '_') + '.json')
    if os.environ.get('MUSE_GOLDEN') == 'write':
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, 'a setting changed: look at it, then remake with MUSE_GOLDEN=write'
    assert read_run(json.loads(text)) == read_run(config(name)), 'the JSON reads back as the same run'


def test_no_golden_is_left_over():
    assert {path.stem for path in GOLDEN.iterdir()} == {name.replace('/', '_') for name in NAMES}


# One of each model; tracing a tokenizer takes seconds.
FAST = {'paper/tokenizer_f16', 'paper/base_3b', 'paper/superres_770m'}


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in NAMES])
def test_the_model_builds_without_memory(name):
    run = read_run(config(name))
    model_class = {'base': Transformer, 'superres': Superres}.get(run.task, VQGAN)
    shapes = nnx.eval_shape(lambda: model_class(run.model, rngs=nnx.Rngs(params=0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.split(shapes, nnx.Param)[1]))
    assert count == pytest.approx(PARAMETERS.get(name, count), rel=0.05)


def test_base_and_tokenizer_of_a_recipe_fit():
    for recipe in ('tiny', 'emoji'):
        tokenizer, base = read_run(config(f'{recipe}/tokenizer')), read_run(config(f'{recipe}/base'))
        side = tokenizer.data.image_size // tokenizer.model.factor
        assert base.model.grid == (side, side)
        assert base.model.codebook_size == tokenizer.model.codebook_size
        assert base.data.text_length == base.model.text_length == tokenizer.data.text_length


def test_the_super_res_of_a_recipe_fits_its_tokenizers():
    low, high = read_run(config('tiny/tokenizer')), read_run(config('tiny/superres_tokenizer'))
    superres, base = read_run(config('tiny/superres')), read_run(config('tiny/base'))
    side = high.data.image_size // high.model.factor
    assert superres.model.grid == (side, side) and superres.model.low_grid == base.model.grid
    assert superres.model.codebook_size == high.model.codebook_size
    assert superres.model.low_codebook_size == low.model.codebook_size
    assert superres.data.text_length == superres.model.text_length == base.model.text_length
    assert (superres.tokenizer, superres.text_encoder) == (base.tokenizer, base.text_encoder)


def test_a_wrong_key_names_the_nearest():
    values = config('tiny/base').to_dict()
    values['model']['widht'] = 3
    with pytest.raises(UserError, match=r"'model.widht' does not exist; did you mean 'width'"):
        complete(values)


def test_a_value_of_the_wrong_type_is_named():
    values = config('tiny/base').to_dict()
    values['train']['steps'] = 'many'
    with pytest.raises(UserError, match=r"'train.steps' must be int, not 'many'"):
        complete(values)
