"""Scenes: the caption says nothing that the pixels don't show."""

import re

import numpy as np
import pytest
from PIL import Image

from muse.data import captions, scenes
from muse.data.sprites import Sprites, Words

COLOURS = {'circle': (250, 0, 250), 'square': (0, 250, 250), 'cross': (120, 250, 10), 'moon': (1, 255, 90)}
STYLES = ('flat', 'round')
SIZE = 96
SIDE_OF = {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 1), 'below': (1, -1)}


def solid_sprites(margin: int = 4) -> Sprites:
    """Solid squares: each label has its own colour, in two styles; with a transparent margin (of 32 pixels)."""
    words = [Words(f'{s}/{label}', label, s, ('shape',), 'objects') for label in COLOURS for s in STYLES]
    pictures = [Image.new('RGBa', (32, 32)) for _ in words]
    for word, picture in zip(words, pictures, strict=True):
        picture.paste((*COLOURS[word.label], 255), (margin, margin, 32 - margin, 32 - margin))
    return Sprites(words, pictures.__getitem__)


def boxes(img_HWC: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[float, float, int]]:
    """Middles (x, y) and pixel counts of the connected regions of one colour."""
    mask = (np.abs(img_HWC - np.array(colour)) <= 3).all(-1)  # resizing rounds
    found = []
    while mask.any():
        region, before = np.zeros_like(mask), 0
        region[tuple(np.argwhere(mask)[0])] = True
        while region.sum() > before:
            before = region.sum()
            region[1:] |= region[:-1]
            region[:-1] |= region[1:]
            region[:, 1:] |= region[:, :-1]
            region[:, :-1] |= region[:, 1:]
            region &= mask
        y, x = (np.argwhere(region) + 0.5).mean(0)
        found.append((x, y, int(region.sum())))
        mask &= ~region
    return found


def examples(number: int, max_objects: int = 3):
    sprites = solid_sprites()
    for index in range(number):
        yield scenes.compose(sprites, index % len(sprites), np.random.default_rng((7, index)), SIZE, max_objects)


def test_counts_and_relations_are_true_of_the_pixels():
    seen = set()
    for img, caption, scene in examples(400):
        assert img.shape == (SIZE, SIZE, 3) and img.dtype == np.uint8
        middles = {label: boxes(img, colour) for label, colour in COLOURS.items()}
        number = {'two': 2, 'three': 3}.get(next(iter(re.findall(r'\b(two|three)\b', caption)), ''), 1)
        named = [label for label in COLOURS if re.search(rf'\b{label}(s|es)?\b', caption)]
        assert sorted(named) == sorted(label for label in COLOURS if middles[label]), caption
        for label in named:
            assert len(middles[label]) == number, caption
            # Three quarters of a sprite are solid; its blended edges are not counted.
            shares = [(pixels**0.5 + 1) / 0.75 / SIZE for _, _, pixels in middles[label]]
            low, high = (0.70, 0.95) if scene.kind == 'single' else (0.40, 0.5)
            assert all(low - 0.03 <= share <= high + 0.03 for share in shares), caption
        check_relation(caption, middles)
        seen.add((scene.kind, len(scene.objects)))
    assert seen == {('single', 1), ('count', 2), ('count', 3), ('relation', 2), ('relation', 3)}


def check_relation(caption: str, middles: dict):
    """Reads 'A left of B', 'A and B above C', 'C below A and B', 'A left of B, both above C' and checks each."""
    subject = r'(?:a |an )?(?:\w+ style )?(\w+)'
    relation = r'(left of|right of|above|below)'
    claims = []
    if match := re.match(rf'{subject} {relation} {subject}, both {relation} {subject}', caption):
        one, first, two, second, three = match.groups()
        claims = [(one, first, two), (one, second, three), (two, second, three)]
    elif match := re.match(rf'{subject} and {subject} {relation} {subject}', caption):
        one, two, word, three = match.groups()
        claims = [(one, word, three), (two, word, three)]
    elif match := re.match(rf'{subject} {relation} {subject}(?: and {subject})?', caption):
        one, word, two, three = match.groups()
        claims = [(one, word, two)] + ([(one, word, three)] if three else [])
    for one, word, two in claims:
        axis, sign = SIDE_OF[word]
        assert sign * (middles[two][0][axis] - middles[one][0][axis]) > 0.3 * SIZE, caption


def test_named_ground_and_style_are_true():
    whites = unnamed = 0
    for img, caption, scene in examples(400):
        styles = {placed.style for placed in scene.objects}
        assert {s for s in STYLES if f'{s} style' in caption} in (set(), styles)
        corners = img[0, 0], img[-1, -1]
        if match := re.search(r'on an? ([a-z ]+) ground$', caption):
            assert all(tuple(corner) == scenes.GROUNDS[match[1]] for corner in corners), caption
        elif match := re.search(r'on an? ([a-z ]+?) to ([a-z ]+) gradient$', caption):
            assert tuple(corners[0]) == scenes.GROUNDS[match[1]], caption
            assert tuple(corners[1]) == scenes.GROUNDS[match[2]], caption
        else:
            unnamed += 1
            whites += all((corner == 255).all() for corner in corners)
    assert 0.85 < whites / unnamed < 0.95


def test_shares_of_kinds():
    kinds = [scene.kind for _, _, scene in examples(600)]
    assert abs(kinds.count('single') / 600 - 0.65) < 0.08
    assert abs(kinds.count('count') / 600 - 0.15) < 0.05
    assert {scene.kind for _, _, scene in examples(100, max_objects=1)} == {'single'}
    assert max(len(scene.objects) for _, _, scene in examples(200, max_objects=2)) == 2


def test_equal_generators_give_equal_scenes():
    sprites = solid_sprites()
    one, two, other = (scenes.compose(sprites, 0, np.random.default_rng(s), SIZE)[:2] for s in (4, 4, 5))
    assert one[1] == two[1] and (one[0] == two[0]).all()
    assert one[1] != other[1] or (one[0] != other[0]).any()


def test_plain_is_centred_on_white():
    img, caption = scenes.plain(solid_sprites(margin=0), 1, SIZE)
    assert caption == 'a circle, round style'
    assert boxes(img, COLOURS['circle']) == [(SIZE / 2, SIZE / 2, round(0.85 * SIZE) ** 2)]
    assert (img[:5] == 255).all()


def test_transparent_pixels_bleed_no_colour():
    # Left half opaque red, right half transparent: over white there is only red, white and their mixtures.
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    picture = Image.frombytes('RGBa', (64, 64), pixels.tobytes())
    sprites = Sprites([Words('k', 'flag', 'flat', (), 'o')], lambda _: picture)
    img, _ = scenes.plain(sprites, 0, 50)
    assert (img[..., 0] >= 254).all() and np.abs(img[..., 1].astype(int) - img[..., 2]).max() == 0


@pytest.mark.parametrize(
    'label, article, plural',
    [
        ('red apple', 'a red apple', 'red apples'),
        ('umbrella', 'an umbrella', 'umbrellas'),
        ('unicorn', 'a unicorn', 'unicorns'),
        ('one-piece swimsuit', 'a one-piece swimsuit', 'one-piece swimsuits'),
        ('face with tears of joy', 'a face with tears of joy', 'faces with tears of joy'),
        ('strawberry', 'a strawberry', 'strawberries'),
        ('fox', 'a fox', 'foxes'),
        ('octopus', 'an octopus', 'octopuses'),
        ('woman dancing', 'a woman dancing', None),
        ('grapes', 'grapes', None),
        ('bread', 'bread', None),
    ],
)
def test_english(label, article, plural):
    assert captions.with_article(label) == article
    if plural:
        assert captions.plural(label) == plural and captions.is_countable(label)
    elif label != 'woman dancing':
        assert not captions.is_countable(label)


@pytest.mark.parametrize('label', ['red apple', 'building', 'ring', 'fish', 'cat'])
def test_things_are_counted(label):
    assert captions.can_be_counted(label, 'objects') and not captions.can_be_counted(label, 'people and body')


@pytest.mark.parametrize('label', ['camping', 'left luggage', 'locked', 'chart increasing', 'foggy', 'four-thirty'])
def test_what_has_no_plural_is_not_counted(label):
    assert not captions.can_be_counted(label, 'objects')
