"""Captions whose words must know which attribute is whose: each in three texts, two of one meaning and one of another.

A scene is two things, each with an attribute of its own (a colour, a number, a style or nothing) and a place. It is
said in two ways ('a red ball left of a blue box', 'a blue box to the right of a red ball'), and changed in one respect:
the attributes trade places, or the things do. The text encoder learns from them (`tools/text_student.py`) and is
judged by others of the same kind (`tools/text_scores.py`) whose things and whose forms it did not learn from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from muse.data import captions

COLOURS = (
    'white black grey red orange yellow green blue purple pink brown teal turquoise beige cream navy gold silver violet'
).split()
MODIFIERS = (*COLOURS, 'light blue', 'dark green', 'big', 'small', 'young', 'old', 'striped', 'shiny', 'wooden')
NUMBERS = ('a', 'two', 'three', 'four', 'five')
RELATIONS = {  # places of the first and the second thing, and ways to say it; the last way is for judging only
    ('left', 'right'): ('left of', 'to the left of', 'on the left side of'),
    ('right', 'left'): ('right of', 'to the right of', 'on the right side of'),
    ('above', 'below'): ('above', 'on top of', 'over'),
    ('below', 'above'): ('below', 'under', 'beneath'),
}
PLACES = ('left', 'right', 'above', 'below')
ENDINGS = ('on a light blue ground', 'on a white ground', 'on a black to pink gradient', 'on a green background')

Change = Literal['attributes', 'things']


@dataclass(frozen=True)
class Thing:
    """'two red balls', or in a style: 'a noto style ball'."""

    noun: str
    number: str = 'a'
    modifier: str = ''
    style: str = ''


@dataclass(frozen=True)
class Text:
    """A caption, and of each of the scene's two things: its nouns' word indices, its attribute and its place."""

    text: str
    words: tuple[tuple[int, ...], tuple[int, ...]]
    attributes: tuple[str, str]  # 'two', 'red' or 'noto'; '' is none
    places: tuple[str, str]


Triple = tuple[Text, Text, Text]  # a caption, the same in other words, and a changed one


def say(things: tuple[Thing, Thing], relation: str, turned: bool, article: str = 'a', tail: str = '') -> Text:
    """The caption; `turned` when the words name the second thing first."""
    one, two = things[::-1] if turned else things
    (first, first_words), (second, second_words) = _phrase(one, article), _phrase(two, article)
    start = len(f'{first} {relation}'.split())
    words = (tuple(first_words), tuple(start + index for index in second_words))
    numbered = one.number != two.number
    attributes = tuple(t.modifier or t.style or (t.number if numbered else '') for t in things)
    places = next(places for places, ways in RELATIONS.items() if relation in ways)
    if turned:
        words, places = (words[1], words[0]), (places[1], places[0])
    return Text(f'{first} {relation} {second}{tail}', words, (attributes[0], attributes[1]), places)


def _phrase(thing: Thing, article: str) -> tuple[str, list[int]]:
    """The words of a thing, and which of them are its noun."""
    noun = thing.noun if thing.number == 'a' else captions.plural(thing.noun)
    words = ' '.join(filter(None, [thing.modifier, f'{thing.style} style' if thing.style else '', noun]))
    if thing.number != 'a':
        words = f'{thing.number} {words}'
    else:
        words = f'the {words}' if article == 'the' else captions.with_article(words)
    total = len(words.split())
    return words, list(range(total - len(noun.split()), total))


def triple(rng: random.Random, nouns: list[str], styles: list[str], *, change: Change, judging: bool = False) -> Triple:
    """One triple of things from `nouns`.

    Args:
        rng: the only source of chance.
        nouns: countable, single or with modifiers of their own.
        styles: names of drawing styles.
        change: what the third text has otherwise.
        judging: the second text takes forms that are never learned from.
    """
    kind = rng.choice(('modifier', 'modifier', 'number', 'style') if change == 'attributes' else ('modifier', '', ''))
    pool = {'modifier': MODIFIERS, 'number': NUMBERS[judging:], 'style': styles, '': ('', '')}[kind]
    one, two = rng.sample(list(pool), 2)
    nouns_2 = rng.sample(nouns, 2)
    things, traded = ((_thing(nouns_2[0], kind, x), _thing(nouns_2[1], kind, y)) for x, y in ((one, two), (two, one)))
    tail = '' if judging else _tail(rng, styles, kind)  # judged are nouns without a comma behind them
    places = rng.choice(list(RELATIONS))
    backwards = (places[1], places[0])
    relation, back = (rng.choice(RELATIONS[p][: 1 if judging else 2]) for p in (places, backwards))
    turned, article = rng.random() < 0.5, 'the' if judging else rng.choice(('a', 'the'))
    again = RELATIONS[backwards if turned else places]
    same = say(things, again[2] if judging else rng.choice(again[:2]), turned, article, tail)
    if change == 'attributes':
        other = say(traded, relation, False, 'a', tail)
    elif rng.random() < 0.5:
        other = say(things, relation, True, 'a', tail)
    else:
        other = say(things, back, False, 'a', tail)
    return say(things, relation, False, 'a', tail), same, other


def _thing(noun: str, kind: str, value: str) -> Thing:
    return Thing(
        noun,
        number=value if kind == 'number' else 'a',
        modifier=value if kind == 'modifier' else '',
        style=value if kind == 'style' else '',
    )


def _tail(rng: random.Random, styles: list[str], kind: str) -> str:
    """What may stand behind: the style of all of it (unless the things have their own), and the ground."""
    style = f', {rng.choice(styles)} style' if kind != 'style' and rng.random() < 0.4 else ''
    return style + (f', {rng.choice(ENDINGS)}' if rng.random() < 0.25 else '')
