"""Distillation: a student learns from a made-up teacher, and the counts that judge encoders count right."""

from __future__ import annotations

import dataclasses
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx
from safetensors.numpy import save_file

from muse.config import T5Config
from muse.errors import UserError
from tools import text_corpus, text_data, text_scores, text_student, text_teacher
from tools.text_binding import Text
from tools.text_questions import Questions
from tools.text_teacher import Lessons

CONFIG = T5Config(vocab_size=300, width=32, mlp_dim=48, head_dim=16, heads=2, layers=2, max_length=24)
WIDTH = 24  # of the teacher
MEANINGS = [('puppy', 'a small dog'), ('kitten', 'a small cat'), ('moon', 'a white ball'), ('star', 'a yellow ball')]


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


def toy_triple(one: str, two: str, first: str, second: str):
    def text(left: str, right: str, article: str) -> Text:
        start = len(article.split())
        words = ((start + 1,), (start + 6,))
        return Text(f'{article}{left} {first} left of a {right} {second}', words, (left, right), ('left', 'right'))

    return text(one, two, 'a '), text(one, two, ''), text(two, one, 'a ')


def toy_triples():
    return [
        toy_triple(one, two, first, second)
        for one in ('red', 'blue', 'green')
        for two in ('yellow', 'black', 'white')
        for first, second in (('apple', 'ball'), ('box', 'cat'), ('car', 'star'), ('tree', 'dog'))
    ]


@pytest.fixture(scope='module')
def data(tokenizer, toy_captions):
    corpus = [('caption', text) for text in toy_captions] + [('word', 'a red cat'), ('word', 'blue dog')]
    lessons = toy_lessons([text for _, text in corpus])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_data, 'SHORT', 20)
        return text_data.prepare(corpus, tokenizer, lessons, 28, toy_triples(), MEANINGS)


def new_student(width: int = CONFIG.width) -> text_student.Student:
    config = dataclasses.replace(CONFIG, width=width)
    return filled(lambda: text_student.Student(config, WIDTH, 6, rngs=nnx.Rngs(params=jax.random.key(0))))


@pytest.mark.slow  # compiling a step takes half a minute
def test_student_learns(data, monkeypatch, capsys):
    monkeypatch.setattr(text_student, 'STEPS_A_CALL', 30)
    monkeypatch.setattr(text_student, 'SHORT', 20)
    fresh = text_student.Student(CONFIG, WIDTH, 6, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(fresh, nnx.Param)
    before = text_student.held_out(graphdef, params, data, 64)
    encoder, after = text_student.train(CONFIG, data, batch=16, learning_rate=8e-3, steps=150)
    capsys.readouterr()
    assert after['steps'] == 150
    assert before['words'] > 0.9 and after['words'] < 0.35  # 1 − R² on texts never trained on
    assert after['neighbours'] < 0.75 and before['neighbours'] > 0.9
    assert after['pooled'] < 0.3 < before['pooled']
    assert after['relations'] < 0.6 * before['relations']
    assert encoder.config == CONFIG and encoder(jnp.ones((1, 4), jnp.int32), jnp.array([4])).dtype == jnp.float32
    assert swaps_seen(fresh.encoder, data) < 0.75 and swaps_seen(encoder, data) > 0.9


def swaps_seen(encoder, data) -> float:
    """Share of the things whose noun is nearer to itself in other words than beside the other thing's colour."""
    ids_M3S, len_M3, member_M32S, _, _ = data.triples
    states_BSD = np.asarray(encoder(ids_M3S.reshape(-1, ids_M3S.shape[-1]), len_M3.reshape(-1)))
    x_M32D = np.einsum('mitd,mikt->mikd', states_BSD.reshape(*ids_M3S.shape, -1), member_M32S)
    x_M32D /= np.linalg.norm(x_M32D, axis=-1, keepdims=True)
    return float(((x_M32D[:, 0] * x_M32D[:, 1]).sum(-1) > (x_M32D[:, 0] * x_M32D[:, 2]).sum(-1)).mean())


def test_perfect_student_has_no_loss(data):
    """A student that says the teacher's own states: 'words' is 0, and 'relations' too when the means are the pooled."""
    rows_B = jnp.arange(8)
    words_BW = np.broadcast_to(np.arange(text_data.MAX_WORDS), (8, text_data.MAX_WORDS))
    target_BWE, real_BW = text_student._targets(data, rows_B, jnp.asarray(words_BW))
    student = new_student(WIDTH)
    student.word_head.kernel[...], student.word_head.bias[...] = jnp.eye(WIDTH), jnp.zeros(WIDTH)
    pieces_BSW = jax.nn.one_hot(data.word_NS[rows_B], text_data.MAX_WORDS)
    word_losses = jax.jit(lambda x_BSD: text_student._word_losses(student, data, rows_B, x_BSD))
    own, _ = word_losses(pieces_BSW @ target_BWE)
    assert float(own) < 1e-10
    assert int(real_BW.sum()) == int(data.covered_N[rows_B].sum()) > 30
    shifted, _ = word_losses(pieces_BSW @ jnp.roll(target_BWE, 1, axis=1))
    assert float(shifted) > 0.5


def test_length_of_a_batch_changes_no_loss(data):
    rows_B = data.short.rows_K[:16]
    assert int(data.len_N[rows_B].max()) <= 20
    losses, student = jax.jit(text_student.losses, static_argnums=(0, 3)), new_student()
    cut, whole = (losses(student, data, rows_B, length) for length in (20, 28))
    for name in cut:
        np.testing.assert_allclose(cut[name], whole[name], rtol=2e-5)


def test_binding_losses_against_loops(data):
    student, triples = new_student(), text_data.Triples(*(array[:5] for array in data.triples))
    encode = jax.jit(lambda ids_BS, len_B: student.encoder(ids_BS, len_B))
    states_M3SD = np.stack([np.asarray(encode(triples.ids_M3S[m], triples.len_M3[m])) for m in range(5)])
    swaps, attributes, places = [], [], []
    for m in range(5):
        units = np.zeros((3, 2, CONFIG.width))
        for i in range(3):
            for thing in (0, 1):
                vector = states_M3SD[m, i][np.asarray(triples.member_M32S[m, i, thing]) > 0].mean(0)
                units[i, thing] = vector / np.linalg.norm(vector)
                for head, labels, found in (
                    (student.attribute_head, triples.attribute_M32, attributes),
                    (student.place_head, triples.place_M32, places),
                ):
                    logits = np.asarray(head(jnp.asarray(vector)), np.float64)
                    found.append(np.log(np.exp(logits).sum()) - logits[int(labels[m, i, thing])])
        gap = (units[0] * units[2]).sum(-1) - (units[0] * units[1]).sum(-1)
        swaps.append(text_student.SOFTNESS * np.log1p(np.exp((gap + text_student.MARGIN) / text_student.SOFTNESS)))
    binding_losses = jax.jit(lambda triples: text_student.binding_losses(student, triples))
    found = binding_losses(triples)
    assert float(found['swaps']) == pytest.approx(np.mean(swaps), rel=1e-4)
    assert float(found['attributes']) == pytest.approx(np.mean(attributes), rel=1e-4)
    assert float(found['places']) == pytest.approx(np.mean(places), rel=1e-4)
    unknown = triples._replace(attribute_M32=triples.attribute_M32.at[1:].set(-1))
    assert float(binding_losses(unknown)['attributes']) == pytest.approx(np.mean(attributes[:6]), rel=1e-4)


def test_meaning_loss_against_loops(data):
    student = new_student()
    encode = jax.jit(lambda ids_BS, len_B: student.encoder(ids_BS, len_B))

    def units(ids_KS, len_K):
        states = zip(np.asarray(encode(ids_KS, len_K)), len_K, strict=True)
        means = np.stack([x_SD[:length].mean(0) for x_SD, length in states])
        return means / np.linalg.norm(means, axis=-1, keepdims=True)

    meanings = data.meanings
    similar = units(meanings.text_KS, meanings.text_len_K) @ units(meanings.word_KS, meanings.word_len_K).T / 0.05
    right = np.diagonal(similar)
    nats = [np.log(np.exp(similar).sum(axis)) - right for axis in (0, 1)]
    found = jax.jit(lambda meanings: text_student.meaning_loss(student, meanings))(meanings)
    assert float(found) == pytest.approx(np.mean(nats), rel=1e-4)


def test_pieces_that_name_the_things(data, tokenizer):
    for m, triple in enumerate(toy_triples()[:4]):
        for i, text in enumerate(triple):
            ids = np.asarray(data.triples.ids_M3S[m, i])
            for thing, (place,) in enumerate(text.words):
                named = np.flatnonzero(np.asarray(data.triples.member_M32S[m, i, thing]))
                assert tokenizer.decode(ids[named].tolist()) == text.text.split()[place]
    assert sorted(np.unique(np.asarray(data.triples.attribute_M32))) == list(range(6))


def test_held_out_rows_are_never_drawn(data):
    total = data.ids_NS.shape[0]
    drawn = [
        np.concatenate([text_student.draw_rows(jax.random.key(i), group, 512) for i in range(20)])
        for group in (data.short, data.long)
    ]
    assert not (np.concatenate(drawn) % text_data.HELD_OUT == 0).any()
    assert set(np.concatenate(drawn).tolist()) == {row for row in range(total) if row % text_data.HELD_OUT}
    assert (data.len_N[drawn[0]] <= 20).all() and (data.len_N[drawn[1]] > 20).all()
    share = text_data.KIND_SHARES
    expected = share['word'] / (share['word'] + share['caption'])  # the last two are of kind 'word', and short
    assert (drawn[0] >= total - 2).mean() == pytest.approx(expected, abs=0.03)


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
    questions = Questions(
        pairs=[('puppy', 'dog'), ('lorry', 'truck')],
        distractors=['cat', 'cow', 'horse'],
        triples=[('a dog', 'puppy', 'cat'), ('a cow', 'cat', 'horse')],
        synsets=[],
    )
    report = text_scores.scores(one_hot_states, questions)
    animals = report['nearest']['animals']
    assert animals['candidates'] == 50 and animals['pairs'] >= 40
    assert not any(line.startswith('puppy:') for line in animals['missed'])
    assert any(line.startswith('kitten: cat') for line in animals['missed'])
    assert animals['top1'] == animals['pairs'] - len(animals['missed']) <= animals['top3']
    # 'lorry' is alike to nothing: all three distractors tie with its synonym, and a tie is no win.
    assert report['synonyms'] == {'pairs': 2, 'distractors': 3, 'top1': 0.5, 'top10': 1.0}
    assert report['paraphrases']['triples'] == 2 and report['paraphrases']['right'] == 0.5
    order = report['word_order']
    assert order['swap_larger_than_rewording'] == 1.0 and order['rewording_distance'] == pytest.approx(0, abs=1e-9)
    assert order['swap_distance'] == pytest.approx(0.5)
    floor = text_scores.scores(text_scores.ngram_states, questions)
    assert floor['word_order']['swap_larger_than_rewording'] == 0
    assert floor['nearest']['animals']['top1'] < 20
    for change in ('attributes', 'things'):  # a bag of words sees no change at all
        assert floor['bindings'][change]['change_distance'] == pytest.approx(0, abs=1e-9)
        assert floor['bindings'][change]['rewording_distance'] == pytest.approx(0, abs=1e-9)
    # The made-up encoder puts single colours into the noun behind, and knows no places.
    seen = report['bindings']
    assert seen['attributes']['change_distance'] > 0.05 and seen['things']['change_distance'] == pytest.approx(0)


@pytest.mark.parametrize('name', text_scores.PAIRS)
def test_pairs_are_well_formed(name):
    candidates, pairs = text_scores.PAIRS[name]
    asked = [pair.split(':') for pair in pairs.split()]
    assert len(set(candidates)) == len(candidates) >= 50 and len(asked) >= 40
    assert all(answer in candidates and word not in candidates for word, answer in asked)
    assert len({word for word, _ in asked}) == len(asked)


def test_teacher_in_int8(tmp_path):
    source, folder = tmp_path / 'source', tmp_path / 'teacher'
    source.mkdir()
    rng = np.random.default_rng(0)
    weights = {
        'dense.weight': rng.normal(size=(48, 32)),
        'norm.weight': rng.normal(size=32),
        'bias': rng.normal(size=48),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    save_file(weights | {'position_ids': np.arange(4)}, source / 'model.safetensors')
    for name in text_teacher.FILES:
        (source / name).write_text(name)
    text_teacher.shrink(source, folder)
    assert (folder / 'model.safetensors').stat().st_size < 3000
    read = text_teacher._weights(folder)
    assert set(read) == set(weights)  # ids are no weights
    largest = np.abs(weights['dense.weight']).max(1, keepdims=True)  # of each output
    assert (np.abs(read['dense.weight'] - weights['dense.weight']) <= largest / 254 + 1e-7).all()
    assert all((read[name] == weights[name]).all() for name in ('norm.weight', 'bias'))
    assert {name: (folder / name).read_text() for name in text_teacher.FILES} == {n: n for n in text_teacher.FILES}
