"""The wheel, installed into a fresh environment, draws from another folder with what it brings itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / 'muse' / 'assets'

DRAW = """
import sys
import muse
assert sys.prefix in muse.__file__, muse.__file__
model = muse.load()
image, = model.generate(['a red apple'], seed=0, steps=4)
assert image.size == model.size
assert len(image.getcolors(2**20)) > 1
image.save('apple.png')
print(model.release.name)
"""


def run(*command: str | Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, release_folder):
    """Built from a copy of the sources; the tiny release stands in where no weights are shipped yet."""
    source = tmp_path_factory.mktemp('wheel')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / 'muse', source / 'muse', ignore=shutil.ignore_patterns('__pycache__'))
    if not (SHIPPED / 'config.json').exists():
        shutil.copytree(release_folder, source / 'muse' / 'assets', dirs_exist_ok=True)
    options = ('--no-deps', '--no-build-isolation', '--disable-pip-version-check')
    run(sys.executable, '-m', 'pip', 'wheel', '-q', *options, '-w', source, '.', cwd=source)
    return next(source.glob('*.whl'))


def test_the_wheel_holds_package_and_data_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'muse'}
    for name in (
        'config.json',
        'tokenizer.safetensors',
        'text_encoder.safetensors',
        'base.safetensors',
        'spiece.model',
    ):
        assert f'muse/assets/{name}' in names
    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / 'muse').rglob('*') if path.is_file()}
    assert {name for name in in_tree if '__pycache__' not in name} <= set(names)


def test_installed_into_a_fresh_environment_it_draws_from_another_folder(wheel, tmp_path):
    environment, elsewhere = tmp_path / 'venv', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / 'bin' / 'python'
    site = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, wheel, cwd=elsewhere)
    # Dependencies come from the environment that runs the tests; its own `muse`, if any, comes later on the path.
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    assert run(python, '-W', 'error', '-c', DRAW, cwd=elsewhere).startswith('muse-')
    assert (elsewhere / 'apple.png').stat().st_size > 100
