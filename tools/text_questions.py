"""Questions about meaning that no person picked: WordNet's synonyms and paraphrases, held out from the corpus.

They are drawn by a stable hash, so that building again draws the same ones. The corpus keeps no definition of their
meanings and no text that holds both words of a question (`Questions.forbids`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from muse.data import captions
from muse.errors import UserError

if TYPE_CHECKING:
    from tools.text_build import Synset

PAIRS, DISTRACTORS, TRIPLES = 300, 1000, 300
CONCRETE = {'05', '06', '08', '13', '17', '18', '20'}  # files of animals, things, bodies, food, people, plants
_WORD = re.compile(r'[a-z]{3,}( [a-z]{3,})?')
_PARAPHRASE = re.compile(r'(?:(?:an?|the) )?(?!(?:an?|the|any|kind|variety) )((?:[a-z-]+ ){1,3})([a-z]+)')


@dataclass(frozen=True)
class Questions:
    """What `tools/eval_text.py` asks."""

    pairs: list[tuple[str, str]]  # (word, synonym)
    distractors: list[str]
    triples: list[tuple[str, str, str]]  # (paraphrase, word, another word): ('a young dog', 'puppy', 'wolf')
    synsets: list[str]  # keys of the meanings asked about

    @functools.cached_property
    def _answers(self) -> dict[str, list[tuple[str, str]]]:
        """Question and answer, padded by blanks, by the first word of the question."""
        index = defaultdict(list)
        for one, two in [*self.pairs, *((word, paraphrase) for paraphrase, word, _ in self.triples)]:
            index[one.split()[0]].append((f' {_plain(one)} ', f' {_plain(two)} '))
        return index

    def forbids(self, text: str) -> bool:
        """Whether a text holds an answer: both words of a pair, or a word and its paraphrase."""
        plain = _plain(text)
        padded = f' {plain} '
        return any(
            one in padded and two in padded for word in plain.split() for one, two in self._answers.get(word, ())
        )


def _plain(text: str) -> str:
    return ' '.join(re.findall('[a-z]+', text.lower()))


def write(questions: Questions, path: Path) -> None:
    """Writes the questions as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(questions)))


def read(path: Path) -> Questions:
    """What `write` wrote.

    Raises:
        UserError: the file is missing or no such file.
    """
    try:
        values = json.loads(path.read_text())
        return Questions(
            pairs=[(one, two) for one, two in values['pairs']],
            distractors=list(values['distractors']),
            triples=[(text, word, other) for text, word, other in values['triples']],
            synsets=list(values['synsets']),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"questions '{path}' cannot be read ({error!r}): make them with --stage=corpus") from None


def build(synsets: list[Synset]) -> Questions:
    """Draws 300 synonym pairs, 1000 distractors and up to 300 triples."""
    pairs = _pairs(synsets)
    asked = {word for pair in pairs for word in pair.words}
    distractors = _distractors(synsets, asked)
    triples = _triples(synsets)
    return Questions(
        pairs=[pair.question for pair in pairs],
        distractors=distractors,
        triples=[triple.question for triple in triples],
        synsets=[found.key for found in (*pairs, *triples)],
    )


@dataclass(frozen=True)
class _Found:
    key: str
    words: tuple[str, ...]
    question: tuple


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _alike(one: str, two: str) -> bool:
    """Whether the spelling gives the answer away: a word in common, or the first four letters of two words."""
    starts = [{word[:4] for word in text.split()} for text in (one, two)]
    return bool(starts[0] & starts[1]) or one in two or two in one


def _main_meanings(synsets: list[Synset]) -> dict[str, str]:
    """Word → key of the synset in which it is met most."""
    best: dict[str, Synset] = {}
    for synset in synsets:
        for word in synset.words:
            if word not in best or synset.count > best[word].count:
                best[word] = synset
    return {word: synset.key for word, synset in best.items()}


def _pairs(synsets: list[Synset]) -> list[_Found]:
    """Two words whose main meaning is the same noun, met in tagged text, and not spelled alike."""
    main, found = _main_meanings(synsets), []
    for synset in synsets:
        if not synset.key.startswith('noun') or synset.is_name or not synset.count:
            continue
        words = [word for word in synset.words if _WORD.fullmatch(word) and main[word] == synset.key]
        pair = next(((a, b) for i, a in enumerate(words) for b in words[i + 1 :] if not _alike(a, b)), None)
        if pair:
            found.append(_Found(synset.key, synset.words, pair))
    kept, used = [], set()
    for item in sorted(found, key=lambda item: (_hash('|'.join(item.question)), item.key)):
        if len(kept) < PAIRS and not used & set(item.question):
            kept.append(item)
            used |= set(item.question)
    return kept


def _distractors(synsets: list[Synset], asked: set[str]) -> list[str]:
    """Nouns met in tagged text that share no meaning with a word of `asked`."""
    words, barred = set(), set(asked)
    for synset in synsets:
        if asked & set(synset.words):
            barred |= set(synset.words)
        elif synset.key.startswith('noun') and synset.count and not synset.is_name:
            words |= {word for word in synset.words if _WORD.fullmatch(word)}
    return sorted(words - barred, key=lambda word: (_hash(word), word))[:DISTRACTORS]


def _triples(synsets: list[Synset]) -> list[_Found]:
    """Definitions of a few words that end in a more general word, against another kind of a still more general one.

    'puppy' is 'a young dog'; a wolf is another child of what is above the dog.
    """
    by_key, main, below = {synset.key: synset for synset in synsets}, _main_meanings(synsets), defaultdict(list)
    for synset in synsets:
        for key in synset.above:
            below[key].append(synset)
    found = []
    for synset in synsets:
        match = _PARAPHRASE.fullmatch(synset.definition)
        word = synset.words[0]
        known = synset.file in CONCRETE and not synset.is_name and main[word] == synset.key
        if not match or not known or not _WORD.fullmatch(word):
            continue
        parents = [by_key[key] for key in synset.above if match[2] in by_key[key].words]
        uncles = {
            other.words[0]
            for parent in parents
            for key in parent.above
            for other in below[key]
            if other is not parent and not other.is_name and _WORD.fullmatch(other.words[0]) and other.key != synset.key
        }
        uncles = sorted(u for u in uncles if not _alike(u, word) and not _alike(u, synset.definition))
        paraphrase = match[1] + match[2]
        if uncles and not _alike(word, paraphrase):
            other = min(uncles, key=lambda uncle: (_hash(f'{word}|{uncle}'), uncle))
            rare = '' if synset.count else '~'  # what is met in tagged text is asked first
            found.append(_Found(synset.key, (rare,), (captions.with_article(paraphrase), word, other)))
    return sorted(found, key=lambda item: (item.words, _hash(item.question[1]), item.key))[:TRIPLES]
