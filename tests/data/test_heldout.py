"""Held-out pictures of sources without splits: a share of the pictures, chosen by their names, never in both splits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from photos import picture, write_tars

from muse.config import DataConfig
from muse.data.sources import open_source
from muse.errors import UserError

PICTURES = 60


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """60 pictures, each with two captions."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'a').mkdir()
    rows = []
    for i in range(PICTURES):
        (folder / 'a' / f'{i}.png').write_bytes(picture(i))
        rows += [{'file': f'a/{i}.png', 'caption': f'picture {i}, {which}'} for which in ('one', 'two')]
    (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return folder


def captions(data):
    source = open_source(data)
    return [source.example(i, np.random.default_rng(0))['caption'] for i in range(len(source))]


def test_a_folder_s_pictures_are_in_one_split_each(folder):
    data = DataConfig(kind='folder', path=str(folder), image_size=8, heldout_share=0.2)
    train, held = captions(data), captions(replace(data, split='heldout'))
    subjects = [{caption.split(',')[0] for caption in split} for split in (train, held)]
    assert not subjects[0] & subjects[1] and len(subjects[0] | subjects[1]) == PICTURES
    assert len(train) + len(held) == 2 * PICTURES == len(captions(replace(data, heldout_share=0.0)))
    assert 5 <= len(subjects[1]) <= 20
    more = {caption.split(',')[0] for caption in captions(replace(data, split='heldout', heldout_share=0.4))}
    assert subjects[1] < more, 'a larger share only adds pictures'


def test_the_split_stays_when_the_folder_moves_and_grows(folder, tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'new.png').write_bytes(picture(999))
    rows = [{'file': 'a/new.png', 'caption': 'new'}]
    for i in reversed(range(0, PICTURES, 2)):
        (tmp_path / 'a' / f'{i}.png').write_bytes(picture(i))
        rows.append({'file': f'a/{i}.png', 'caption': f'picture {i}, one'})
    (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    data = DataConfig(kind='folder', path=str(folder), image_size=8, heldout_share=0.3, split='heldout')
    before = {caption for caption in captions(data) if 'one' in caption and int(caption.split()[1][:-1]) % 2 == 0}
    assert before and set(captions(replace(data, path=str(tmp_path)))) - {'new'} == before


def test_tars_and_parquet(tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    pa = pytest.importorskip('pyarrow')
    write_tars(tmp_path / 'tars', tars=3, each=PICTURES // 3)
    (tmp_path / 'parquet').mkdir()
    columns = {'jpg': [picture(i) for i in range(PICTURES)], 'caption': [f'picture {i}' for i in range(PICTURES)]}
    pq.write_table(
        pa.table(columns | {'key': [f'{i:05}' for i in range(PICTURES)]}), tmp_path / 'parquet/00000.parquet'
    )
    tars = DataConfig(kind='webdataset', path=str(tmp_path / 'tars'), image_size=8, heldout_share=0.2)
    for data in (tars, replace(tars, kind='parquet', path=str(tmp_path / 'parquet'))):
        train, held = captions(data), captions(replace(data, split='heldout'))
        assert len(train) + len(held) == PICTURES == len({*train, *held}) and 3 <= len(held) <= 24, data.kind


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'heldout_share': 1.0}, 'data.heldout_share is 1.0: give a share from 0 to below 1'),
        ({'split': 'heldout'}, 'data.heldout_share is 0: set it to a share such as 0.02'),
        ({'split': 'test', 'heldout_share': 0.1}, "has no splits but 'train' and 'heldout'"),
        ({'split': 'heldout', 'heldout_share': 1e-9}, "of 120 pictures leaves none in 'heldout': change the share"),
    ],
)
def test_wrong_shares(folder, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(replace(DataConfig(kind='folder', path=str(folder), image_size=8), **changes))
