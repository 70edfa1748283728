"""English for scene captions: articles, plurals, and the sentences that say what is where.

Every function returns text that is true of the picture it was made for; nothing here looks at pixels.
"""

from __future__ import annotations

import re

NUMBERS = {2: 'two', 3: 'three'}

_IRREGULAR = {
    'man': 'men',
    'woman': 'women',
    'person': 'people',
    'child': 'children',
    'foot': 'feet',
    'tooth': 'teeth',
    'mouse': 'mice',
    'goose': 'geese',
    'ox': 'oxen',
    'leaf': 'leaves',
    'knife': 'knives',
    'wolf': 'wolves',
    'loaf': 'loaves',
    'elf': 'elves',
    'scarf': 'scarves',
    'potato': 'potatoes',
    'tomato': 'tomatoes',
    'mango': 'mangoes',
    'sheep': 'sheep',
    'fish': 'fish',
    'deer': 'deer',
    'bison': 'bison',
    'squid': 'squid',
}
_PLURAL_WORDS = {'people', 'men', 'women', 'children', 'feet', 'teeth', 'mice', 'leaves', 'skis'}
_SINGULAR_IN_S = re.compile(r'(ss|us|is|as|lens|news|tennis|gas|canvas|christmas|\'s)$')
_MASS_WORDS = set(
    'bread rice sushi cheese bacon butter honey salt ice soap rain hair broccoli garlic luggage hockey fog poo'.split()
)
# Only things are counted: 'two men running' is beyond a rule, and 'two check mark buttons' are of no use.
_COUNTED_GROUPS = {'animals and nature', 'food and drink', 'travel and places', 'activities', 'objects'}
_NO_NOUN = re.compile(
    r'(?<!build)(?<!paint)(?<!dumpl)(?<!wedd)(?<!\br)(?<!str)ing$|ed$|ly$|ggy$|wireless$|thirty$|\b(left|right|up|down)$'
)
# The noun that is counted stands before these: 'face with tears of joy' -> 'faces with tears of joy'.
_AFTER_NOUN = re.compile(
    r' (with|of|in|on|without|from|and|under|behind|exhaling|holding|wearing|showing|to|for|not) |[(]'
)


def _head(label: str) -> tuple[str, str]:
    """Splits a label behind the noun that is counted: ('face', ' with tears of joy')."""
    match = _AFTER_NOUN.search(label)
    cut = len(label[: match.start()].rstrip()) if match and match.start() else len(label)
    return label[:cut], label[cut:]


def is_countable(label: str) -> bool:
    """Whether 'two …' of it is good English: not of plurals ('grapes'), mass nouns ('bread'), letters and signs."""
    head, _ = _head(label)
    word = head.split()[-1].split('-')[-1]
    plural = word in _PLURAL_WORDS or (word.endswith('s') and not _SINGULAR_IN_S.search(word))
    return word.isalpha() and len(word) > 1 and not plural and word not in _MASS_WORDS


def can_be_counted(label: str, group: str) -> bool:
    """Whether a scene may show two or three of it: a thing, with a plural that `plural` gets right."""
    return group in _COUNTED_GROUPS and is_countable(label) and not _NO_NOUN.search(_head(label)[0])


def with_article(label: str) -> str:
    """'a red apple', 'an apple'; 'grapes' and 'bread' stay as they are."""
    if not is_countable(label):
        return label
    vowel = label[0] in 'aeio' or (label[0] == 'u' and not re.match(r'uni(?!n)|use|uto', label))
    return f'{"an" if vowel and not label.startswith("one") else "a"} {label}'


def plural(label: str) -> str:
    """'red apples', 'faces with tears of joy'. Only for countable labels."""
    head, rest = _head(label)
    before, word = head[: head.rfind(' ') + 1], head[head.rfind(' ') + 1 :]
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif re.search(r'[^aeiou]y$', word):
        word = word[:-1] + 'ies'
    elif re.search(r'(s|x|z|ch|sh)$', word):
        word += 'es'
    else:
        word += 's'
    return before + word + rest


def counted(number: int, label: str) -> str:
    """'two red apples'."""
    return f'{NUMBERS[number]} {plural(label)}'


def in_style(subject: str, style: str) -> str:
    """'a red apple, noto style': the form used for evaluation."""
    return f'{subject}, {style} style'


def styled_subject(label: str, style: str) -> str:
    """'a noto style red apple': names the style of one of several subjects."""
    if not is_countable(label):
        return f'{style} style {label}'
    return f'{"an" if style[0] in "aeio" else "a"} {style} style {label}'


def on_ground(names: tuple[str, ...]) -> str:
    """'on a light blue ground', or 'on a blue to pink gradient' (from the top, or from the left)."""
    article = 'an' if names[0][0] in 'aeiou' else 'a'
    return f'on {article} {names[0]} ground' if len(names) == 1 else f'on {article} {names[0]} to {names[1]} gradient'
