"""The commands around tokenizers, as a person runs them: import a published one, reconstruct, evaluate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from public_weights import weights
from safetensors.numpy import save_file

from muse.data.pictures import open_picture
from muse.release.format import load_part

ROOT = Path(__file__).parents[1]
MOVQ = json.loads((ROOT / 'tests' / 'golden' / 'public_vq' / 'models.json').read_text())['movq']


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, f'tools/{name}.py', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('movq')
    save_file(weights(MOVQ['shapes']), folder / 'diffusion_pytorch_model.safetensors')
    (folder / 'config.json').write_text(json.dumps(MOVQ['settings']))
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for name, (height, width) in {'a': (70, 51), 'b': (64, 90)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f'{name}.png')
    Image.new('CMYK', (80, 80), (10, 200, 30, 0)).save(folder / 'c.jpg')
    (folder / 'd.png').write_bytes(b'no picture')
    return folder


def test_import_then_reconstruct(published, pictures, tmp_path):
    done = tool('import_tokenizer', f'--weights={published}', f'--out={tmp_path}/release', '--storage=bfloat16')
    assert done.returncode == 0, done.stderr
    part = load_part(tmp_path / 'release', 'tokenizer')
    assert part.hash[:12] in done.stdout and "'codebook_size': 32" in done.stdout
    flags = (f'--model={tmp_path}/release', f'--out={tmp_path}', '--tile=48', '--overlap=16')
    done = tool('reconstruct', *flags, pictures / 'd.png', pictures / 'a.png', pictures / 'c.jpg')
    assert done.returncode == 2 and "d.png' cannot be used" in done.stderr
    assert done.stderr.endswith('error: 1 of 3 pictures could not be read: see the warnings above\n')
    assert 'warning: a picture of 70x51 pixels is padded to 70x52, multiples of 2' in done.stderr
    assert 'a.png: 51x70, PSNR ' in done.stdout
    assert open_picture(tmp_path / 'a.png').shape == (70, 51, 3)
    assert open_picture(tmp_path / 'c.png').shape == (80, 80, 3)


@pytest.mark.slow
def test_evaluate_a_folder(published, pictures, tmp_path):
    flags = (f'--model={published}', f'--pictures={pictures}', f'--out={tmp_path}', '--image_size=32')
    for more in ((), ('--whole', '--tile=64', '--overlap=16')):
        done = tool('eval_tokenizer', *flags, *more)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result['pictures'] == 3 and 0 < result['codebook_usage'] <= 1 <= result['perplexity'] <= 32
        assert "d.png' " in done.stderr and done.stderr.count('it is no picture file') >= 1
        assert open_picture(result['grid']).shape[1] > 2 * 32


@pytest.mark.parametrize(
    'name, arguments, message',
    [
        ('import_tokenizer', ('--weights=nowhere.ckpt', '--out=x'), "error: cannot read weights 'nowhere.ckpt'"),
        ('reconstruct', ('--out=x',), 'error: no pictures given'),
        (
            'reconstruct',
            ('--out=docs/images', 'docs/images/grid.png'),
            "error: the reconstruction of 'docs/images/grid",
        ),
        ('eval_tokenizer', ('--out=x', '--whole'), 'error: --whole judges pictures at their own size'),
    ],
)
def test_refusals_are_one_line(name, arguments, message, tmp_path):
    arguments = [a.replace('--out=x', f'--out={tmp_path}/x') for a in arguments]
    done = tool(name, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count('\n') == 1
