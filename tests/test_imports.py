"""What importing brings along, and that dependencies point one way (docs/design.md, 'Rooms')."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ('grain', 'tensorflow_datasets', 'tensorflow', 'torch', 'ml_collections', 'orbax', 'tensorboardX', 'resvg_py')

# A module may import those of its own layer and of layers above it.
LAYERS = (
    ('errors', 'strict', 'config'),
    ('nn',),
    ('models',),
    ('mesh', 'masking', 'guidance', 'decode', 'release', 'tiling', 'text', 'data'),
    ('canvas', 'settings', 'drawing', 'cascade'),
    ('pipeline',),
    ('editing', 'evals', 'train'),
    ('jobs',),
    ('aot',),
)
BESIDE_THE_MODELS = ('data', 'text')


def modules() -> dict[str, Path]:
    files = sorted((ROOT / 'muse').rglob('*.py'))
    return {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path for path in files}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of `muse` that a file imports anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} imports relatively'
            names.update({node.module or '', *(f'{node.module}.{alias.name}' for alias in node.names)})
    return {name for name in names if name.startswith('muse.')} & modules().keys()


def room(module: str) -> str:
    return module.split('.')[1]


def layer(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if room(module) in names]
    assert found, f'{module} belongs to no layer: add it to docs/design.md and to LAYERS'
    return found[0]


def test_dependencies_point_one_way():
    late = ('muse.pipeline', 'editing')  # inside methods: `Muse.inpaint` is a doorway to editing
    wrong = [
        f'{module} imports {other}'
        for module, path in modules().items()
        if module != 'muse'
        for other in imported(path)
        if layer(other) > layer(module) and (module, room(other)) != late
    ]
    assert not wrong, wrong
    assert 'editing' not in map(room, imported(modules()['muse.pipeline'], top_level_only=True))


@pytest.mark.parametrize('name', BESIDE_THE_MODELS)
def test_data_and_text_import_no_models(name):
    for module, path in modules().items():
        if module != 'muse' and room(module) == name:
            assert not {other for other in imported(path) if room(other) in ('models', 'nn')}, module


def test_only_data_imports_grain_and_tfds():
    for module, path in modules().items():
        if not module.startswith('muse.data'):
            text = path.read_text()
            for name in ('grain', 'tensorflow_datasets', 'torch'):
                assert f'import {name}' not in text and f'from {name}' not in text, module


def run(code: str) -> str:
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_muse_is_light():
    code = f'import sys, muse; print([m for m in {(*HEAVY, "jax", "flax", "numpy")!r} if m in sys.modules])'
    assert run(code).strip() == '[]'
    assert run('import muse; print(muse.__version__)').strip().count('.') == 2


def test_sampling_imports_no_training_libraries():
    kernels = 'jax.experimental.pallas.triton'  # deprecated: only where kernels of it are used
    code = f'import sys, sample, muse; muse.load; print([m for m in {(*HEAVY, kernels)!r} if m in sys.modules])'
    assert run(code).strip() == '[]'


def test_unknown_attribute():
    import muse

    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        muse.lod  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
