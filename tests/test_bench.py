"""tools/bench.py: one JSON line a case, and only what exists is offered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench

ROOT = Path(__file__).parents[1]


def test_benches_are_the_modules_that_are_there():
    names = {path.stem.removeprefix('bench_') for path in (ROOT / 'tools').glob('bench_*.py')}
    found = bench.benches()
    assert set(found) == names and 'text' in names
    assert all(callable(module.cases) and callable(module.add_flags) for module in found.values())


def test_text(capsys):
    flags = '--size=tiny --batch=2 --length=16 --attention=xla,cudnn --repeats=2 --peer_modes=default'.split()
    bench.main(['text', *flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ours, cudnn, *peers = lines
    assert ours['ms_min'] <= ours['ms'] <= ours['ms_max'] and ours['tflops_per_s'] > 0 and ours['memory_gib'] > 0
    assert ours['attention'] == 'xla' and ours['bench'] == 'text' and ours['jax'] and ours['device'] == 'cpu'
    assert 'failed' in cudnn  # there is none on a CPU, and the bench goes on
    assert len(peers) == 1 and peers[0]['model'] == 'transformers'


def test_unknown_bench_is_refused_with_those_that_exist():
    command = [sys.executable, 'tools/bench.py', 'sampling']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and "invalid choice: 'sampling'" in done.stderr and 'text' in done.stderr


@pytest.mark.parametrize('flag', ['--size=giant', '--batch=two'])
def test_bad_flags(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(['text', flag])
    assert caught.value.code == 2 and flag.partition('=')[2] in capsys.readouterr().err
