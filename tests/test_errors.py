"""What a script says where it cannot go on."""

from __future__ import annotations

import pytest

from muse.errors import UserError, main_guard


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
