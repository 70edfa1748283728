"""A release with a super-res: its two parts come together, and name the tokenizers they belong to."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import SUPERRES, VQ, random_params, write_cascade

from muse.errors import UserError
from muse.release.format import has_part, load_part, load_release, load_superres_tokenizer, save_part
from muse.release.join import join_release


@pytest.fixture(scope='module')
def cascade(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp('cascade'))


@pytest.fixture
def copy(cascade, tmp_path):
    return shutil.copytree(cascade, tmp_path / 'release')


def test_it_loads_with_its_parts_and_decoding(cascade):
    release = load_release(cascade)
    assert release.superres is not None and release.superres_tokenizer is not None
    assert release.superres.config == SUPERRES and release.superres_tokenizer.config == VQ
    assert release.superres_decode is not None and release.superres_decode.steps == 3
    assert release.superres_tokenizer.hash != release.tokenizer.hash
    for ours, theirs in zip(
        jax.tree.leaves(release.superres.params), jax.tree.leaves(random_params('superres', SUPERRES, 4)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_release_without_one_loads_as_before(release_folder):
    release = load_release(release_folder)
    assert release.superres is release.superres_tokenizer is release.superres_decode is None
    assert not has_part(release_folder, 'superres')


def test_the_high_res_tokenizer_is_found_in_a_release_and_in_a_training(cascade, release_folder):
    assert load_superres_tokenizer(cascade).hash == load_part(cascade, 'superres_tokenizer').hash
    assert load_superres_tokenizer(release_folder).hash == load_part(release_folder, 'tokenizer').hash


@pytest.mark.parametrize('part', ['superres_tokenizer', 'tokenizer'])
def test_a_foreign_tokenizer_is_refused(copy, part):
    save_part(copy, part, config=VQ, params=random_params('tokenizer', VQ, seed=9), storage='float32')
    name = 'superres' if part == 'superres_tokenizer' else 'base'
    with pytest.raises(UserError, match=rf'the {name} was trained on {part} .*, the folder holds'):
        load_release(copy)


def test_a_missing_part_or_a_shape_that_does_not_fit_is_named(copy):
    index = json.loads((copy / 'config.json').read_text())
    entry = index['parts'].pop('superres_tokenizer')
    (copy / 'config.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"has no whole entry for 'superres_tokenizer'"):
        load_release(copy)
    index['parts'] |= {'superres_tokenizer': entry}
    index['parts']['superres']['config']['text_length'] = 12
    (copy / 'config.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r'the superres has text_length 12, its parts have 24'):
        load_release(copy)


def test_export_joins_all_parts_and_makes_them_name_the_rounded_ones(cascade, tmp_path):
    join_release(cascade, cascade, cascade, tmp_path / 'out', 'int8', superres=(cascade, cascade))
    release = load_release(tmp_path / 'out')
    assert release.superres is not None and release.superres_tokenizer is not None
    assert release.superres.extra['superres_tokenizer_sha256'] == release.superres_tokenizer.hash
    exact = load_part(cascade, 'superres').params['head']['kernel'][...]
    rounded = release.superres.params['head']['kernel'][...]
    assert 0 < np.abs(rounded - exact).max() <= np.abs(exact).max() / 254 * 1.01


def test_export_refuses_a_super_res_of_another_tokenizer(copy, tmp_path):
    save_part(copy, 'superres_tokenizer', config=VQ, params=random_params('tokenizer', VQ, seed=9), storage='float32')
    with pytest.raises(UserError, match=r'was trained on superres_tokenizer .* give the one it was trained on'):
        join_release(copy, copy, copy, tmp_path / 'out', 'int8', superres=(copy, copy))
    assert not (tmp_path / 'out').exists()
