"""sample.py: what it writes, and that wrong input is one line and exit code 2 before anything is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

# Runs several command lines in one process, to import JAX once; a traceback ends it and fails the test.
DRIVER = """
import contextlib, io, json, sys
import sample
from absl.testing import flagsaver

results = []
for args in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sample.guarded(sample.parse(['sample.py', *args]))
        except SystemExit as stop:
            code = stop.code
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


def run_all(command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command line."""
    done = subprocess.run(
        [sys.executable, '-c', DRIVER],
        input=json.dumps(command_lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


def test_the_script_itself(release_folder, tmp_path):
    """As a person runs it: two prompts, two pictures each, from a process of its own."""
    out = tmp_path / 'new' / 'out'
    command = [sys.executable, 'sample.py', '--prompt=a red apple', '--prompt=Two dogs, left & right!', '--grid']
    command += [f'--model={release_folder}', f'--out={out}', '--num_images=2', '--seed=5', '--steps=3']
    command += ['--negative_prompt=a cat', '--guidance_scale=2.5', '--temperature=0.9']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and '4 pictures' in done.stdout
    stems = ['0000_a-red-apple', '0001_a-red-apple', '0002_two-dogs-left-right', '0003_two-dogs-left-right', 'grid']
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f'{stem}.{end}' for stem in stems for end in ('json', 'png')
    )

    image = Image.open(out / '0003_two-dogs-left-right.png')
    about = json.loads((out / '0003_two-dogs-left-right.json').read_text())
    assert image.size == (16, 16)
    assert about['prompt'] == 'Two dogs, left & right!' and about['model'].startswith('muse-')
    expected = {'seed': 5, 'index': 3, 'steps': 3, 'guidance_scale': 2.5, 'temperature': 0.9}
    assert {key: about[key] for key in expected} == expected and about['negative_prompt'] == 'a cat'
    text = image.text
    assert text['prompt'] == about['prompt'] and text['seed'] == '5' and text['index'] == '3'
    assert text['model'] == about['model'] and json.loads(text['guidance_scale']) == 2.5
    grid = np.asarray(Image.open(out / 'grid.png'))
    row = (grid.shape[0] - 4) // 2  # picture, caption and gap
    assert grid.shape[1] == 44 and row > 20
    np.testing.assert_array_equal(grid[4 + row : 20 + row, 24:40], np.asarray(image))


@pytest.fixture(scope='module')
def model(release_folder):
    return f'--model={release_folder}'


def test_files_seeds_and_warnings(model, tmp_path):
    file = tmp_path / 'prompts.txt'
    file.write_text('\ufeffa red apple\n\n  a cat  \n', encoding='utf-8')
    results = run_all(
        [
            [f'--prompts_file={file}', model, f'--out={tmp_path / "a"}', '--batch_size=1'],
            ['--prompt=a red apple', '--prompt=a cat', model, f'--out={tmp_path / "b"}', '--batch_size=4'],
            ['--prompt= ', model, f'--out={tmp_path / "c"}'],
            ['--prompt=' + 'a red apple ' * 30 + 'ñ', model, f'--out={tmp_path / "d"}'],
            ['--prompt=ünïcode 🍎/../..', model, f'--out={tmp_path / "e"}'],
        ]
    )
    assert [code for code, _, _ in results] == [0] * 5
    for stem in ('0000_a-red-apple.png', '0001_a-cat.png'):
        a, b = (Image.open(tmp_path / folder / stem) for folder in 'ab')
        assert a.text == b.text
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert results[2][2].count('\n') == 1 and 'without text' in results[2][2]
    assert (tmp_path / 'c' / '0000_picture.png').exists()
    assert 'lost from' in results[3][2]
    assert Image.open(tmp_path / 'e' / '0000_n-code.png').text['prompt'] == 'ünïcode 🍎/../..'


def test_wrong_input_is_one_line_and_exit_code_2(release_folder, model, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'blank.txt').write_text(' \n\n')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'huge.txt').write_text('x' * 1_000_001)
    broken = shutil.copytree(release_folder, tmp_path / 'broken')
    weights = (broken / 'base.safetensors').read_bytes()
    (broken / 'base.safetensors').write_bytes(weights[: len(weights) // 2])
    missing = shutil.copytree(release_folder, tmp_path / 'missing')
    (missing / 'tokenizer.safetensors').unlink()
    other = shutil.copytree(release_folder, tmp_path / 'other')
    config = (other / 'config.json').read_text()
    (other / 'config.json').write_text(config.replace('"mlp_dim": 64', '"mlp_dim": 96'))

    out, prompt = f'--out={tmp_path / "out"}', '--prompt=a cat'
    cases = [
        ([out, model], 'no prompt was given'),
        ([out, model, f'--prompts_file={tmp_path / "none.txt"}'], 'none.txt'),
        ([out, model, f'--prompts_file={tmp_path / "blank.txt"}'], 'holds no prompt'),
        ([out, model, f'--prompts_file={tmp_path / "latin.txt"}'], 'UTF-8'),
        ([out, model, f'--prompts_file={tmp_path}'], 'cannot be read'),
        ([out, model, f'--prompts_file={tmp_path / "huge.txt"}'], 'over the limit'),
        ([out, model, 'a cat'], "argument 'a cat'"),
        ([out, model, prompt, '--num_image=2'], 'Did you mean: num_images'),
        ([out, model, prompt, '--steps=many'], 'many'),
        ([out, model, prompt, '--steps=0'], 'steps is 0'),
        ([out, model, prompt, '--num_images=0'], 'num_images is 0'),
        ([out, model, prompt, '--num_images=-3'], 'num_images is -3'),
        ([out, model, prompt, '--batch_size=0'], 'batch_size is 0'),
        ([out, model, prompt, '--seed=-1'], 'seed is -1'),
        ([out, model, prompt, '--guidance_scale=-1'], 'guidance_scale is -1'),
        ([out, model, prompt, '--temperature=nan'], 'temperature is nan'),
        ([out, prompt, f'--model={tmp_path / "nowhere"}'], 'nowhere'),
        ([out, prompt, f'--model={broken}'], 'truncated or corrupted'),
        ([out, prompt, f'--model={missing}'], 'tokenizer.safetensors'),
        ([out, prompt, f'--model={other}'], 'another config'),
        ([f'--out={tmp_path / "file"}', model, prompt], 'cannot be written'),
        ([f'--out={tmp_path / "file" / "below"}', model, prompt], 'cannot be written'),
        (['--out=/proc/muse', model, prompt], 'cannot be written'),
    ]
    for (args, said), (code, stdout, stderr) in zip(cases, run_all([args for args, _ in cases]), strict=True):
        assert code == 2, (args, code, stderr)
        assert stderr.startswith('error: ') and stderr.count('\n') == 1 and stderr.endswith('\n'), (args, stderr)
        assert said in stderr, (args, stderr)
        assert stdout == ''
    assert not (tmp_path / 'out').exists()
    assert (tmp_path / 'file').read_text() == 'in the way'
