"""A text encoder from wherever it is: a release, a checkpoint, the hub; with the vocabulary that belongs to it."""

from __future__ import annotations

import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from t5_folders import VOCABULARY, add_vocabulary, golden, write_huggingface, write_t5x

from muse.config import MeshConfig
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.release import text_encoder
from muse.release.format import graphdef_and_template, load_part, save_part, shipped
from muse.release.text_encoder import load_text_encoder
from muse.text.encode import encode_prompts
from muse.text.tokenizer import Tokenizer


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize('vocabulary', ['spiece.model', 'tokenizer.json'])
@pytest.mark.parametrize('write', [write_huggingface, write_t5x])
def test_a_checkpoint_encodes_prompts(write, vocabulary, tmp_path):
    loaded = load_text_encoder(add_vocabulary(write(tmp_path, 't5_v1_1'), vocabulary))
    assert loaded.vocabulary == tmp_path / vocabulary and len(loaded.part.hash) == 64
    graphdef, _ = graphdef_and_template('text_encoder', loaded.part.config)
    encoder = nnx.merge(graphdef, loaded.part.params)
    prompts = ['a small red dog', '', 'a photo of the moon']
    states, lengths = encode_prompts(encoder, Tokenizer(loaded.vocabulary), prompts, 24)
    assert states.shape == (3, 24, 48) and lengths[1] == 0 and (np.asarray(states[1]) == 0).all()
    assert np.abs(np.asarray(states[0, : lengths[0]])).max(-1).min() > 0


def test_a_release_as_it_is(release_folder):
    part, loaded = load_part(release_folder, 'text_encoder'), load_text_encoder(release_folder)
    assert loaded.part.hash == part.hash and loaded.part.config == part.config
    assert all((a == b).all() for a, b in zip(leaves(part.params), leaves(loaded.part.params), strict=True))
    half = load_text_encoder(release_folder, dtype='bfloat16').part
    assert half.config.dtype == 'bfloat16' and {leaf.dtype.name for leaf in leaves(half.params)} == {'bfloat16'}
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    split = load_text_encoder(release_folder, mesh=mesh).part.params
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    assert all((a == b).all() for a, b in zip(leaves(part.params), leaves(split), strict=True))


def test_a_checkpoint_becomes_a_release_part(tmp_path):
    loaded = load_text_encoder(add_vocabulary(write_huggingface(tmp_path / 'hf', 't5_v1_0'), 'tokenizer.json'))
    part, out = loaded.part, tmp_path / 'out'
    save_part(out, 'text_encoder', config=part.config, params=part.params, storage='float32')
    (out / 'spiece.model').write_bytes(Tokenizer(loaded.vocabulary).model)
    again = load_text_encoder(out)
    assert all((a == b).all() for a, b in zip(leaves(part.params), leaves(again.part.params), strict=True))
    text = 'a small dog'
    assert Tokenizer(again.vocabulary).encode(text, 32) == Tokenizer(loaded.vocabulary).encode(text, 32)


def test_missing_vocabulary(tmp_path):
    write_huggingface(tmp_path, 't5_v1_1')
    with pytest.raises(UserError, match='no vocabulary: put spiece.model or sentencepiece.model or tokenizer.json'):
        load_text_encoder(tmp_path)


def test_vocabulary_of_another_model(tmp_path):
    """More pieces than rows is wrong; a few less is how T5 is published (32100 of 32128)."""
    write_huggingface(tmp_path, 't5_v1_1')
    (tmp_path / 'spiece.model').write_bytes((shipped() / 'spiece.model').read_bytes())
    with pytest.raises(UserError, match=r'has \d+ pieces, the text encoder beside it 96 rows: it is of another model'):
        load_text_encoder(tmp_path)
    with pytest.raises(UserError, match='has 77 pieces, the text encoder beside it 32128 rows'):
        text_encoder._check_vocabulary(VOCABULARY / 'spiece.model', 32128)


def test_a_name_without_the_hub_says_what_to_put_where(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match='huggingface_hub.*not installed: put config.json, model.safetensors') as caught:
        load_text_encoder('google/flan-t5-xxl')
    assert '\n' not in str(caught.value) and 'spiece.model' in str(caught.value)


def test_hub(tmp_path, monkeypatch):
    """Fetched by name; offline the error says what to do."""
    folder, asked = add_vocabulary(write_huggingface(tmp_path, 't5_v1_1'), 'spiece.model'), []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name == 'google/unreachable':
            raise ConnectionError('no route\nto host')
        assert not any(pattern.endswith('.bin') for pattern in allow_patterns)
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    weights, _, _ = golden('t5_v1_1')
    table = load_text_encoder('google/t5-v1_1-tiny').part.params['token_embedder']['embedding'][...]
    np.testing.assert_array_equal(table, weights['encoder.embed_tokens.weight'])
    with pytest.raises(UserError, match=r'cannot be fetched \(ConnectionError\): put config.json'):
        load_text_encoder('google/unreachable')
    with pytest.raises(UserError, match="'/no/such/folder' does not exist"):
        load_text_encoder('/no/such/folder')
    assert asked == ['google/t5-v1_1-tiny', 'google/unreachable']
