"""Errors and warnings addressed to the person at the keyboard: one line that says what to do."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Wrong input. The message is one line: the value, the rule it breaks, and the way out."""


class InputWarning(UserWarning):
    """Doubtful input that does not stop the work (a prompt that was cut, a picture that was skipped)."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the closest of `choices`, or a list of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f'; choose one of {", ".join(choices)}'


def warn(message: str) -> None:
    """Warns the user on one line, without a source location."""
    warnings.warn(message, InputWarning, stacklevel=2)


def _one_line_warning(message, category, filename, lineno, file=None, line=None):
    del filename, lineno, line
    label = 'warning' if issubclass(category, InputWarning) else category.__name__
    print(f'{label}: {message}', file=file or sys.stderr)


_DATA = ('tensorflow_datasets', 'grain', 'array_record', 'importlib_resources', 'pyarrow', 'resvg_py')


@contextlib.contextmanager
def main_guard() -> Iterator[None]:
    """Wraps a script's main: a `UserError` becomes one line on stderr and exit code 2; Ctrl-C exits with 130.

    So do a package of the extra 'data' that is not installed and a name that is too long for a file. Set
    MUSE_TRACEBACK=1 to see the full traceback.
    """
    warnings.showwarning = _one_line_warning
    try:
        yield
    except (UserError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            if error.name not in _DATA:
                raise
            error = f"the package '{error.name}' is not installed: pip install -e '.[data]'"
        if os.environ.get('MUSE_TRACEBACK'):
            raise
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        # Of a path given by the user: Path's is_file() and its like raise for it, where they say no to any other.
        if error.errno != errno.ENAMETOOLONG or os.environ.get('MUSE_TRACEBACK'):
            raise
        name = str(error.filename)[:80]
        print(f"error: the name '{name}…' is too long for a file: give a shorter one", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
