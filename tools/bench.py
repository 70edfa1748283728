"""Measures speed and memory. Prints one JSON line a case.

    python tools/bench.py text                 the T5-XXL encoder beside PyTorch's
    python tools/bench.py text --help          its flags

A bench is a module tools/bench_<name>.py with two functions: `add_flags(parser)`, and `cases(args)`, a generator of one
JSON-ready dict for each measured case. What is there is listed by --help.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a peer measured beside us needs memory too

import jax  # noqa: E402

from muse.errors import main_guard  # noqa: E402


def benches() -> dict[str, ModuleType]:
    """The bench modules beside this file by name."""
    names = sorted(path.stem.removeprefix('bench_') for path in HERE.glob('bench_*.py'))
    return {name: importlib.import_module(f'tools.bench_{name}') for name in names}


def environment() -> dict[str, str]:
    """Where the numbers come from."""
    return {
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'flax': importlib.import_module('flax').__version__,
        'python': platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    """Reads the flags, runs one bench and prints its cases as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='bench', required=True, metavar='bench')
    with main_guard():
        modules = benches()
    for name, module in modules.items():
        summary = (module.__doc__ or '').partition('\n')[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_flags(command)
    args = parser.parse_args(argv)
    with main_guard():
        where = environment()
        for case in modules[args.bench].cases(args):
            print(json.dumps({'bench': args.bench, **case, **where}), flush=True)


if __name__ == '__main__':
    main()
