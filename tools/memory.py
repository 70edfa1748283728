"""What a training step needs of this machine's memory: python tools/memory.py --config=configs/own_data/base.py

Compiles the step that train.py runs, for the devices that are here, and runs nothing. Prints one JSON line, in GiB a
device: the state (parameters, average, optimiser), what comes and goes in a step, and both. No data and no tokenizer
are needed. A compiler for CPUs holds bfloat16 as float32 and attends without a fused kernel: its figure is an upper
bound for a GPU. Settings are changed as in train.py (--config.train.accumulate=16 ...).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
from absl import app
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.aot.compile import DoesNotFit, compile_here
from muse.config import read_run
from muse.errors import UserError
from muse.jobs.command_line import guarded
from muse.train.command_line import parse_config_flags

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; its keys are set by --config.a.b=value.')


def main(_: list[str]) -> None:
    """Prints the line."""
    if _CONFIG.value is None:
        raise UserError('tools/memory.py needs --config=FILE')
    run = read_run(_CONFIG.value.to_dict())
    try:
        program = compile_here(run)
    except DoesNotFit as error:
        raise UserError(f'a device needs {error.needed} of memory: raise --config.train.accumulate') from None
    state = sum(size for name, size in program.state_bytes.items() if name != 'batch')
    found = {'state': state, 'temporaries': program.temporaries, 'all': program.memory}
    about = {'parameters': program.parameters, 'device': jax.devices()[0].device_kind, 'jax': jax.__version__}
    print(json.dumps({name: round(size / 2**30, 2) for name, size in found.items()} | about))


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_config_flags)
