"""What the tools of evaluation judge on: which split of a config, and each of its pictures once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse.config import DataConfig
from muse.data.sources import open_source
from muse.errors import UserError
from muse.evals.judged import heldout_data

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))

import eval_tokenizer  # noqa: E402


def config(data: dict, eval_data: dict) -> dict:
    train = {'steps': 1, 'batch_size': 1}
    return {'task': 'tokenizer', 'model': {}, 'train': train, 'data': data, 'eval_data': eval_data}


@pytest.mark.parametrize(
    'data, eval_data, given, split',
    [
        ({'kind': 'scenes'}, {'kind': 'scenes', 'split': 'heldout_labels'}, '', 'heldout_labels'),
        ({'kind': 'scenes'}, {'kind': 'scenes', 'split': 'heldout_labels'}, 'heldout_pairs', 'heldout_pairs'),
        ({'kind': 'folder', 'heldout_share': 0.1}, {'kind': 'folder', 'split': 'train'}, '', 'heldout'),
        ({'kind': 'folder'}, {'kind': 'scenes', 'split': 'heldout_labels'}, '', 'train'),
        ({'kind': 'tfds', 'name': 'x'}, {'kind': 'tfds', 'name': 'x', 'split': 'val'}, '', 'val'),
    ],
)
def test_the_split_that_is_held_out(data, eval_data, given, split):
    found = heldout_data(config({**data, 'image_size': 32}, eval_data), given, None)
    assert (found.kind, found.split, found.image_size) == (data['kind'], split, 32)
    assert heldout_data(config(data, eval_data), given, 64).image_size == 64


def test_records_are_no_pictures():
    with pytest.raises(UserError, match="data.kind is 'precomputed': set --config.data.kind"):
        heldout_data(config({'kind': 'precomputed'}, {'kind': 'precomputed'}), '', None)


@pytest.mark.parametrize('number, counts', [(1000, (7,)), (5, (4, 5))])
@pytest.mark.filterwarnings('ignore:.*the next record takes its place')
def test_no_picture_counts_twice(number, counts, tmp_path):
    """Seven good ones of one colour each, and one that went bad after the folder was looked through."""
    rows = []
    for i in range(8):
        Image.new('RGB', (9, 9), (30 * i, 0, 0)).save(tmp_path / f'{i}.png')
        rows.append(json.dumps({'file': f'{i}.png', 'caption': ''}))
    (tmp_path / 'captions.jsonl').write_text('\n'.join(rows))
    data = DataConfig(kind='folder', path=str(tmp_path), image_size=8, min_side=8)
    open_source(data)
    Image.new('RGB', (9, 2)).save(tmp_path / '7.png')
    batches = list(eval_tokenizer.batches_of_data(data, number, 3, 0))
    reds = np.concatenate(batches)[:, 0, 0, 0].tolist()
    assert len(set(reds)) == len(reds) and set(reds) <= set(range(0, 210, 30))
    assert len(reds) in counts
