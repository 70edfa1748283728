"""The texts that the demo's vocabulary and text encoder are made from: WordNet, emoji labels and tags, captions.

    python tools/distill_text.py --stage=corpus --tarballs=FOLDER --wordnet=/usr/share/wordnet --corpus=corpus.xz

WordNet's files come with Debian's wordnet-base.
"""

from __future__ import annotations

import io
import os
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

from muse.data import captions, scenes
from muse.data.art import Art, load_art
from muse.data.sprites import Sprites, Words
from muse.errors import UserError
from tools import text_questions
from tools.text_questions import CONCRETE, Questions

GROUNDS = (
    'white black grey red orange yellow green blue purple pink brown teal turquoise beige cream lavender mint navy '
    'gold silver peach coral olive violet'
).split()
SHADES = ('', '', '', 'light ', 'dark ', 'pale ', 'bright ')
COUNTS = ('two', 'three', 'four', 'five')
SIDES = ('left of', 'right of', 'above', 'below', 'to the left of', 'to the right of', 'next to', 'on top of', 'under')
# Captions are what prompts look like: their words should be whole pieces.
VOCABULARY_WEIGHTS = {'gloss': 1, 'sense': 0, 'word': 1, 'thing': 1, 'label': 6, 'caption': 3}
OTHER_STYLES = ('openmoji', 'cartoon', 'flat', '3d', 'line drawing', 'realistic', 'simple', 'shiny')


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its definition, and how often its words are met in tagged text."""

    key: str  # part of speech and offset
    words: tuple[str, ...]
    definition: str
    file: str
    is_name: bool
    count: int
    above: tuple[str, ...]  # keys of the more general meanings


def read_wordnet(folder: Path) -> list[Synset]:
    """All synsets of WordNet 3.0.

    Raises:
        UserError: the folder does not hold WordNet's data files.
    """
    if not (folder / 'data.noun').is_file():
        raise UserError(f"'{folder}' holds no data.noun: give the folder of Debian's wordnet-base by --wordnet")
    counts: dict[str, int] = defaultdict(int)
    for line in (folder / 'cntlist.rev').read_text('latin-1').splitlines():
        key, _, count = line.split()
        lemma, _, sense = key.partition('%')
        counts[f'{lemma} {sense[0]} {sense.split(":")[1]}'] += int(count)
    synsets = []
    for part, kinds in (('noun', '1'), ('verb', '2'), ('adj', '35'), ('adv', '4')):
        for line in (folder / f'data.{part}').read_text('latin-1').splitlines():
            if not line.startswith('  '):
                synsets.append(_synset(line, part, kinds, counts))
    return synsets


def _synset(line: str, part: str, kinds: str, counts: dict[str, int]) -> Synset:
    head, _, gloss = line.partition('|')
    fields = head.split()
    behind = 4 + 2 * int(fields[3], 16)
    lemmas, pointers = fields[4:behind:2], fields[behind + 1 :]
    above = tuple(part + target for sign, target in zip(pointers[::4], pointers[1::4], strict=False) if sign == '@')
    count = sum(counts.get(f'{lemma.lower()} {kind} {fields[1]}', 0) for lemma in lemmas for kind in kinds)
    words = tuple(re.sub(r'\(\w+\)$', '', lemma).replace('_', ' ').lower() for lemma in lemmas)
    definition = re.split(r';\s*"', gloss.strip())[0].strip().rstrip(';').lower()
    return Synset(part + fields[0], words, definition, fields[1], '@i' in fields, count, above)


class Captioner:
    """Random captions of WordNet's nouns: freer than those of the scenes, so that other words work in prompts too."""

    def __init__(self, nouns: list[str], styles: list[str], seed: int):
        self.nouns, self.styles, self.rng = nouns, styles, random.Random(seed)

    def _ground(self) -> str:
        colour = self.rng.choice(SHADES) + self.rng.choice(GROUNDS)
        return self.rng.choice([f'on a {colour} ground', f'on {colour}', f'on a {colour} background'])

    def _thing(self, coloured: float) -> str:
        noun = self.rng.choice(self.nouns)
        return f'{self.rng.choice(GROUNDS)} {noun}' if self.rng.random() < coloured else noun

    def caption(self) -> str:
        """One caption: a single thing, several of one, or two things and where they are."""
        rng, kind = self.rng, self.rng.random()
        tail = [f'{rng.choice(self.styles)} style'] if rng.random() < 0.6 else []
        thing = self._thing(0.35)
        if kind < 0.15 and captions.is_countable(thing):
            subject = f'{rng.choice(COUNTS)} {captions.plural(thing)}'
        elif kind < 0.5:
            subject = captions.with_article(thing) if rng.random() < 0.7 else thing
        else:
            where = rng.choice(SIDES) if rng.random() < 0.85 else 'and'
            subject = f'{captions.with_article(thing)} {where} {captions.with_article(self._thing(0.35))}'
        if rng.random() < 0.35:
            tail.append(self._ground())
        return ', '.join([subject, *tail])


def _no_picture(index: int) -> Image.Image:
    raise LookupError(f'sprite {index} has words only')


def scene_captions(art: list[Art], count: int, seed: int) -> list[str]:
    """Captions of random training scenes, without drawing them."""
    words = [Words(a.key, a.label, a.style, a.tags, a.group) for a in art]
    sprites, rng = Sprites(words, _no_picture), np.random.default_rng(seed)
    firsts = rng.integers(len(words), size=count)
    return [scenes.plan(sprites, int(first), rng, image_size=256, max_objects=3).caption for first in firsts]


def build(tarballs: Path, wordnet: Path, count: int, seed: int = 0) -> tuple[list[tuple[str, str]], Questions]:
    """(kind, text) of the whole corpus, each text once and none that answers a question; and the questions.

    Args:
        tarballs: folder or bundle of emoji art, see `muse.data.art.load_art`.
        wordnet: folder of WordNet's data files.
        count: captions to make up.
    """
    art, synsets = load_art(tarballs), read_wordnet(wordnet)
    questions = text_questions.build(synsets)
    tags: dict[str, set[str]] = defaultdict(set)
    for piece in art:
        tags[piece.label] |= set(piece.tags)
    labels = sorted(tags)
    styles = sorted({piece.style for piece in art})
    things = [s.words[0] for s in synsets if s.file in CONCRETE and s.count and not s.is_name]
    captioner = Captioner(things + labels, styles + list(OTHER_STYLES), seed)
    corpus = [('thing', text) for text in labels + things]
    corpus += [('label', tag) for label in labels for tag in sorted(tags[label])]
    corpus += [('label', f'{label}, {", ".join(sorted(tags[label]))}') for label in labels if tags[label]]
    corpus += [('caption', text) for text in scene_captions(art, count * 2 // 3, seed)]
    corpus += [('caption', captioner.caption()) for _ in range(count // 3)]
    return _distinct(corpus + wordnet_texts(synsets, questions), questions), questions


def wordnet_texts(synsets: list[Synset], questions: Questions) -> list[tuple[str, str]]:
    """Words and definitions; no definition of a meaning that is asked about."""
    texts, asked = [], set(questions.synsets)
    for synset in synsets:
        known = synset.count or (synset.file in CONCRETE and not synset.is_name)
        texts += [('word', word) for word in synset.words if known]
        if not synset.is_name and synset.key not in asked:
            texts.append(('gloss', f'{synset.words[0]}: {synset.definition}'))
            texts += [('sense', f'{word}: {synset.definition}') for word in synset.words[1:] if known]
    return texts


def _distinct(corpus: list[tuple[str, str]], questions: Questions) -> list[tuple[str, str]]:
    kinds: dict[str, str] = {}
    for kind, text in corpus:
        text = ' '.join(text.split())
        if text and text.isascii() and not questions.forbids(text):
            kinds.setdefault(text, kind)
    return [(kind, text) for text, kind in kinds.items()]


def train_vocabulary(corpus: list[tuple[str, str]], size: int) -> bytes:
    """The serialized sentencepiece model of `size` pieces over (kind, text) pairs."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(text for kind, text in corpus for _ in range(VOCABULARY_WEIGHTS[kind])),
        model_writer=model,
        model_type='unigram',
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name='nmt_nfkc_cf',
        split_digits=True,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    return model.getvalue()
