"""Scenes: 1-3 emoji on a plain or gradient ground, with a caption that is exactly true of them.

A scene is a pure function of the sprites and a random generator. Mostly one large picture; else the same picture two or
three times (counts), or two or three pictures in stated places (relations). A ground that the caption does not name is
white more often than not, so that plain prompts give clean pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from muse.data import captions
from muse.data.sprites import Sprites

GROUNDS = {
    'white': (255, 255, 255),
    'black': (0, 0, 0),
    'grey': (128, 128, 128),
    'red': (214, 40, 40),
    'orange': (247, 140, 30),
    'yellow': (255, 221, 51),
    'green': (46, 160, 67),
    'light green': (176, 226, 152),
    'blue': (38, 84, 205),
    'light blue': (163, 213, 255),
    'purple': (128, 60, 180),
    'pink': (255, 170, 200),
    'brown': (121, 77, 45),
    'beige': (240, 226, 196),
    'teal': (0, 139, 139),
}
_GROUND_NAMES = tuple(GROUNDS)

_COUNT_SHARE, _RELATION_SHARE = 0.15, 0.20
_NAME_GROUND_SHARE = 0.35  # captions that say the ground
_WHITE_SHARE = 0.90  # of the grounds that no caption says
_WHITE_SHARE_NAMED = 0.20
_GRADIENT_SHARE = 0.20  # of the grounds that are not white
_SAME_STYLE_SHARE = 0.6  # of the relations
_PLAIN_SIDE = 0.85

# Middles of the places, as shares of (width, height), and the relation between the first group and the last picture.
_PAIRS = {'left of': ((0.25, 0.5), (0.75, 0.5)), 'above': ((0.5, 0.25), (0.5, 0.75))}
_TRIPLES = {  # (relation of 1 to 2, relation of both to 3)
    ('left of', 'above'): ((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)),
    ('left of', 'below'): ((0.25, 0.75), (0.75, 0.75), (0.5, 0.25)),
    ('above', 'left of'): ((0.25, 0.25), (0.25, 0.75), (0.75, 0.5)),
    ('above', 'right of'): ((0.75, 0.25), (0.75, 0.75), (0.25, 0.5)),
}
_OPPOSITE = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}


@dataclass(frozen=True)
class Placed:
    """One sprite in a scene; the box is (left, top, side) in pixels."""

    sprite: int
    label: str
    style: str
    box: tuple[int, int, int]


@dataclass(frozen=True)
class Ground:
    """One colour, or two of a gradient from the top ('down') or from the left ('across')."""

    names: tuple[str, ...]
    direction: Literal['plain', 'down', 'across']
    named: bool  # whether the caption says it


@dataclass(frozen=True)
class Scene:
    """What a scene shows, before it is drawn."""

    kind: Literal['single', 'count', 'relation']
    objects: tuple[Placed, ...]
    ground: Ground
    caption: str


def plain(sprites: Sprites, index: int, image_size: int) -> tuple[np.ndarray, str]:
    """The evaluation form: one sprite, centred on white, 'a red apple, noto style'.

    Returns:
        uint8 [image_size, image_size, 3] and its caption.
    """
    word = sprites.words[index]
    placed = _place(sprites, index, (0.5, 0.5), _PLAIN_SIDE, image_size)
    caption = captions.in_style(captions.with_article(word.label), word.style)
    return draw(Scene('single', (placed,), Ground(('white',), 'plain', False), caption), sprites, image_size), caption


def compose(
    sprites: Sprites, first: int, rng: np.random.Generator, image_size: int, max_objects: int = 3
) -> tuple[np.ndarray, str, Scene]:
    """A random scene.

    Args:
        sprites: what may appear.
        first: the sprite that does appear.
        rng: the only source of chance: equal generators give equal scenes.
        image_size: side of the picture in pixels.
        max_objects: 1 gives single pictures only.

    Returns:
        uint8 [image_size, image_size, 3], its caption, and what was drawn where.
    """
    scene = plan(sprites, first, rng, image_size, max_objects)
    return draw(scene, sprites, image_size), scene.caption, scene


def plan(sprites: Sprites, first: int, rng: np.random.Generator, image_size: int, max_objects: int) -> Scene:
    """The random choices of `compose`, without the drawing."""
    draw_kind = rng.random()
    ground = _random_ground(rng)
    word = sprites.words[first]
    if max_objects > 1 and draw_kind < _COUNT_SHARE and captions.can_be_counted(word.label, word.group):
        kind, objects, caption = 'count', *_count(sprites, first, rng, image_size, max_objects)
    elif (
        max_objects > 1
        and _COUNT_SHARE <= draw_kind < _COUNT_SHARE + _RELATION_SHARE
        and (others := _others(sprites, first, rng, max_objects))
    ):
        kind, objects, caption = 'relation', *_relation(sprites, (first, *others), rng, image_size)
    else:
        kind, objects, caption = 'single', *_single(sprites, first, rng, image_size)
    if ground.named:
        caption = f'{caption}, {captions.on_ground(ground.names)}'
    return Scene(kind, objects, ground, caption)


def draw(scene: Scene, sprites: Sprites, image_size: int) -> np.ndarray:
    """Pixels of a scene, uint8 [image_size, image_size, 3]."""
    canvas = _draw_ground(scene.ground, image_size)
    drawn: dict[tuple[int, int], Image.Image] = {}
    for placed in scene.objects:
        left, top, side = placed.box
        if (placed.sprite, side) not in drawn:
            drawn[placed.sprite, side] = sprites.picture(placed.sprite, side)
        picture = drawn[placed.sprite, side]
        canvas.paste(picture, (left, top), picture)
    return np.asarray(canvas)


def _draw_ground(ground: Ground, image_size: int) -> Image.Image:
    colours = [GROUNDS[name] for name in ground.names]
    if ground.direction == 'plain':
        return Image.new('RGB', (image_size, image_size), colours[0])
    strip = np.linspace(colours[0], colours[1], image_size).round().astype(np.uint8)
    shaped = strip[:, None] if ground.direction == 'down' else strip[None]
    return Image.fromarray(shaped).resize((image_size, image_size), Image.Resampling.NEAREST)


def _random_ground(rng: np.random.Generator) -> Ground:
    named = rng.random() < _NAME_GROUND_SHARE
    if rng.random() < (_WHITE_SHARE_NAMED if named else _WHITE_SHARE):
        return Ground(('white',), 'plain', named)
    one, two = rng.integers(1, len(_GROUND_NAMES)), rng.integers(len(_GROUND_NAMES))
    if rng.random() < _GRADIENT_SHARE and one != two:
        direction = 'down' if rng.random() < 0.5 else 'across'
        return Ground((_GROUND_NAMES[one], _GROUND_NAMES[two]), direction, named)
    return Ground((_GROUND_NAMES[one],), 'plain', named)


def _place(sprites: Sprites, index: int, middle: tuple[float, float], share: float, image_size: int) -> Placed:
    side = round(share * image_size)
    left, top = (min(max(round(m * image_size - side / 2), 0), image_size - side) for m in middle)
    return Placed(index, sprites.words[index].label, sprites.words[index].style, (left, top, side))


def _single(sprites: Sprites, index: int, rng: np.random.Generator, image_size: int) -> tuple[tuple[Placed, ...], str]:
    share = rng.uniform(0.70, 0.95)
    slack = min(1 - share, 0.12) / 2
    middle = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))
    placed = _place(sprites, index, middle, share, image_size)
    return (placed,), _single_caption(sprites, index, rng)


def _single_caption(sprites: Sprites, index: int, rng: np.random.Generator) -> str:
    word = sprites.words[index]
    subject, form, tag = captions.with_article(word.label), rng.random(), rng.random()
    if form < 0.50:
        return captions.in_style(subject, word.style)
    if form < 0.65:
        return captions.in_style(word.label, word.style)
    if form < 0.75:
        return f'{word.style} style drawing of {subject}'
    if form < 0.82:
        return f'{subject} in {word.style} style'
    tags = [tag for tag in word.tags if tag.isascii() and tag.replace(' ', '').isalpha() and tag not in word.label]
    if form < 0.90 and tags:
        return captions.in_style(f'{subject}, {tags[int(tag * len(tags))]}', word.style)
    return subject if form < 0.96 else word.label


def _count(
    sprites: Sprites, index: int, rng: np.random.Generator, image_size: int, max_objects: int
) -> tuple[tuple[Placed, ...], str]:
    number = int(rng.integers(2, min(max_objects, 3) + 1))
    places = _pick(rng, tuple((_PAIRS if number == 2 else _TRIPLES).values()))
    share = rng.uniform(0.42, 0.49)  # one size for all: they are the same thing
    objects = tuple(_place(sprites, index, _jitter(rng, middle, share), share, image_size) for middle in places)
    word = sprites.words[index]
    subject = captions.counted(number, word.label)
    form = rng.random()
    if form < 0.80:
        return objects, captions.in_style(subject, word.style)
    return objects, subject if form < 0.90 else f'{word.style} style drawing of {subject}'


def _others(sprites: Sprites, first: int, rng: np.random.Generator, max_objects: int) -> tuple[int, ...]:
    """Indices of one or two more sprites with labels unlike each other; fewer when chance repeats a label."""
    same_style = rng.random() < _SAME_STYLE_SHARE
    choices = sprites.by_style[sprites.words[first].style] if same_style else range(len(sprites))
    chosen = [first]
    for _ in range(int(rng.integers(1, min(max_objects - 1, 2) + 1))):
        other = choices[int(rng.integers(len(choices)))]
        if all(sprites.words[other].label != sprites.words[known].label for known in chosen):
            chosen.append(other)
    return tuple(chosen[1:])


def _relation(
    sprites: Sprites, indices: tuple[int, ...], rng: np.random.Generator, image_size: int
) -> tuple[tuple[Placed, ...], str]:
    words = [sprites.words[index] for index in indices]
    styles = {word.style for word in words}
    say_style = rng.random() < 0.8
    if say_style and len(styles) > 1:
        subjects = [captions.styled_subject(word.label, word.style) for word in words]
    else:
        subjects = [captions.with_article(word.label) for word in words]
    turned = rng.random() < 0.5
    if len(indices) == 2:
        relation, places = _pick(rng, tuple(_PAIRS.items()))
        one, two = subjects
        caption = f'{two} {_OPPOSITE[relation]} {one}' if turned else f'{one} {relation} {two}'
    else:
        (relation, of_both), places = _pick(rng, tuple(_TRIPLES.items()))
        one, two, three = subjects
        if turned:
            caption = f'{three} {_OPPOSITE[of_both]} {one} and {two}'
        elif rng.random() < 0.5:
            caption = f'{one} and {two} {of_both} {three}'
        else:
            caption = f'{one} {relation} {two}, both {of_both} {three}'
    shares = [rng.uniform(0.42, 0.49) for _ in indices]
    middles = [_jitter(rng, middle, share) for middle, share in zip(places, shares, strict=True)]
    objects = tuple(_place(sprites, *spec, image_size) for spec in zip(indices, middles, shares, strict=True))
    return objects, captions.in_style(caption, words[0].style) if say_style and len(styles) == 1 else caption


def _jitter(rng: np.random.Generator, middle: tuple[float, float], share: float) -> tuple[float, float]:
    """Moves a middle inside its own cell (a half of the side) only, so that stated places stay true."""
    slack = (0.5 - share) / 2
    x, y = (m + (rng.uniform(-0.06, 0.06) if m == 0.5 else rng.uniform(-slack, slack)) for m in middle)
    return x, y


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]
