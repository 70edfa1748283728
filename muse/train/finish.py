"""After the training of a base: joins it with the nets that it was trained on into a release that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from muse.config import BaseRun, Run
from muse.errors import UserError
from muse.release.format import shipped
from muse.release.join import join_release
from muse.train.workdir import check_folder


def check_release(run: Run, folder: str, workdir: str) -> BaseRun:
    """Checks before a run that `write_release` will have what it needs.

    Raises:
        UserError: the run trains no base, the folder cannot be written or holds what the run reads, or JAX was told to
            do without the CPU.
    """
    if not isinstance(run, BaseRun):
        raise UserError(f"--release is for a base, not for task '{run.task}': join the parts with tools/export.py")
    check_folder(Path(folder), 'release')
    read = {'tokenizer': run.tokenizer, 'text_encoder': run.text_encoder or str(shipped()), 'init_from': run.init_from}
    read |= {'workdir': workdir, 'export': str(Path(workdir) / 'export')}
    for key, value in read.items():
        if value and Path(value).resolve() == Path(folder).resolve():
            raise UserError(
                f"release '{folder}' is the {key} of the run and would be overwritten: choose another --release"
            )
    _cpu()
    return run


def _cpu() -> Any:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:
        raise UserError("--release needs the CPU beside the accelerator: unset JAX_PLATFORMS, or add ',cpu'") from None


def write_release(run: BaseRun, workdir: str, folder: str) -> None:
    """Writes the release of a finished run on the first host, its large tensors as int8.

    Raises:
        UserError: a part is missing, or the folder cannot be written.
    """
    if jax.process_index() > 0:
        return
    parts = [Path(part) for part in (run.tokenizer, run.text_encoder or str(shipped()), f'{workdir}/export', folder)]
    with jax.default_device(_cpu()):  # a text encoder may be larger than an accelerator
        size = join_release(*parts, storage='int8')
    print(f'{folder}: {size / 2**20:.1f} MiB (int8)')
