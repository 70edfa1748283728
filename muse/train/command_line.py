"""From the command line to a config: completes the files of `configs/` and turns flag errors into one line."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from muse.config import read_run, to_dict
from muse.errors import UserError, main_guard, nearest


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/muse, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = os.path.expanduser('~/.cache/muse')
        with contextlib.suppress(OSError):  # a read-only home: compile anew each time
            os.makedirs(folder, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', folder)


def complete(values: Mapping[str, Any]) -> ConfigDict:
    """A whole config from the keys that differ from the defaults, so that every key can be set by a flag.

    Raises:
        UserError: an unknown key (names the nearest), a missing one, or a value of the wrong type.
    """
    return ConfigDict(to_dict(read_run(values)))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing.

    Raises:
        UserError: a config file that does not exist or cannot be read, an unknown flag or config key (names the
            nearest), or a value of the wrong type.
    """
    app.define_help_flags()
    argv = list(argv)
    file = _config_file(argv)
    if file is not None and not os.path.isfile(file):
        raise UserError(f"config file '{file}' does not exist: give a file of configs/")
    try:
        rest = flags.FLAGS(argv)
        _read_config()
    except (flags.Error, AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(_explain(error, argv, file)) from None
    if rest[1:]:
        raise UserError(f"'{rest[1]}' is no flag: flags look like --name=value")
    return rest


def parse_config_flags(argv: list[str]) -> list[str]:
    """`parse_flags` for `app.run`: its errors are one line and exit code 2."""
    with main_guard():
        return parse_flags(argv)


def _read_config() -> None:
    """Config files are read when first used: make their errors come now."""
    config = flags.FLAGS['config'].value
    if config is not None:
        config.to_dict()


def _config_file(argv: Sequence[str]) -> str | None:
    for i, argument in enumerate(argv):
        if argument in ('--config', '-config') and i + 1 < len(argv):
            return argv[i + 1]
        if re.match(r'--?config=', argument):
            return argument.split('=', 1)[1]
    return None


def _explain(error: Exception, argv: Sequence[str], file: str | None) -> str:
    """One line for what went wrong with the flags."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if ours := re.search(r'UserError: (.*)', str(error)):
        return ours.group(1)
    overrides = [key.group(1) for argument in argv[1:] if (key := re.match(r'--(?:no)?config\.([\w.]+)', argument))]
    if file is not None and overrides:
        config = runpy.run_path(file)['get_config']()
        for key in overrides:
            _check_key(config, key)
    return f'{lines[0] if len(lines) == 1 else lines[-1]} (flags are --config, --workdir and --config.KEY=VALUE)'


def _check_key(config: Any, key: str) -> None:
    """Raises UserError when `key` ('model.width') is not in a config."""
    for i, name in enumerate(parts := key.split('.')):
        if not isinstance(config, ConfigDict) or name not in config:
            near = nearest(name, config.keys()) if isinstance(config, ConfigDict) else ''
            raise UserError(f"config key '{'.'.join(parts[: i + 1])}' does not exist{near}")
        config = config[name]
