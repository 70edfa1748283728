"""Trains a part of Muse: python train.py --config=configs/tiny/base.py --workdir=DIR [--config.train.steps=100 ...]

Running the same command again goes on from the newest checkpoint. The averaged weights end in DIR/export.

    python train.py --config=configs/paper/base_3b.py --aot=v5e:16x16

trains nothing: it compiles the step for TPUs that need not be there and says what they would need (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from muse.config import read_run
from muse.errors import UserError, main_guard
from muse.train.command_line import parse_config_flags, use_compilation_cache
from muse.train.hosts import join, leave_together

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; its keys are set by --config.a.b=value.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of checkpoints, metrics, grids and the exported weights.')
_RELEASE = flags.DEFINE_string(
    'release', None, 'For a base: folder to join it into with its frozen nets when it is done.'
)
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of this job (jax.distributed).')
_AOT = flags.DEFINE_string('aot', None, 'Only compile the step for a TPU topology, e.g. v5e:16x16, and report on it.')


def main(_: list[str]) -> None:
    """Reads the flags and runs the loop, or compiles its step ahead of time."""
    with leave_together() if _DISTRIBUTED.value else contextlib.nullcontext(), main_guard():
        if _AOT.value is not None and _CONFIG.value is not None:
            from muse.aot.chips import use_no_accelerator
            from muse.aot.report import check

            use_no_accelerator()
            sys.exit(check(read_run(_CONFIG.value.to_dict()), _AOT.value))
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError('train.py needs --config=FILE and --workdir=DIR (or --aot=TOPOLOGY, which trains nothing)')
        logging.set_verbosity(logging.WARNING)
        if _DISTRIBUTED.value:
            join()
        use_compilation_cache()
        from muse.train import finish, loop

        config = read_run(_CONFIG.value.to_dict())
        release = _RELEASE.value
        base = finish.check_release(config, release, _WORKDIR.value) if release else None
        loop.run(config, _WORKDIR.value)
        if release and base is not None:
            finish.write_release(base, _WORKDIR.value, release)


if __name__ == '__main__':
    app.run(main, flags_parser=parse_config_flags)
