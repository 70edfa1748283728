"""sample.py: what it writes, and that wrong input is one line and exit code 2 before anything is written."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shell import ENVIRONMENT, ROOT, contents, run_all

from muse.config import DataConfig, DecodeConfig, read
from muse.data.webdataset import WebDataset
from muse.jobs.sampling import Knobs
from muse.pipeline import Row


def test_the_script_itself(release_folder, tmp_path):
    """As a person runs it: two prompts, two pictures each, from a process of its own."""
    out = tmp_path / 'new' / 'out'
    command = [sys.executable, 'sample.py', '--prompt=a red apple', '--prompt=Two dogs, left & right!', '--grid']
    command += [f'--model={release_folder}', f'--out={out}', '--num_images=2', '--seed=5', '--steps=3']
    command += ['--negative_prompt=a cat', '--guidance_scale=2.5', '--temperature=0.9']
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and '4 pictures' in done.stdout
    stems = ['0000_a-red-apple', '0001_a-red-apple', '0002_two-dogs-left-right', '0003_two-dogs-left-right', 'grid']
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f'{stem}.{end}' for stem in stems for end in ('json', 'png')), 'manifest.jsonl']
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


def file_cases(model, folder):
    file = folder / 'prompts.txt'
    file.write_text('\ufeffa red apple\n\n  a cat  \n', encoding='utf-8')
    # Drawn by the program that the job of rows has compiled.
    model = [model, '--steps=3', '--order=halton', '--top_k=5']
    return [
        [f'--prompts_file={file}', *model, f'--out={folder / "a"}', '--batch_size=1'],
        ['--prompt=a red apple', '--prompt=a cat', *model, f'--out={folder / "b"}', '--batch_size=4'],
        ['--prompt= ', *model, f'--out={folder / "c"}'],
        ['--prompt=' + 'a red apple ' * 30 + 'ñ', *model, f'--out={folder / "d"}'],
        ['--prompt=ünïcode 🍎/../..', *model, f'--out={folder / "e"}'],
    ]


def wrong_cases(release_folder, model, folder):
    """(command line, what must be said of it)"""
    (folder / 'file').write_text('in the way')
    (folder / 'p.xlsx').write_text('prompt')
    (folder / 'blank.txt').write_text(' \n\n')
    (folder / 'latin.txt').write_bytes(b'caf\xe9')
    (folder / 'huge.txt').write_text('x' * 1_000_001)
    broken = shutil.copytree(release_folder, folder / 'broken')
    weights = (broken / 'base.safetensors').read_bytes()
    (broken / 'base.safetensors').write_bytes(weights[: len(weights) // 2])
    missing = shutil.copytree(release_folder, folder / 'missing')
    (missing / 'tokenizer.safetensors').unlink()
    other = shutil.copytree(release_folder, folder / 'other')
    config = (other / 'config.json').read_text()
    (other / 'config.json').write_text(config.replace('"mlp_dim": 64', '"mlp_dim": 96'))

    (folder / 'bad.jsonl').write_text('{}\n{"prompt": "a", "index": -1}\n')

    out, prompt = f'--out={folder / "none"}', '--prompt=a cat'
    return [
        (
            [f'--out={folder / "all_bad"}', model, f'--prompts_file={folder / "bad.jsonl"}'],
            'no prompt: give one (all 2 in',
        ),
        ([out, model], 'no prompt was given'),
        ([out, model, f'--prompts_file={folder / "none.txt"}'], 'none.txt'),
        ([out, model, f'--prompts_file={folder / "blank.txt"}'], 'holds no prompt'),
        ([out, model, f'--prompts_file={folder / "latin.txt"}'], 'UTF-8'),
        ([out, model, f'--prompts_file={folder}'], 'cannot be read'),
        ([out, model, f'--prompts_file={folder / "huge.txt"}'], 'over the limit'),
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
        ([out, model, prompt, '--size=17x17'], 'multiples of 4'),
        ([out, model, prompt, '--size=16'], '256x256'),
        ([out, model, prompt, '--top_p=0'], 'top_p is 0'),
        ([out, model, prompt, '--top_k=-1'], 'top_k is -1'),
        ([out, model, prompt, '--guidance_interval=0.5'], '0.2,0.8'),
        ([out, model, prompt, '--guidance_interval=0.8,0.2'], 'behind its end'),
        ([out, model, prompt, '--order=spiral'], 'spiral'),
        ([out, model, prompt, '--superres_steps=2'], 'holds no super-res'),
        ([out, model, prompt, '--shard_size=0'], 'shard_size is 0'),
        ([out, model, prompt, '--grid', '--num_images=1001'], 'up to 1000 pictures'),
        ([out, model, f'--prompts_file={folder / "p.xlsx"}'], "ends in '.xlsx'"),
        ([out, model, prompt, '--distributed'], '--distributed'),
        ([out, model, prompt, '--aot_configs=a.py'], 'goes with --aot'),
        ([out, prompt, f'--model={folder / "nowhere"}'], 'nowhere'),
        ([out, prompt, f'--model={broken}'], 'truncated or corrupted'),
        ([out, prompt, f'--model={missing}'], 'tokenizer.safetensors'),
        ([out, prompt, f'--model={other}'], 'another config'),
        ([f'--out={folder / "file"}', model, prompt], 'cannot be written'),
        ([f'--out={folder / "file" / "below"}', model, prompt], 'cannot be written'),
        (['--out=/proc/muse', model, prompt], 'cannot be written'),
    ]


ROWS = """id,prompt,seed,negative_prompt,guidance_scale,temperature,size
,a red apple,,,,,
own,a cat,9,a dog,0.5,0.3,
,bad seed,-1,,,,
tall,"a dog left",,,,,16x24
,three,fields
odd,"a cow",,,,,17x17
"""


@pytest.fixture(scope='module')
def job(release_folder, model, tmp_path_factory):
    """(the folder of all below, what was said of the job and of files, what was said to wrong input)"""
    folder = tmp_path_factory.mktemp('job')
    (folder / 'rows.csv').write_text(ROWS)
    args = [f'--prompts_file={folder / "rows.csv"}', model, '--num_images=2', '--seed=4', '--steps=3']
    args += ['--gif', '--save_tokens', '--order=halton', '--top_k=5', '--guidance_interval=0,0.9']
    again = [*args, f'--out={folder / "out"}']
    other = [*args[:3], '--seed=5', f'--out={folder / "out"}']
    lines = [
        again,
        again,
        other,
        [*args, f'--out={folder / "tars"}', '--format=webdataset'],
        *file_cases(model, folder),
    ]
    wrong = wrong_cases(release_folder, model, folder)
    results = run_all('sample', [*lines, *(args for args, _ in wrong)])
    return folder, results[: len(lines)], list(zip(wrong, results[len(lines) :], strict=True))


def test_files_seeds_and_warnings(job):
    folder, results = job[0], job[1][4:]
    assert [code for code, _, _ in results] == [0] * 5
    for stem in ('0000_a-red-apple.png', '0001_a-cat.png'):
        a, b = (Image.open(folder / name / stem) for name in 'ab')
        assert a.text == b.text
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert results[2][2].count('\n') == 1 and 'without text' in results[2][2]
    assert (folder / 'c' / '0000_picture.png').exists()
    assert 'lost from' in results[3][2]
    assert Image.open(folder / 'e' / '0000_n-code.png').text['prompt'] == 'ünïcode 🍎/../..'


def test_wrong_input_is_one_line_and_exit_code_2(job):
    for (args, said), (code, stdout, stderr) in job[2]:
        assert code == 2, (args, code, stderr)
        assert stderr.startswith('error: ') and stderr.count('\n') == 1 and stderr.endswith('\n'), (args, stderr)
        assert said in stderr, (args, stderr)
        assert stdout == ''
    assert not (job[0] / 'none').exists()
    assert contents(job[0] / 'all_bad')['rejects.jsonl'].count(b'\n') == 2
    assert (job[0] / 'file').read_text() == 'in the way'


def test_a_job_of_rows(job):
    folder, (first, again, other, *_) = job[:2]
    assert first[0] == again[0] == 1 and other[0] == 2  # rows were left out; another job's pictures are in the way
    assert first[2].count('is left out') == 3 and all(f'line {line}' in first[2] for line in (4, 6, 7))
    assert first[1] == f'6 pictures in {folder}/out/\n'
    assert again[1] == f'6 pictures in {folder}/out/, 6 of them there already\n'
    assert 'was drawn otherwise' in other[2] and other[2].startswith('error: ') and other[2].count('\n') > 0
    stems = ['0000_a-red-apple', '0001_a-red-apple', 'own_0', 'own_1', 'tall_0', 'tall_1']
    endings = ('gif', 'json', 'npz', 'png')
    names = [f'{stem}.{end}' for stem in stems for end in endings]
    assert sorted(contents(folder / 'out')) == sorted([*names, 'manifest.jsonl', 'rejects.jsonl'])
    rejects = [json.loads(line) for line in (folder / 'out/rejects.jsonl').read_text().splitlines()]
    assert [reject['line'] for reject in rejects] == [4, 6, 7] and 'seed is -1' in rejects[0]['error']
    assert [reject['row'] for reject in rejects] == [ROWS.splitlines()[line - 1] for line in (4, 6, 7)]
    assert 'multiples of 4' in rejects[2]['error']  # found out by the model, not by the table
    with Image.open(folder / 'out/tall_1.png') as tall:
        assert tall.size == (16, 24)


def test_a_line_of_the_manifest_draws_its_picture_again(job, tiny_model):
    folder = job[0] / 'out'
    lines = [json.loads(line) for line in (folder / 'manifest.jsonl').read_text().splitlines()]
    assert len(lines) == 6
    for line in lines[:4]:  # those of the model's own size: another is another program
        knobs = read(DecodeConfig, {field.name: line[field.name] for field in dataclasses.fields(DecodeConfig)})
        shared = Knobs(
            decoding=knobs, superres=False, seed=line['seed'], negative_prompt=line['negative_prompt'], size=None
        )
        settings = shared.settings(tiny_model, tuple(line['size']))
        [drawn] = tiny_model.draw([Row(prompt=line['prompt'], index=line['index'])], settings)
        image = Image.open(folder / line['file'])
        # The test's own process compiles with other options, which may round a pixel otherwise.
        assert np.abs(np.asarray(drawn.image).astype(int) - np.asarray(image)).max() <= 1
        with np.load((folder / line['file']).with_suffix('.npz')) as tokens:
            np.testing.assert_array_equal(tokens['low'], drawn.low)
        with Image.open((folder / line['file']).with_suffix('.gif')) as gif:
            assert gif.n_frames == 3 and gif.size == image.size  # pyright: ignore[reportAttributeAccessIssue]
        assert image.text['top_k'] == '5'  # pyright: ignore[reportAttributeAccessIssue]


def test_shards_are_read_as_training_data_is(job):
    folder, results, _ = job
    assert results[3][0] == 1
    assert sorted(contents(folder / 'tars')) == ['00000.tar', '00001.tar', 'manifest.jsonl', 'rejects.jsonl']
    found = WebDataset(
        DataConfig(kind='webdataset', path=str(folder / 'tars'), image_key='png', caption_key='txt', image_size=16)
    )
    assert len(found) == 6


def command(model: str, out: Path, *more: str) -> list[str]:
    rows = '--prompts_file=' + str(out.parent / 'rows.jsonl')
    return [sys.executable, 'sample.py', rows, model, f'--out={out}', '--num_images=3', '--gif', '--grid', *more]


def kill_and_restart(model: str, folder: Path, rows: int, kills: int, *more: str) -> None:
    """The same job uninterrupted, and killed at random moments while it draws: the same files, to the byte."""
    lines = [json.dumps({'prompt': f'{n} red dogs', 'seed': n} if n % 2 else {'prompt': 'a cat'}) for n in range(rows)]
    (folder / 'rows.jsonl').write_text('\n'.join(lines))
    whole = subprocess.run(command(model, folder / 'whole', *more), cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert whole.returncode == 0
    rng, killed = random.Random(kills), folder / 'killed'
    for _ in range(kills):
        process = subprocess.Popen(command(model, killed, *more), cwd=ROOT, env=ENVIRONMENT)
        before, deadline = len(list(killed.glob('*'))), time.monotonic() + 600
        while process.poll() is None and len(list(killed.glob('*'))) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not more:
        assert 0 < len(contents(killed)) < len(contents(folder / 'whole'))
    assert subprocess.run(command(model, killed, *more), cwd=ROOT, env=ENVIRONMENT, timeout=600).returncode == 0
    assert contents(killed) == contents(folder / 'whole')


@pytest.mark.slow  # tests/jobs kills the same runner without a model
def test_killed_and_restarted_gives_the_same_files(model, tmp_path):
    kill_and_restart(model, tmp_path, 15, 1)


JOIN = """
import sys, jax
address, process, *args = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
import sample
from muse.jobs.command_line import guarded, parse
guarded(sample.main)(parse(['sample.py', *args]))
"""


@pytest.mark.slow
def test_two_hosts_write_what_one_does(model, tmp_path):
    (tmp_path / 'p.txt').write_text('\n'.join(f'{n} red dogs' for n in range(21)))
    args = [f'--prompts_file={tmp_path / "p.txt"}', model, '--grid']
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    both = [
        subprocess.Popen(
            [sys.executable, '-c', JOIN, address, str(process), *args, f'--out={tmp_path / "both"}'],
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        for process in range(2)
    ]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    [(code, _, _)] = run_all('sample', [[*args, f'--out={tmp_path / "one"}']])
    assert code == 0 and contents(tmp_path / 'both') == contents(tmp_path / 'one')


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('--format=webdataset', '--shard_size=40')])
def test_killed_many_times(model, tmp_path, more):
    kill_and_restart(model, tmp_path, 300, 6, *more)
