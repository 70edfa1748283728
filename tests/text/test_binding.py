"""Captions in threes: what they say of their things is so, in all forms."""

from __future__ import annotations

import random
import re

import pytest

from tools import text_binding

NOUNS = ['ball', 'box', 'red panda', 'cat', 'owl']
STYLES = ['noto', 'fluent 3d']
SIDES = {
    'left': 'left|left side',
    'right': 'right|right side',
    'above': 'above|on top|over',
    'below': 'below|under|beneath',
}
OPPOSITE = {'left': 'right', 'right': 'left', 'above': 'below', 'below': 'above'}


def parse(text: str) -> list[tuple[str, str, str]]:
    """(attribute, noun, place) of the two things, read off the caption by a grammar of its own."""
    body, article = text.split(',')[0], '(?:a|an|the|two|three|four|five)'
    ways = {place: rf'(.+?) (?:(?:to|on) the )?(?:{sides})(?: of)? ({article} .+)' for place, sides in SIDES.items()}
    place, match = next((place, found) for place, way in ways.items() if (found := re.fullmatch(way, body)))
    found = []
    for part, side in ((match[1], place), (match[2], OPPOSITE[place])):
        number, rest = part.split(' ', 1)
        noun = next(n for n in NOUNS if re.search(rf'{n}(s|es)?$', rest))
        modifier = re.sub(rf'( style)? ?{noun}(s|es)?$', '', rest)
        found.append((modifier or {'an': 'a', 'the': 'a'}.get(number, number), noun, side))
    return found


@pytest.mark.parametrize('judging', [False, True])
@pytest.mark.parametrize('change', ['attributes', 'things'])
def test_triples_mean_what_they_say(change, judging):
    rng = random.Random(1)
    for _ in range(400):
        texts = text_binding.triple(rng, NOUNS, STYLES, change=change, judging=judging)
        meanings = []
        for text in texts:
            words, scene = text.text.split(), {}
            by_noun = {noun: (attribute, place) for attribute, noun, place in parse(text.text)}
            for thing in (0, 1):
                named = ' '.join(words[i] for i in text.words[thing]).rstrip(',')
                noun = next(n for n in NOUNS if re.fullmatch(rf'{n}(s|es)?', named))
                attribute, place = by_noun[noun]
                assert text.places[thing] == place
                assert text.attributes[thing] in (attribute, '')
                scene[noun] = by_noun[noun]
            meanings.append(scene)
        x, same, other = meanings
        assert same == x != other and set(other) == set(x)
        changed = 0 if change == 'attributes' else 1
        assert all(
            x[noun][changed] != other[noun][changed] and x[noun][1 - changed] == other[noun][1 - changed] for noun in x
        )


def test_judged_forms_are_never_learned():
    rng = random.Random(0)
    learned = [text.text for _ in range(600) for text in text_binding.triple(rng, NOUNS, STYLES, change='things')]
    judged = [text_binding.triple(rng, NOUNS, STYLES, change='things', judging=True)[1].text for _ in range(100)]
    forms = re.compile(r'side of| over | beneath ')
    assert all(forms.search(text) for text in judged) and not any(forms.search(text) for text in learned)


def test_same_seed_same_triples():
    draws = [[text_binding.triple(random.Random(seed), NOUNS, STYLES, change='attributes') for seed in (0, 0, 1)]][0]
    assert draws[0] == draws[1] != draws[2]
