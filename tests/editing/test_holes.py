"""Inpainting and outpainting: what is outside the hole stays, what is inside is drawn anew, on both levels (§3.3)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import watch_draws

from muse.drawing import traces
from muse.editing.holes import known_tokens
from muse.errors import InputWarning, UserError

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    """A grey mask, white in (left, top, right, bottom)."""
    mask = Image.new('L', size)
    mask.paste(value, box)
    return mask


@pytest.mark.parametrize('size', [(16, 16), (50, 37), (7, 9), (1, 1), (300, 40)])
def test_outside_is_bit_identical_and_inside_is_painted(tiny_model, size):
    image = noise(*size)
    mask = box_mask(size, (size[0] // 8, size[1] // 8, max(1, size[0] // 2), max(1, size[1] - 2)))
    hole = np.asarray(mask) >= 128
    old = np.asarray(image)
    if hole.all():
        with pytest.warns(InputWarning, match='covers the whole picture'):
            new = np.asarray(tiny_model.inpaint(image, mask, 'a red apple', seed=1))
    else:
        new = np.asarray(tiny_model.inpaint(image, mask, 'a red apple', seed=1))
    assert new.shape == old.shape
    np.testing.assert_array_equal(new[~hole], old[~hole])
    assert (new[hole] != old[hole]).mean() > 0.6


@pytest.mark.parametrize('size', [(32, 32), (50, 37)])
def test_both_levels_keep_what_is_outside(cascade_model, size):
    image, mask = noise(*size), box_mask(size, (3, 1, size[0] // 2, size[1] - 2))
    hole = np.asarray(mask) >= 128
    new = np.asarray(cascade_model.inpaint(image, mask, 'a red apple', seed=1))
    np.testing.assert_array_equal(new[~hole], np.asarray(image)[~hole])
    assert (new[hole] != np.asarray(image)[hole]).mean() > 0.8


def test_both_token_grids_are_masked_where_the_hole_touches(cascade_model, monkeypatch):
    """Low-res 4 × 4 over 32 pixels: 8 a cell; high-res 8 × 8: 4 a cell."""
    image, seen = noise(32, 32), watch_draws(monkeypatch, cascade_model)
    cascade_model.inpaint(image, box_mask((32, 32), (4, 8, 13, 17)), 'a')
    low, high = np.zeros((4, 4), bool), np.zeros((8, 8), bool)
    low[1:3, 0:2], high[2:5, 1:4] = True, True
    np.testing.assert_array_equal(seen[-1].low == -1, low)
    np.testing.assert_array_equal(seen[-1].high == -1, high)
    small = image.resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(seen[-1].low[~low], cascade_model.encode(small)[~low])
    np.testing.assert_array_equal(seen[-1].high[~high], cascade_model.encode(image, high=True)[~high])


def test_seed_prompt_and_surroundings_reach_the_hole(tiny_model):
    image, other, mask = noise(16, 16), noise(16, 16), box_mask((16, 16), (0, 0, 8, 16))

    def hole(picture, prompt, seed):
        return np.asarray(tiny_model.inpaint(picture, mask, prompt, seed=seed))[:, :8].tobytes()

    first = hole(image, 'a red apple', 1)
    assert hole(image, 'a red apple', 1) == first
    assert len({first, hole(image, 'a red apple', 2), hole(image, 'a dog', 1), hole(other, 'a red apple', 1)}) == 4


@pytest.mark.parametrize('name', ['tiny_model', 'cascade_model'])
def test_a_full_mask_is_a_drawing_from_nothing(name, request):
    model = request.getfixturevalue(name)
    with pytest.warns(InputWarning, match='nothing of it is kept'):
        painted = model.inpaint(noise(*model.size), np.ones(model.size[::-1], bool), 'a red apple', seed=5)
    drawn = model.generate('a red apple', seed=5)[0]
    np.testing.assert_array_equal(np.asarray(painted), np.asarray(drawn))


def test_inpainting_shares_the_compiled_programs(tiny_model):
    mask = box_mask((16, 16), (0, 0, 8, 8))
    tiny_model.generate('a')
    tiny_model.inpaint(noise(16, 16), mask, 'a')
    before = traces.total()
    tiny_model.inpaint(noise(40, 23), box_mask((40, 23), (4, 0, 8, 16)), 'a dog', seed=9)
    tiny_model.outpaint(noise(16, 16), 'a', left=30)
    tiny_model.variation(noise(9, 16), 'a cat', strength=0.4)
    tiny_model.generate('a dog')
    assert traces.total() == before


@pytest.mark.parametrize(('value', 'repaints'), [(127, False), (128, True)])
def test_half_grey_is_where_repainting_begins(tiny_model, value, repaints):
    image, mask = noise(16, 16), box_mask((16, 16), (2, 2, 14, 14), value)
    if repaints:
        assert (np.asarray(tiny_model.inpaint(image, mask, 'a')) != np.asarray(image)).any()
    else:
        with pytest.warns(InputWarning, match='mask is empty'):
            same = tiny_model.inpaint(image, mask, 'a')
        np.testing.assert_array_equal(np.asarray(same), np.asarray(image))


@pytest.mark.parametrize(
    'sides',
    [{'left': 8}, {'top': 3, 'bottom': 20}, {'right': 70}, dict.fromkeys(('left', 'top', 'right', 'bottom'), 5)],
)
def test_outpainting_holds_the_picture_and_paints_the_rest(tiny_model, sides):
    image = noise(16, 20)
    new = np.asarray(tiny_model.outpaint(image, 'a red apple', seed=1, **sides))
    left, top, right, bottom = (sides.get(side, 0) for side in ('left', 'top', 'right', 'bottom'))
    assert new.shape == (20 + top + bottom, 16 + left + right, 3)
    np.testing.assert_array_equal(new[top : top + 20, left : left + 16], np.asarray(image))
    repeated = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), 'edge')
    inside = np.zeros(new.shape[:2], bool)
    inside[top : top + 20, left : left + 16] = True
    assert (new[~inside] != repeated[~inside]).any(-1).mean() > 0.7
    assert (new != np.asarray(tiny_model.outpaint(image, 'a red apple', seed=2, **sides))).any()


def test_a_window_sees_what_the_one_before_painted(tiny_model):
    """The far end of a long outpainting depends on the picture only through the windows between."""
    image, other = noise(16, 16), noise(16, 16)
    ends = [np.asarray(tiny_model.outpaint(picture, 'a dog', right=40, seed=3))[:, -8:] for picture in (image, other)]
    assert (ends[0] != ends[1]).any()


def test_tokens_of_an_unknown_box_are_not_even_looked_at(tiny_model):
    before = traces.total()
    found = known_tokens(tiny_model, np.zeros((3, 3, 3), np.uint8), (0, 0, 3, 3), np.ones((5, 7), bool))
    assert (found == -1).all() and traces.total() == before


def test_wrong_input(tiny_model):
    image = noise(16, 16)
    with pytest.raises(UserError, match='mask is 8×16, the picture 16×16'):
        tiny_model.inpaint(image, Image.new('L', (8, 16)), 'a')
    with pytest.raises(UserError, match='does not exist'):
        tiny_model.inpaint(image, 'nowhere.png', 'a')
    with pytest.raises(UserError, match='image is a dict'):
        tiny_model.inpaint({}, Image.new('L', (8, 16)), 'a')
    with pytest.raises(UserError, match='prompt 3'):
        tiny_model.inpaint(image, box_mask((16, 16), (0, 0, 3, 3)), 3)
    with pytest.raises(UserError, match='context is -1'):
        tiny_model.inpaint(image, box_mask((16, 16), (0, 0, 3, 3)), 'a', context=-1)
    with pytest.raises(UserError, match='left is -3'):
        tiny_model.outpaint(image, 'a', left=-3)
    with pytest.raises(UserError, match='right is 2.5'):
        tiny_model.outpaint(image, 'a', right=2.5)
    with pytest.raises(UserError, match='would be 17016×16'):
        tiny_model.outpaint(image, 'a', right=17_000)
    with pytest.warns(InputWarning, match='nothing to outpaint'):
        np.testing.assert_array_equal(np.asarray(tiny_model.outpaint(image, 'a')), np.asarray(image))
