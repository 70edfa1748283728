"""tools/bench.py data: shards are made once, read both ways, and the numbers fit together."""

from __future__ import annotations

import json

import pytest

from tools import bench

FLAGS = '--width=8 --workers=0 --batch=4 --batches=3 --records=16 --images_per_s=400'.split()


def test_threads(tmp_path, capsys):
    for _ in range(2):  # the shards of the first are read by the second
        bench.main(['data', *FLAGS, f'--shards={tmp_path}'])
    first, again = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for line in (first, again):
        assert line['bench'] == 'data' and line['width'] == 8 and line['step_ms'] == 10
        assert line['examples_per_s'] > 0 and 0 <= line['data_wait'] <= 1
        assert 3 <= line['mean_text_tokens'] <= 127
    assert first['mean_text_tokens'] == again['mean_text_tokens']
    assert len(list((tmp_path / 'width8').glob('*.array_record'))) == 1


@pytest.mark.slow
def test_worker_processes(tmp_path, capsys):
    bench.main(['data', *FLAGS, '--workers=1', f'--shards={tmp_path}'])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line['workers'] == 1 and line['examples_per_s'] > 0
