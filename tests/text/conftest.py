"""A small vocabulary, trained on the spot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # tools/ is not installed

from muse.text.tokenizer import Tokenizer
from tools.text_build import train_vocabulary

NOUNS = 'apple ball box cat dog house puppy star tree car moon kitten'.split()
COLOURS = 'red blue green yellow black white'.split()


@pytest.fixture(scope='session')
def toy_captions() -> list[str]:
    """A few hundred captions of a closed world."""
    pairs = [(c, n) for c in COLOURS for n in NOUNS]
    singles = [f'a {colour} {noun}, noto style' for colour, noun in pairs]
    return singles + [
        f'a {colour} {noun} left of a {other} {second}'
        for i, (colour, noun) in enumerate(pairs)
        for other, second in pairs[i % 5 :: 11]
    ]


@pytest.fixture(scope='session')
def vocabulary(toy_captions) -> bytes:
    return train_vocabulary([('caption', text) for text in toy_captions], 300)


@pytest.fixture(scope='session')
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary)
