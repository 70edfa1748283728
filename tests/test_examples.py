"""Every script and the notebook of examples/ run, here with a tiny model, and write the pictures they speak of."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import muse

pytestmark = pytest.mark.filterwarnings('ignore::muse.errors.InputWarning')  # words that the tiny vocabulary lacks
EXAMPLES = Path(__file__).parents[1] / 'examples'
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob('*.py'))
WRITTEN = {
    'edit': 4,
    'generate': 5,
    'inpaint': 2,
    'outpaint': 2,
    'rows': 6,
    'tokens': 1,
    'upscale': 1,
    'variation': 5,
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_known():
    assert sorted(WRITTEN) == SCRIPTS


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_writes_its_pictures(name, tiny_model, cascade_model, tmp_path):
    more = []
    if name == 'upscale':
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)).save(tmp_path / 'small.png')
        more = [tmp_path / 'small.png']
    load(name).main(cascade_model if name == 'upscale' else tiny_model, tmp_path / 'out', *more)
    pictures = sorted((tmp_path / 'out').iterdir())
    assert len(pictures) == WRITTEN[name]
    sizes = set()
    for path in pictures:
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert {'upscale': {(28, 18)}, 'outpaint': {(32, 16), (24, 24)}}.get(name, {(16, 16)}) == sizes


@pytest.mark.slow
def test_the_notebook_runs(tiny_model, monkeypatch):
    notebook = json.loads((EXAMPLES / 'tour.ipynb').read_text(encoding='utf-8'))
    assert notebook['nbformat'] == 4 and notebook['nbformat_minor'] >= 5
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])
    code = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert len(code) >= 6 and not any(cell.get('outputs') for cell in notebook['cells'])
    monkeypatch.setattr(muse, 'load', lambda: tiny_model, raising=False)
    names: dict = {}
    for source in code:
        exec(compile(source, 'tour.ipynb', 'exec'), names)
    assert len(names['varied']) == 4 and len(names['frames']) == 4
