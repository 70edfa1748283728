"""Splits and the sample art in the package."""

import importlib.resources
import json
from collections import defaultdict

import pytest

from muse.data.splits import SPLITS, assign_splits, unit_hash
from muse.data.sprites import load_sprites
from muse.errors import UserError

PAIRS = [(f'label {i}', f'style {j}') for i in range(600) for j in range(5) if unit_hash(str(i), str(j)) < 0.8]


def test_splits_do_not_overlap_and_leave_styles_in_training():
    splits = assign_splits(PAIRS)
    labels, styles = defaultdict(set), defaultdict(set)
    for (label, style), split in splits.items():
        labels[split].add(label)
        if split == 'train':
            styles[label].add(style)
    assert set(splits) == set(PAIRS) and set(splits.values()) == set(SPLITS)
    assert not labels['heldout_labels'] & (labels['train'] | labels['heldout_pairs'])
    assert all(len(styles[label]) >= 2 for label in labels['heldout_pairs'])
    assert 0.015 < len(labels['heldout_labels']) / 600 < 0.05
    assert 0.025 < list(splits.values()).count('heldout_pairs') / len(PAIRS) < 0.06


def test_splits_depend_on_names_alone():
    assert assign_splits(reversed(PAIRS * 2)) == assign_splits(PAIRS)
    assert unit_hash('label', 'red apple') == pytest.approx(0.7163970588820434, rel=1e-12)  # on every machine


def test_sample_art_is_whole_small_and_attributed():
    folder = importlib.resources.files('muse') / 'assets' / 'sample_art'
    rows = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
    assert len(rows) == 192 and len({row['label'] for row in rows}) == 48
    assert sum(len((folder / row['file']).read_bytes()) for row in rows) < 2 * 2**20
    given = assign_splits([(row['label'], row['style']) for row in rows], label_share=0.06, pair_share=0.12)
    assert all(row['split'] == given[row['label'], row['style']] for row in rows)
    attribution = (folder / 'ATTRIBUTION.md').read_text()
    assert all(f'| {row["style"]} |' in attribution and row['licence'] in attribution for row in rows)
    assert {row['licence'] for row in rows} <= {'MIT', 'Apache-2.0', 'CC-BY-4.0'}
    assert 'CC-BY-SA' not in attribution


def test_sample_sprites_show_something():
    for split in SPLITS:
        sprites = load_sprites('', split, 64)
        for index in range(0, len(sprites), 7):
            picture = sprites.picture(index, 64)
            assert picture.mode == 'RGBA' and picture.size == (64, 64)
            assert picture.getchannel('A').getextrema()[1] > 250  # something opaque
            assert max(high - low for low, high in picture.convert('RGB').getextrema()) > 20  # not one colour


def test_unknown_split_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'heldout_pairs'"):
        load_sprites('', 'heldout_pair', 64)


def test_no_dataset_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match='make_emoji'):
        load_sprites(str(tmp_path), 'train', 64)
