"""After the training of a base: joins it with the nets that it was trained on into a release that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from muse.config import BaseRun, Run
from muse.errors import UserError
from muse.release.format import shipped
from muse.release.join import join_release


def check_release(run: Run) -> BaseRun:
    """Checks before a run that `write_release` will have what it needs.

    Raises:
        UserError: the run trains no base, or JAX was told to do without the CPU.
    """
    if not isinstance(run, BaseRun):
        raise UserError(f"--release is for a base, not for task '{run.task}': join the parts with tools/export.py")
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
