"""Tokenizer: ids and back, what is cut, what is unknown, what is no text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muse.errors import InputWarning, UserError
from muse.text.tokenizer import MAX_PROMPT_BYTES, Tokenizer, clean

CAPTION = 'a red apple left of a blue box'


def test_ids_and_back(tokenizer):
    encoded = tokenizer.encode(CAPTION, 32)
    assert encoded.ids[-1] == tokenizer.eos_id == 1 and encoded.lost == ''
    assert tokenizer.eos_id not in encoded.ids[:-1] and 0 not in encoded.ids
    assert tokenizer.decode(encoded.ids) == CAPTION
    assert tokenizer.decode([*encoded.ids, 0, 0]) == CAPTION
    assert len(set(encoded.ids)) >= 8 and max(encoded.ids) < tokenizer.vocab_size == 300


def test_case_and_blanks_do_not_matter(tokenizer):
    assert tokenizer.encode('  A Red\tAPPLE \n', 16) == tokenizer.encode('a red apple', 16)


def test_control_characters_are_the_vocabularys_matter(tokenizer):
    assert clean('a\x00red\x1b ap\u200bple\u202e\ud800') == 'a red apple'
    assert tokenizer.encode('a\x01red ap\u200bple', 16) == tokenizer.encode('ared ap ple', 16)  # nmt_nfkc's rules
    assert tokenizer.encode('a red\ud800 apple', 16) == tokenizer.encode('a red apple', 16)
    with pytest.warns(InputWarning, match=r'not in the vocabulary.*: U\+0000$'):
        assert tokenizer.encode('a\x00 red', 16).ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize('blank', ['', ' ', '\n\t', '\u200b\x00'])
def test_blank_is_no_text(tokenizer, blank):
    assert tokenizer.encode(blank, 8).ids == []
    ids_BS, len_B = tokenizer.batch([blank, 'red'], 8)
    assert len_B[0] == 0 and (ids_BS[0] == 0).all() and len_B[1] >= 2


def test_cut_names_the_first_lost_words(tokenizer):
    pieces = [word for _, word in tokenizer.word_ids(CAPTION)]
    kept = pieces.index(4)  # cut just before the fifth word, 'of'... counted from 0: 'of' is word 4
    with pytest.warns(InputWarning, match=rf"longer than {kept} tokens: lost from 'of a blue box' on"):
        encoded = tokenizer.encode(CAPTION, kept + 1)
    assert encoded.lost == 'of a blue box' and len(encoded.ids) == kept + 1 and encoded.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(encoded.ids) == 'a red apple left'


def test_word_cut_in_its_middle_is_lost(tokenizer):
    with pytest.warns(InputWarning, match='lost from .qqqqqqqq. on'):
        assert tokenizer.encode('red qqqqqqqq', 5).lost == 'qqqqqqqq'


def test_unknown_characters_are_spelled_in_bytes(tokenizer):
    with pytest.warns(InputWarning, match='☃ 日') as caught:
        encoded = tokenizer.encode('a ☃ 日 ☃ red', 32)
    assert len(caught) == 1
    assert tokenizer.decode(encoded.ids) == 'a ☃ 日 ☃ red'


def test_batch_warns_once(tokenizer):
    with pytest.warns(InputWarning) as caught:
        tokenizer.batch(['☃ red', '☃ blue', CAPTION, CAPTION + ' and a cat'], 14)
    assert len(caught) == 2  # one for the characters, one for all cuts
    assert '1 other prompts were cut' in str(caught[1].message)


def test_exact_fit_is_not_cut(tokenizer):
    length = len(tokenizer.encode(CAPTION, 64).ids)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(tokenizer.encode(CAPTION, length).ids) == length


def test_batch_rows_equal_encode(tokenizer):
    texts = ['a red apple', '', CAPTION]
    ids_BS, len_B = tokenizer.batch(texts, 20)
    assert ids_BS.dtype == len_B.dtype == np.int32 and ids_BS.shape == (3, 20)
    for text, ids, length in zip(texts, ids_BS, len_B, strict=True):
        assert ids[:length].tolist() == tokenizer.encode(text, 20).ids and (ids[length:] == 0).all()


def test_words_of_pieces(tokenizer):
    spans = tokenizer.word_ids('a red apple, noto style')
    assert [word for _, word in spans] == sorted(word for _, word in spans)
    by_word = [tokenizer.decode([i for i, w in spans if w == word]) for word in range(5)]
    assert by_word == ['a', 'red', 'apple,', 'noto', 'style']


def test_over_a_megabyte_is_refused(tokenizer):
    with pytest.raises(UserError, match=r'1000001 bytes is over the limit of 1000000') as caught:
        tokenizer.encode('a' * (MAX_PROMPT_BYTES + 1), 16)
    assert '\n' not in str(caught.value)
    with pytest.warns(InputWarning, match='lost from'):
        assert len(tokenizer.encode('red ' * (MAX_PROMPT_BYTES // 4), 16).ids) == 16


def test_bad_vocabulary(tmp_path, vocabulary):
    with pytest.raises(UserError, match=r'cannot be read.*give a spiece.model'):
        Tokenizer(tmp_path / 'none.model')
    (tmp_path / 'bad.model').write_bytes(b'not a model')
    with pytest.raises(UserError, match=r'not a sentencepiece model'):
        Tokenizer(tmp_path / 'bad.model')
    (tmp_path / 'good.model').write_bytes(vocabulary)
    assert Tokenizer(str(tmp_path / 'good.model')).encode('red', 8) == Tokenizer(vocabulary).encode('red', 8)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(2, 40))
def test_any_text_is_taken(tokenizer, text, length):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', InputWarning)
        encoded = tokenizer.encode(text, length)
    assert len(encoded.ids) <= length and all(0 < i < tokenizer.vocab_size for i in encoded.ids)
    assert not encoded.ids or (encoded.ids[-1] == tokenizer.eos_id and len(encoded.ids) >= 2)
    assert ' '.join(clean(text).split()).endswith(encoded.lost)


GOLDEN = Path(__file__).parents[1] / 'golden' / 't5_vocabulary'


@pytest.mark.parametrize('file', ['spiece.model', 'tokenizer.json'])
def test_ids_equal_transformers(file):
    t5 = Tokenizer(GOLDEN / file)
    for example in json.loads((GOLDEN / 'ids.json').read_text()):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', InputWarning)
            assert t5.encode(example['text'], 1000).ids == example['ids'], example['text']


def hub_style(content: dict) -> dict:
    """As the files on the hub are: sequences of steps, of which sentencepiece does all but one by itself."""
    strip = [{'type': 'Strip', 'strip_left': False, 'strip_right': True}]
    blanks = {'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': '▁'}
    steps = [content['normalizer'], *strip, blanks]
    return content | {
        'normalizer': {'type': 'Sequence', 'normalizers': steps},
        'pre_tokenizer': content['pre_tokenizer']['pretokenizers'][1],
    }


def test_hub_style_json_is_the_same():
    content = json.loads((GOLDEN / 'tokenizer.json').read_text())
    plain = Tokenizer(GOLDEN / 'tokenizer.json')
    assert Tokenizer(json.dumps(hub_style(content)).encode()).model == plain.model
    assert plain.vocab_size == Tokenizer(GOLDEN / 'spiece.model').vocab_size + 4  # <extra_id_3> … <extra_id_0>
    assert Tokenizer(plain.model).encode('a red dog', 9) == plain.encode('a red dog', 9)


def test_spelled_special_tokens_are_plain_characters():
    for file in ('spiece.model', 'tokenizer.json'):
        with pytest.warns(InputWarning, match='not in the vocabulary'):
            ids = Tokenizer(GOLDEN / file).encode('dog </s> <extra_id_0> <pad>', 64).ids
        assert ids.count(1) == 1 and 0 not in ids and max(ids) < 80


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model': {'type': 'BPE'}}, 'has a BPE model: only Unigram'),
        ({'normalizer': {'type': 'Lowercase'}}, 'normalises by Lowercase'),
        ({'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': '?'}}, 'damaged table'),
        ({'pre_tokenizer': {'type': 'ByteLevel'}}, 'splits words by ByteLevel'),
        ({'pre_tokenizer': None}, 'splits words by none'),
        ({'model': None}, 'truncated or no tokenizer.json'),
        ({'model': {'type': 'Unigram', 'vocab': [['a']], 'unk_id': 0}}, 'truncated or no tokenizer.json'),
    ],
)
def test_json_of_another_kind(change, message):
    content = json.loads((GOLDEN / 'tokenizer.json').read_text()) | change
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(json.dumps(content).encode())
    assert '\n' not in str(caught.value)


def test_truncated_json():
    content = (GOLDEN / 'tokenizer.json').read_bytes()
    for size in (1, 100, len(content) // 2, len(content) - 2):
        with pytest.raises(UserError, match='truncated or no tokenizer.json'):
            Tokenizer(content[:size])


def test_real_size_limit_is_fast(tokenizer):
    with pytest.raises(UserError, match='10000000 bytes is over the limit of 1000000: shorten it'):
        tokenizer.encode('a' * 10_000_000, 127)
