"""tools/plot_metrics.py: curves and tables of metrics.jsonl."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tools import plot_metrics


@pytest.fixture
def metrics(tmp_path):
    lines = [{'step': 10 * n, 'loss': 5 - n, **({'eval_loss': 4.5} if n == 2 else {})} for n in range(1, 5)]
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


def test_a_falling_loss_is_drawn_falling(metrics, tmp_path):
    plot_metrics.main([metrics, '--keys=loss', f'--out={tmp_path / "curve.png"}'])
    with Image.open(tmp_path / 'curve.png') as image:
        pixels = np.asarray(image.convert('RGB')).astype(int)
    curve = (np.abs(pixels - np.array(plot_metrics._COLOURS[0])).sum(axis=-1) < 10)[60:]  # below the legend
    columns = np.flatnonzero(curve.any(axis=0))
    heights = [np.flatnonzero(curve[:, column]).mean() for column in columns[:: len(columns) // 5]]
    assert heights == sorted(heights) and heights[-1] - heights[0] > 200, 'down the picture is down in loss'


def test_a_table_takes_the_line_at_or_after_a_step(metrics, capsys):
    plot_metrics.main([metrics, '--keys=loss,eval_loss', '--table=15,40,99'])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(' | ')[1:] for row in rows[2:]] == [
        ['20', '3', '4.5 |'],
        ['40', '1', ' |'],
        ['40', '1', ' |'],
    ]


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--keys=los', '--table=1'], "no line holds 'los'; did you mean 'loss'?"),
        (['--table=ten'], '--table=ten: give steps'),
        ([], 'nothing to do'),
        (['--out=/nowhere/x.png'], "'/nowhere/x.png' cannot be written"),
    ],
)
def test_wrong_input_is_one_line(metrics, flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        plot_metrics.main([metrics, *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and error.count('\n') == 1


def test_another_file_is_refused(tmp_path, capsys):
    (tmp_path / 'x').write_text('{"loss": 1}\n')
    with pytest.raises(SystemExit):
        plot_metrics.main([str(tmp_path / 'x'), '--table=1'])
    assert 'has no lines with a step' in capsys.readouterr().err
