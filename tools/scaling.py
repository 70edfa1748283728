"""One row of the table in docs/scaling.md: python tools/scaling.py --config=configs/paper/base_3b.py --on=v4:4x8x8

`--on` is a TPU topology, for which the real step is compiled, or `h100:64` or `4090:1`, which is arithmetic alone.
Settings are changed as in train.py (--config.mesh.fsdp=64 ...).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.aot.chips import describe, use_no_accelerator
from muse.aot.compile import DoesNotFit, compile_step
from muse.aot.paper import CARDS, paper_row
from muse.aot.report import COLUMNS, cost, row
from muse.config import read_run
from muse.errors import UserError
from muse.jobs.command_line import guarded
from muse.train.command_line import parse_config_flags

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; its keys are set by --config.a.b=value.')
_ON = flags.DEFINE_string('on', None, 'TPU topology, e.g. v4:4x8x8, h100:GPUS or 4090:1.')
_SHARE = flags.DEFINE_float('share', 0.35, 'GPUs only: model FLOPs as a share of the peak, taken as given.')


def main(_: list[str]) -> None:
    """Prints the header and the row."""
    if _CONFIG.value is None or not _ON.value:
        raise UserError('tools/scaling.py needs --config=FILE and --on=TOPOLOGY')
    run = read_run(_CONFIG.value.to_dict())
    name = os.path.basename(config_flags.get_config_filename(flags.FLAGS['config'])).removesuffix('.py')
    use_no_accelerator()
    if _ON.value.split(':')[0] in CARDS:
        found = paper_row(name, run, _ON.value, _SHARE.value)
    else:
        try:
            topology = describe(_ON.value)
            found = row(name, run, cost(compile_step(run, topology), topology))
        except DoesNotFit as error:
            raise UserError(f'{name} on {_ON.value} needs {error.needed} of memory: see train.py --aot') from None
    print(f'| {COLUMNS} |', '|' + ' --- |' * (COLUMNS.count('|') + 1), found, sep='\n')


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_config_flags)
