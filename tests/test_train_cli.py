"""train.py as it is called: every kind of wrong flag is one line on stderr, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from muse.errors import UserError
from muse.train.command_line import parse_flags

# config_flags imports a file in a way that Python 3.11 deprecates.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

ROOT = Path(__file__).parent.parent
TINY = f'--config={ROOT / "configs" / "tiny" / "base.py"}'


@pytest.fixture
def parse(monkeypatch):
    """parse_flags on a fresh set of train.py's flags."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', None, 'A config.', flag_values=values)
    flags.DEFINE_string('workdir', None, 'A folder.', flag_values=values)
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setattr('absl.app.define_help_flags', lambda: None)

    def parse(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])  # config_flags looks for overrides there
        parse_flags(sys.argv)
        return config.value

    return parse


def test_overrides_reach_the_config(parse):
    config = parse(TINY, '--workdir=x', '--config.train.steps=7', '--config.model.grid=(4, 4)', '--config.optim.b1=0.5')
    assert config.train.steps == 7 and config.model.grid == (4, 4) and config.optim.b1 == 0.5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--config=no/such.py'], "config file 'no/such.py' does not exist: give a file of configs/"),
        ([TINY, '--config.train.stepz=7'], "config key 'train.stepz' does not exist; did you mean 'steps'?"),
        ([TINY, '--config.modle.width=7'], "config key 'modle' does not exist; did you mean 'model'?"),
        ([TINY, '--config.train.steps=many'], "'train.steps'|many"),
        ([TINY, '--worckdir=x'], 'worckdir'),
        ([TINY, 'stray'], "'stray' is no flag: flags look like --name=value"),
    ],
)
def test_wrong_flags_are_one_line(parse, arguments, message):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    text = str(caught.value)
    assert '\n' not in text
    assert any(part in text for part in message.split('|')), text


def test_a_wrong_key_inside_a_config_file(parse, tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from muse.train.command_line import complete\n\n\n'
        "def get_config():\n    return complete({'task': 'base', 'modle': {}})\n"
    )
    with pytest.raises(UserError, match=r"^config key 'modle' does not exist; did you mean 'model'\?$"):
        parse(f'--config={file}')


def test_the_script_itself(tmp_path):
    command = [sys.executable, 'train.py', TINY, f'--workdir={tmp_path / "run"}', '--config.tokenizer=no/such/folder']
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and 'no/such/folder' in done.stderr and done.stderr.startswith('error: ')
    assert not (tmp_path / 'run').exists(), 'nothing half-written'


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('--config.eval_data.split=nope', "'nope'"),
        ('--config.train.steps=0', 'train.steps is 0: give at least 1'),
        ('--config.train.save_every_steps=-1', 'train.save_every_steps is -1: give at least 0'),
        ('--config.data.kind=folder', 'folder'),
    ],
)
def test_wrong_values_stop_before_anything_is_written(parse, tmp_path, override, message):
    from muse.config import read_run
    from muse.train.loop import run

    config = parse(f'--config={ROOT / "configs" / "tiny" / "tokenizer.py"}', '--config.train.batch_size=8', override)
    with pytest.raises(UserError) as caught:
        run(read_run(config.to_dict()), tmp_path / 'run')
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists() or not list((tmp_path / 'run').iterdir())
