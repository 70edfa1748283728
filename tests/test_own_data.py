"""The README's four commands on one's own pictures, as they stand there, with nets and pictures of a few pixels."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from photos import picture
from shell import ENVIRONMENT, ROOT

from muse.config import BaseRun, read_run
from muse.errors import UserError
from muse.release.format import load_part, load_release
from muse.train.finish import check_release

MODEL = {'codebook_size': 64, 'grid': '(4,4)', 'width': 32, 'mlp_dim': 64, 'heads': 2, 'layers': 2, 'text_width': 32}
DATA = {'image_size': 16, 'text_length': 24}
TRAIN = {'steps': 4, 'batch_size': 8, 'eval_batches': 1, 'log_every_steps': 1, 'grid_every_steps': 0}
ONE_DEVICE = ENVIRONMENT | {'XLA_FLAGS': '--xla_backend_optimization_level=0'}


def commands(config: str) -> dict[str, list[str]]:
    """Script → arguments of each command of the README's section that follows the path of a config."""
    section = (ROOT / 'README.md').read_text().split('## Your own pictures')[1].split('\n## ')[0]
    blocks = [block for block in re.findall(r'```\n(.*?)```', section, re.DOTALL) if config in block]
    lines = re.sub(r' *\\\n *', ' ', blocks[0]).strip().splitlines()
    assert len(blocks) == 1 and len(lines) == 4
    return {words[1]: words[2:] for words in map(shlex.split, lines)}


def write_pictures(folder: Path) -> None:
    (folder / 'a').mkdir(parents=True)
    words = ('red', 'green', 'blue', 'white', 'two', 'three')
    rows = [{'file': f'a/{i}.png', 'caption': f'{words[i % 6]} dog {words[i // 6]}'} for i in range(30)]
    for i in range(30):
        (folder / 'a' / f'{i}.png').write_bytes(picture(i * 30))
    (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')


def flags(groups: dict[str, dict]) -> list[str]:
    return [f'--config.{group}.{key}={value}' for group, values in groups.items() for key, value in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize('config', ['configs/own_data/base.py', 'configs/own_data/finetune.py'])
def test_the_four_commands(config, release_folder, tmp_path):
    write_pictures(tmp_path / 'pictures')
    tiny = flags({'model': MODEL | {'text_length': 24, 'dtype': 'float32'}, 'data': DATA, 'eval_data': DATA})
    tiny += [f'--config.tokenizer={release_folder}', f'--config.text_encoder={release_folder}']
    tiny += ['--config.data.workers=0', '--config.data.heldout_share=0.3']
    start = [f'--config.init_from={release_folder}'] if 'finetune' in config else []
    tokens = next(a.split('=')[1] for a in commands(config)['tools/precompute.py'] if a.startswith('--out='))
    assert read_run(json.loads(golden(config))).data.path == tokens, 'training reads what was precomputed'
    extra = {
        'tools/precompute.py': tiny,
        'train.py': [*tiny, *start, *flags({'train': TRAIN, 'data': {'path': tmp_path / tokens}})]
        + [f'--config.eval_data.path={tmp_path / tokens}'],
        'tools/eval_base.py': ['--config.data.heldout_share=0.3', '--masks=1'],
        'sample.py': ['--steps=2'],
    }
    printed = {}
    for script, arguments in commands(config).items():
        here = [re.sub(r'=(photos|pictures)$', f'={tmp_path}/pictures', a) for a in arguments]
        here = [re.sub(r'=((?:runs|out)/)', rf'={tmp_path}/\1', a) for a in here]
        line = [sys.executable, script, *here, *extra[script]]
        done = subprocess.run(line, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        printed[script] = done.stdout
    check(config, printed, release_folder, tmp_path)


def check(config: str, printed: dict[str, str], release_folder: Path, tmp_path: Path) -> None:
    name = 'own_finetune' if 'finetune' in config else 'own_data'
    counts = re.findall(r"(\d+) examples of split '(\w+)'", printed['tools/precompute.py'])
    assert [split for _, split in counts] == ['train', 'heldout'] and sum(int(count) for count, _ in counts) == 30
    release = load_release(tmp_path / 'runs' / name / 'release')
    assert release.tokenizer.config == load_part(release_folder, 'tokenizer').config
    measured = json.loads(printed['tools/eval_base.py'])
    assert measured['split'] == 'heldout' and measured['pictures'] == int(counts[1][0]) and measured['loss'] > 0
    assert len(list((tmp_path / 'out' / name).glob('*.png'))) >= 5  # four pictures and their sheet


def golden(config: str) -> str:
    return (ROOT / 'tests/golden/configs' / f'{config[8:-3].replace("/", "_")}.json').read_text()


def test_both_ways_are_four_commands():
    for config in ('configs/own_data/base.py', 'configs/own_data/finetune.py'):
        assert list(commands(config)) == ['tools/precompute.py', 'train.py', 'tools/eval_base.py', 'sample.py']


def test_the_release_of_a_finetune_is_the_shipped_shape():
    run = read_run(json.loads(golden('configs/own_data/finetune.py')))
    shipped = load_part(ROOT / 'muse' / 'assets', 'base').config
    assert isinstance(run, BaseRun)
    for key in ('codebook_size', 'grid', 'width', 'mlp_dim', 'heads', 'layers', 'text_width', 'text_length'):
        assert getattr(run.model, key) == getattr(shipped, key), key


def test_only_a_base_is_joined_into_a_release(tmp_path):
    run = read_run(json.loads(golden('configs/tiny/tokenizer.py')))
    with pytest.raises(UserError, match="--release is for a base, not for task 'tokenizer'"):
        check_release(run, str(tmp_path), 'run')


def test_a_release_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = read_run(json.loads(golden('configs/own_data/finetune.py')))
    (tmp_path / 'file').touch()
    for folder in ('file', 'file/below'):
        with pytest.raises(UserError, match="cannot be made, '.*file' is a file: choose another --release"):
            check_release(run, str(tmp_path / folder), 'run')
    with pytest.raises(UserError, match="release 'muse/../muse/assets' is the tokenizer of the run"):
        check_release(run, 'muse/../muse/assets', 'run')
    for folder, key in (('run', 'workdir'), ('run/export', 'export')):
        with pytest.raises(UserError, match=f"release 'run.*' is the {key} of the run"):
            check_release(run, folder, str(ROOT / 'run'))
    with pytest.raises(UserError, match='cannot be written .*name too long'):
        check_release(run, 300 * 'a', 'run')
    assert check_release(run, str(tmp_path / 'new/release'), 'run') == run
    assert not (tmp_path / 'new').exists()
