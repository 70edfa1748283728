"""Prompts to states: independent of batch-mates, order kept, each text encoded once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import T5Config
from muse.models.t5 import T5Encoder
from muse.text import encode
from muse.text.encode import encode_prompts


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
