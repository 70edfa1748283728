"""What a script says where it cannot go on."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from absl import flags

from muse.errors import UserError, main_guard
from muse.jobs import command_line


@pytest.mark.parametrize('error', [UserError('too large'), ModuleNotFoundError('no', name='grain')])
def test_one_line_and_2(error, capsys):
    with pytest.raises(SystemExit) as caught, main_guard():
        raise error
    said = {UserError: 'error: too large\n'}.get(
        type(error), "error: the package 'grain' is not installed: pip install -e '.[data]'\n"
    )
    assert caught.value.code == 2 and capsys.readouterr().err == said


def test_a_module_of_ours_that_is_missing_is_no_users_error():
    with pytest.raises(ModuleNotFoundError), main_guard():
        raise ModuleNotFoundError('no', name='muse.nothing')


def test_a_name_that_is_too_long_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught, main_guard():
        (tmp_path / ('x' * 300)).stat()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: the name '/") and 'too long for a file' in said
    assert said.count('\n') == 1 and len(said) < 200
    with pytest.raises(OSError, match='No space'), main_guard():
        raise OSError(errno.ENOSPC, 'No space left on device')


def test_arguments_behind_no_flag_are_refused(capsys, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_string('model', '', 'a folder', flag_values=values)
    monkeypatch.setattr(command_line, 'FLAGS', values)
    assert command_line.parse_only_flags(['tool', '--model=x']) == ['tool'] and values.model == 'x'
    for argument, said in {'photo.jpg': "argument 'photo.jpg' is not behind a flag", '--num=3': "flag 'num'"}.items():
        with pytest.raises(SystemExit) as caught:
            command_line.parse_only_flags(['tool', argument])
        line = capsys.readouterr().err
        assert caught.value.code == 2 and said in line and line.count('\n') == 1


def test_every_tool_refuses_arguments_that_stand_behind_no_flag():
    """By the parser that it hands to absl; argparse refuses them itself. Pictures are arguments of one tool."""
    tools = Path(__file__).parents[1] / 'tools'
    scripts = {file.stem: file.read_text() for file in tools.glob('*.py')}
    found = {name: re.search(r'^    app\.run\((.*)$', text, re.M) for name, text in scripts.items()}
    calls = {name: call[1] for name, call in found.items() if call}
    strict = ('guarded(main), flags_parser=parse_only_flags)', 'guarded(main), flags_parser=parse_config_flags)')
    others = {name: call for name, call in calls.items() if call not in strict}
    assert len(calls) > 15 and others == {'reconstruct': 'guarded(main), flags_parser=parse)'}
