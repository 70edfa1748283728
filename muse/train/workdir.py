"""The folder of a run: whose it is, and what is written into it before the first step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from muse import __version__
from muse.config import Run, to_dict
from muse.errors import UserError, warn

# Of a disk that is full or has no room for this user, cannot be written, or is broken or gone.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
_SHAPELESS = ('remat', 'unroll', 'attention', 'dtype')  # model keys that may change between two starts


def check_workdir(workdir: Path, config: Run) -> None:
    """Checks that a run can live in `workdir`; writes nothing.

    Warns where the config reads other batches than the run that it goes on with.

    Raises:
        UserError: it cannot be written, or holds a run of another model.
    """
    check_folder(workdir, 'workdir')
    path = workdir / 'config.json'
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): choose another --workdir") from None
    wanted = json.loads(json.dumps(to_dict(config)))
    for part in ('task', 'model'):
        _same(found.get(part), wanted[part], part, workdir)
    if jax.process_index() == 0 and any((workdir / 'checkpoints').glob('[0-9]*')):
        _warn_of_other_batches(found, wanted, workdir)


def check_folder(folder: Path, flag: str) -> None:
    """Checks that the folder of a flag is there or can be made, and can be written; writes nothing.

    Raises:
        UserError: it cannot.
    """
    if re.match(r'[a-z][a-z0-9]+:/', str(folder)):  # pathlib makes one slash of two
        raise UserError(f"{flag} '{folder}' is an address: mount the bucket (gcsfuse) and give its folder")
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    except OSError as error:
        raise UserError(f"{flag} '{folder}' cannot be written ({error.strerror}): choose another --{flag}") from None
    if not existing.is_dir():
        raise UserError(f"{flag} '{folder}' cannot be made, '{existing}' is a file: choose another --{flag}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} '{folder}' cannot be written: choose another --{flag}")


def _same(found: Any, wanted: Any, key: str, workdir: Path) -> None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in wanted.keys() - set(_SHAPELESS):
            _same(found.get(name), wanted[name], f'{key}.{name}', workdir)
    elif found != wanted:
        raise UserError(
            f"workdir '{workdir}' holds a run with {key} = {found!r}, the config says {wanted!r}: "
            'use that config or another --workdir'
        )


def _warn_of_other_batches(found: dict[str, Any], wanted: dict[str, Any], workdir: Path) -> None:
    """What a run reads depends on these alone; a change is the user's right, and seldom meant."""
    for part, names in (('train', ('batch_size', 'seed')), ('data', wanted['data'].keys() - {'workers', 'max_unread'})):
        for name in sorted(names):
            before, now = found.get(part, {}).get(name, wanted[part][name]), wanted[part][name]
            if before != now:
                warn(
                    f"workdir '{workdir}' holds a run with {part}.{name} = {before!r}, it goes on with {now!r}: its "
                    'batches are not those that it would have read'
                )


def claim_workdir(workdir: Path, config: Run, abstract_state: dict[str, PyTree]) -> None:
    """Makes the folder; the first host writes config.json (every key) and run.json (versions, parameter count).

    Raises:
        UserError: the disk refuses.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _write_json(workdir / 'config.json', to_dict(config))
            _write_json(workdir / 'run.json', _description(abstract_state['params']))
    except OSError as error:
        raise UserError(f"workdir '{workdir}' cannot be written ({error}): choose another --workdir") from None


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turns what a full, read-only or broken disk makes Python raise into one line.

    Raises:
        UserError: instead of the OSErrors of such disks.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"'{error.filename or workdir}' cannot be written ({error.strerror}): make room, then run the same command "
            'again to go on from the newest checkpoint'
        ) from error


def _description(params: PyTree) -> dict[str, Any]:
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain')
    return {
        'muse': __version__,
        'python': platform.python_version(),
        'packages': {name: _version(name) for name in packages},
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'parameters': sum(x.size for x in jax.tree.leaves(params)),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'absent'


def _write_json(path: Path, value: Any) -> None:
    tmp = path.with_name(f'.{path.name}.tmp')
    tmp.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
    os.replace(tmp, path)
