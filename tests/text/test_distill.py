"""Distillation: a student learns from a made-up teacher, and the counts that judge encoders count right."""

from __future__ import annotations

import dataclasses
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import T5Config
from muse.errors import UserError
from tools import text_corpus, text_scores, text_student
from tools.text_teacher import Lessons

CONFIG = T5Config(vocab_size=300, width=32, mlp_dim=48, head_dim=16, heads=2, layers=2, max_length=24)
WIDTH = 24  # of the teacher


def toy_lessons(texts: list[str]) -> Lessons:
    """A teacher whose word states are a random vector a word plus half of the vector of the word before."""
    rng, vectors = np.random.default_rng(0), {}
    words, pooled = [], []
    for text in texts:
        own = [vectors.setdefault(word, rng.normal(size=WIDTH)) for word in text.split()]
        states = np.stack([x + 0.5 * before for x, before in zip(own, [0 * own[0], *own], strict=False)])
        words.append(states)
        pooled.append(states.mean(0) / np.linalg.norm(states.mean(0)))
    offsets = np.cumsum([0, *(len(x) for x in words)])
    return Lessons(np.stack(pooled).astype(np.float16), np.concatenate(words).astype(np.float16), offsets)


@pytest.fixture(scope='module')
def data(tokenizer, toy_captions):
    corpus = [('caption', text) for text in toy_captions] + [('word', 'a red cat'), ('word', 'blue dog')]
    return text_student.prepare(corpus, tokenizer, toy_lessons([text for _, text in corpus]), 24)


def test_student_learns(data, monkeypatch, capsys):
    monkeypatch.setattr(text_student, 'STEPS_A_CALL', 30)
    start = text_student.Student(CONFIG, WIDTH, rngs=nnx.Rngs(params=jax.random.key(0)))
    graphdef, params = nnx.split(start, nnx.Param)
    before = text_student.held_out(graphdef, params, data, 64)
    encoder, after = text_student.train(CONFIG, data, batch=48, learning_rate=8e-3, steps=150)
    capsys.readouterr()
    assert after['steps'] == 150
    assert before['words'] > 0.9 and after['words'] < 0.35  # 1 − R² on texts never trained on
    assert after['neighbours'] < 0.75 and before['neighbours'] > 0.9
    assert after['pooled'] < 0.3 < before['pooled']
    assert after['relations'] < 0.6 * before['relations']
    assert encoder.config == CONFIG and encoder(jnp.ones((1, 4), jnp.int32), jnp.array([4])).dtype == jnp.float32


def test_perfect_student_has_no_loss(data):
    """A student that says the teacher's own states: 'words' is 0, and 'relations' too when the means are the pooled."""
    rows_B = jnp.arange(8)
    words_BW = np.broadcast_to(np.arange(text_student.MAX_WORDS), (8, text_student.MAX_WORDS))
    target_BWE, real_BW = text_student._targets(data, rows_B, jnp.asarray(words_BW))
    student = text_student.Student(dataclasses.replace(CONFIG, width=WIDTH), WIDTH, rngs=nnx.Rngs(params=0))
    student.word_head.kernel[...] = jnp.eye(WIDTH)
    pieces_BSW = jax.nn.one_hot(data.word_NS[rows_B], text_student.MAX_WORDS)
    own, _ = text_student._word_losses(student, data, rows_B, pieces_BSW @ target_BWE)
    assert float(own) < 1e-10
    assert int(real_BW.sum()) == int(data.covered_N[rows_B].sum()) > 30
    shifted, _ = text_student._word_losses(student, data, rows_B, pieces_BSW @ jnp.roll(target_BWE, 1, axis=1))
    assert float(shifted) > 0.5


def test_held_out_rows_are_never_drawn(data):
    rows = np.concatenate([text_student.draw_rows(jax.random.key(i), data, 512) for i in range(40)])
    assert not (rows % text_student.HELD_OUT == 0).any()
    assert rows.min() >= 1 and rows.max() < data.ids_NS.shape[0]
    last = data.ids_NS.shape[0] - 2  # the two of kind 'word'
    share = text_student.KIND_SHARES
    assert (rows >= last).mean() == pytest.approx(share['word'] / (share['word'] + share['caption']), abs=0.03)


def test_corpus_file(tmp_path):
    corpus = [('gloss', 'puppy: a young dog'), ('label', 'red apple'), ('caption', 'a red apple, noto style')]
    path = tmp_path / 'corpus.xz'
    text_corpus.write(corpus[::-1], path)
    assert text_corpus.read(path) == corpus
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match='cannot be read.*--stage=corpus'):
        text_corpus.read(path)
    path.write_bytes(lzma.compress(b''))
    assert text_corpus.read(path) == []


def one_hot_states(texts: list[str]) -> list[np.ndarray]:
    """A made-up encoder: each word its own axis; puppy is near dog; a noun carries some of the word before it."""
    axes: dict[str, int] = {'puppy': 1}
    rows = []
    for text in texts:
        words = text.split()
        vectors = np.zeros((len(words), 400))
        for i, word in enumerate(words):
            vectors[i, axes.setdefault(word, 10 + hash_of(word))] = 1
            if i and words[i - 1] in text_scores.COLOURS:
                vectors[i, 300 + text_scores.COLOURS.index(words[i - 1])] = 1
            if word == 'puppy':
                vectors[i, 10 + hash_of('dog')] = 0.5
        rows.append(vectors)
    return rows


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode(), 'little') % 281


def test_counts():
    report = text_scores.scores(one_hot_states)
    animals = report['nearest']['animals']
    assert animals['candidates'] == 50 and animals['pairs'] >= 40
    assert not any(line.startswith('puppy:') for line in animals['missed'])
    assert any(line.startswith('kitten: cat') for line in animals['missed'])
    assert animals['top1'] == animals['pairs'] - len(animals['missed']) <= animals['top3']
    order = report['word_order']
    assert order['swap_larger_than_rewording'] == 1.0 and order['rewording_distance'] == pytest.approx(0, abs=1e-9)
    assert order['swap_distance'] == pytest.approx(0.5)
    floor = text_scores.scores(text_scores.ngram_states)
    assert floor['word_order']['swap_larger_than_rewording'] == 0
    assert floor['nearest']['animals']['top1'] < 20


@pytest.mark.parametrize('name', text_scores.PAIRS)
def test_pairs_are_well_formed(name):
    candidates, pairs = text_scores.PAIRS[name]
    asked = [pair.split(':') for pair in pairs.split()]
    assert len(set(candidates)) == len(candidates) >= 50 and len(asked) >= 40
    assert all(answer in candidates and word not in candidates for word, answer in asked)
    assert len({word for word, _ in asked}) == len(asked)
