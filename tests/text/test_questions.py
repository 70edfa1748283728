"""Held-out questions: what is asked is true of WordNet, and the corpus holds no answer."""

from __future__ import annotations

import pytest

from muse.errors import UserError
from tools import text_build, text_questions
from tools.text_build import Synset


def meaning(key: str, words: str, definition: str, above: str = '', count: int = 1, file: str = '05') -> Synset:
    return Synset(
        f'noun{key}', tuple(words.split('|')), definition, file, False, count, (f'noun{above}',) if above else ()
    )


SYNSETS = [
    meaning('1', 'carnivore', 'a flesh-eating animal'),
    meaning('2', 'canine|canid', 'an animal with long jaws', above='1'),
    meaning('3', 'dog|domestic dog', 'a member of the genus canis', above='2'),
    meaning('4', 'wolf', 'a wild hunter in packs', above='2'),
    meaning('5', 'puppy|whelp', 'a young dog', above='3'),
    meaning('6', 'car|automobile', 'a motor vehicle', file='06', count=9),
    meaning('7', 'car|gondola', 'the part of an airship for people', file='06', count=2),
    meaning('8', 'cot|cottage', 'a small house', file='06'),
    meaning('9', 'unmet|unseen', 'what nobody tagged', count=0),
]


def test_questions():
    questions = text_questions.build(SYNSETS)
    # Not 'car|gondola' (another meaning is met more), 'cot|cottage' and 'canine|canid' (spelled alike), 'unmet' (no
    # count), nor 'dog|domestic dog' (a word in common).
    assert sorted(questions.pairs) == [('car', 'automobile'), ('puppy', 'whelp')]
    assert questions.triples == [('a young dog', 'puppy', 'wolf')]
    assert set(questions.synsets) == {'noun5', 'noun6'}
    # 'gondola' shares a meaning with 'car', which is asked.
    assert set(questions.distractors) == {
        'carnivore',
        'canine',
        'canid',
        'dog',
        'domestic dog',
        'wolf',
        'cot',
        'cottage',
    }


def test_corpus_holds_no_answer():
    questions = text_questions.build(SYNSETS)
    texts = text_build.wordnet_texts(SYNSETS, questions)
    assert ('gloss', 'puppy: a young dog') not in texts and ('gloss', 'wolf: a wild hunter in packs') in texts
    assert ('sense', 'whelp: a young dog') not in texts and (
        'sense',
        'gondola: the part of an airship for people',
    ) in texts
    assert ('word', 'puppy') in texts and ('word', 'whelp') in texts  # each alone tells nothing
    kept = text_build._distinct(
        [('gloss', 'garage: for a car, an automobile'), ('gloss', 'kennel: a young dog, or puppy, lives there')]
        + [('label', 'Car'), ('gloss', 'carting: automobile without a c a r'), ('caption', 'a young dog, noto style')],
        questions,
    )
    assert [text for _, text in kept] == ['Car', 'carting: automobile without a c a r', 'a young dog, noto style']


def test_file(tmp_path):
    questions, path = text_questions.build(SYNSETS), tmp_path / 'questions.json'
    text_questions.write(questions, path)
    assert text_questions.read(path) == questions
    for damaged in ('', '[]', '{"pairs": [["a"]]}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match='cannot be read.*--stage=corpus'):
            text_questions.read(path)


def test_wordnet_line():
    line = (
        '01322604 05 n 02 puppy 0 Whelp 1 003 @ 02084071 n 0000 @ 01322343 n 0000 ~ 01322898 n 0000 '
        '| a young dog; "the puppy barked"'
    )
    synset = text_build._synset(line, 'noun', '1', {'puppy 1 05': 3, 'whelp 1 05': 1})
    assert synset == Synset(
        'noun01322604', ('puppy', 'whelp'), 'a young dog', '05', False, 4, ('noun02084071', 'noun01322343')
    )
