"""What `train.py --release` will need is looked for before the run, not after it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from toys import save_toy_text_encoder, toy_run

from muse.errors import UserError
from muse.release.text_encoder import load_text_encoder
from muse.train.finish import check_release


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('encoder')
    save_toy_text_encoder(folder, ['a red apple', 'a green tree', 'two blue boats'])
    return str(folder)


def run_over(tmp_path, encoder, made_with):
    meta = {'tokenizer_hash': 'of the tokenizer', 'text_encoder_hash': made_with, 'grid': [4, 4], 'text_width': 8}
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    run = toy_run(text_encoder=encoder)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(tmp_path)))


def test_a_text_encoder_that_is_missing_is_named(tmp_path):
    run = run_over(tmp_path, str(tmp_path / 'nowhere'), 'x')
    with pytest.raises(UserError, match=r"nowhere' does not exist"):
        check_release(run, str(tmp_path / 'release'), str(tmp_path / 'run'))


def test_a_text_encoder_that_did_not_make_the_data_is_named(tmp_path, encoder):
    with pytest.raises(UserError, match='was made with text encoder of another, .*: set text_encoder to the one'):
        check_release(run_over(tmp_path, encoder, 'of another'), str(tmp_path / 'release'), str(tmp_path / 'run'))


def test_that_of_the_data_is_taken(tmp_path, encoder):
    run = run_over(tmp_path, encoder, load_text_encoder(encoder).part.ids_hash)
    assert check_release(run, str(tmp_path / 'release'), str(tmp_path / 'run')) is run
    assert not (tmp_path / 'release').exists()
