"""Prompts to states: independent of batch-mates, order kept, each text encoded once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import T5Config
from muse.errors import UserError
from muse.models.t5 import T5Encoder
from muse.text import encode
from muse.text.encode import PromptCache, encode_prompts


@pytest.fixture(scope='module')
def encoder():
    config = T5Config(vocab_size=300, width=16, mlp_dim=24, head_dim=8, heads=2, layers=2)
    return T5Encoder(config, rngs=nnx.Rngs(params=0))


def test_states_do_not_depend_on_the_others(encoder, tokenizer):
    alone, alone_len = encode_prompts(encoder, tokenizer, ['a red apple'], 20)
    prompts = ['a blue cat left of a dog', 'a red apple', '', 'a red apple']
    together, lengths = encode_prompts(encoder, tokenizer, prompts, 20)
    assert together.shape == (4, 20, 16) and lengths.dtype == jnp.int32
    assert (together[1] == alone[0]).all() and (together[3] == alone[0]).all()
    assert lengths[1] == lengths[3] == alone_len[0] and lengths[2] == 0 and (together[2] == 0).all()
    assert np.abs(together[0] - together[1])[:3].max() > 0.1


def test_states_are_the_encoders(encoder, tokenizer):
    ids_BS, len_B = tokenizer.batch(['a green tree', 'a moon'], 12)
    expected = encoder(jnp.asarray(ids_BS), jnp.asarray(len_B))
    found, lengths = encode_prompts(encoder, tokenizer, ['a green tree', 'a moon'], 12)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (lengths == len_B).all()


def test_fixed_batches_give_the_same(encoder, tokenizer, monkeypatch):
    prompts = [f'a {colour} {noun}' for colour in ('red', 'blue', 'green') for noun in ('cat', 'dog', 'car', 'box')]
    one_by_one, _ = encode_prompts(encoder, tokenizer, prompts, 12)
    monkeypatch.setattr(encode.jax, 'default_backend', lambda: 'gpu')
    batched, _ = encode_prompts(encoder, tokenizer, prompts, 12)
    np.testing.assert_allclose(batched, one_by_one, atol=1e-5)


def test_each_text_is_encoded_once(encoder, tokenizer, monkeypatch):
    calls = []

    def counted(graphdef, params, ids_BS, len_B):
        calls.append(ids_BS.shape)
        return nnx.merge(graphdef, params)(jnp.asarray(ids_BS), jnp.asarray(len_B))

    monkeypatch.setattr(encode, '_states', counted)
    encode_prompts(encoder, tokenizer, ['a cat', 'a dog', 'a cat', 'a cat'], 8)
    assert calls == [(1, 8), (1, 8)]


@pytest.fixture
def encoded(monkeypatch):
    """The ids of every text that reaches the encoder."""
    seen, states = [], encode._states

    def counted(graphdef, params, ids_BS, len_B):
        seen.extend(tuple(ids) for ids in ids_BS.tolist())
        return states(graphdef, params, ids_BS, len_B)

    monkeypatch.setattr(encode, '_states', counted)
    return seen


def test_a_cache_encodes_each_text_of_each_model_once(encoder, tokenizer, encoded):
    cache, lines = PromptCache(), ['a cat', 'a dog', 'a cat', '', 'a dog', 'a cat'] * 5
    first = cache.encode('one', encoder, tokenizer, lines, 8)
    assert list(first) == ['a cat', 'a dog', ''] and len(encoded) == 3 and len(cache) == 3
    again = cache.encode('one', encoder, tokenizer, ['a dog', 'a moon'], 8)
    assert len(encoded) == 4 and again['a dog'][0] is first['a dog'][0]
    straight, lengths = encode_prompts(encoder, tokenizer, ['a moon', 'a dog', ''], 8)
    for row, text in enumerate(['a moon', 'a dog', '']):
        txt_SD, length = (first | again)[text]
        np.testing.assert_array_equal(txt_SD, straight[row])
        assert length == lengths[row]
    del encoded[:]
    other = T5Encoder(encoder.config, rngs=nnx.Rngs(params=1))
    assert np.abs(cache.encode('two', other, tokenizer, ['a cat'], 8)['a cat'][0] - first['a cat'][0]).max() > 0.1
    assert cache.encode('one', encoder, tokenizer, ['a cat'], 12)['a cat'][0].shape == (12, 16)
    assert len(encoded) == 2, 'another model and another length are other states'


def test_a_full_cache_lets_the_longest_unused_go(encoder, tokenizer, encoded):
    cache = PromptCache(max_bytes=2 * 8 * 16 * 4)  # two texts
    cache.encode('m', encoder, tokenizer, ['a cat', 'a dog'], 8)
    cache.encode('m', encoder, tokenizer, ['a cat'], 8)
    cache.encode('m', encoder, tokenizer, ['a moon'], 8)
    assert len(cache) == 2 and len(encoded) == 3
    cache.encode('m', encoder, tokenizer, ['a cat', 'a moon'], 8)
    assert len(encoded) == 3, 'the dog went'
    assert len(cache.encode('m', encoder, tokenizer, ['a cat', 'a dog', 'a moon', 'a tree'], 8)) == 4
    assert len(cache) == 2 and len(encoded) == 5
    nothing = PromptCache(max_bytes=0)
    assert nothing.encode('m', encoder, tokenizer, ['a cat'], 8)['a cat'][1] > 0 and len(nothing) == 0
    with pytest.raises(UserError, match='max_bytes is -1'):
        PromptCache(max_bytes=-1)
