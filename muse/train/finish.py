"""After the training of a base: joins it with the nets that it was trained on into a release that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from muse.config import BaseRun, Run
from muse.data.precomputed import read_meta
from muse.errors import UserError
from muse.release.format import shipped
from muse.release.join import join_release
from muse.release.text_encoder import load_text_encoder
from muse.train.workdir import check_folder


def check_release(run: Run, folder: str, workdir: str) -> BaseRun:
    """Checks before a run that `write_release` will have what it needs.

    Raises:
        UserError: the run trains no base, the folder cannot be written or holds what the run reads, the text encoder
            is missing or not that of the data, or JAX was told to do without the CPU.
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
    _check_text_encoder(run)
    return run


def _check_text_encoder(run: BaseRun) -> None:
    """Reads it once now: precomputed data have no need of it until the run is done, which may be days from here."""
    cpu = _cpu()
    if jax.process_index() > 0:
        return
    folder = run.text_encoder or str(shipped())
    with jax.default_device(cpu):
        found = load_text_encoder(folder).part.ids_hash
    if run.data.kind == 'precomputed' and (Path(run.data.path) / 'meta.json').is_file():  # if not, the run says so
        wanted = read_meta(Path(run.data.path)).text_encoder_hash
        if found != wanted:
            raise UserError(
                f"--release: '{run.data.path}' was made with text encoder {wanted[:12]}, '{folder}' is {found[:12]}: "
                'set text_encoder to the one that was precomputed with'
            )


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
