"""Inpainting: what is outside the mask stays, what is inside is drawn anew (§3.3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muse.editing import cells, composite, flatten
from muse.errors import InputWarning, UserError
from muse.pipeline import traces

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    """A grey mask, white in (left, top, right, bottom)."""
    mask = Image.new('L', size)
    mask.paste(value, box)
    return mask


@pytest.mark.parametrize('size', [(16, 16), (50, 37), (7, 9)])
def test_outside_is_bit_identical_and_inside_is_painted(tiny_model, size):
    image = noise(*size)
    mask = box_mask(size, (1, 1, size[0] // 2, size[1] - 2))
    hole = np.asarray(mask) >= 128
    old, new = np.asarray(image), np.asarray(tiny_model.inpaint(image, mask, 'a red apple', seed=1))
    assert new.shape == old.shape
    np.testing.assert_array_equal(new[~hole], old[~hole])
    assert (new[hole] != old[hole]).mean() > 0.8


def test_seed_prompt_and_surroundings_reach_the_hole(tiny_model):
    image, other, mask = noise(16, 16), noise(16, 16), box_mask((16, 16), (0, 0, 8, 16))

    def hole(picture, prompt, seed):
        return np.asarray(tiny_model.inpaint(picture, mask, prompt, seed=seed))[:, :8].tobytes()

    first = hole(image, 'a red apple', 1)
    assert hole(image, 'a red apple', 1) == first
    assert len({first, hole(image, 'a red apple', 2), hole(image, 'a dog', 1), hole(other, 'a red apple', 1)}) == 4


def test_a_full_mask_is_a_drawing_from_nothing(tiny_model):
    mask = Image.new('L', (16, 16), 255)
    painted = tiny_model.inpaint(noise(16, 16), mask, 'a red apple', seed=5)
    drawn = tiny_model.generate('a red apple', seed=5)[0]
    np.testing.assert_array_equal(np.asarray(painted), np.asarray(drawn))


def test_inpainting_shares_the_compiled_program(tiny_model):
    mask = box_mask((16, 16), (0, 0, 8, 8))
    tiny_model.generate('a')
    tiny_model.inpaint(noise(16, 16), mask, 'a')
    before = traces.total()
    tiny_model.inpaint(noise(16, 16), box_mask((16, 16), (4, 0, 8, 16)), 'a dog', seed=9)
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7), st.randoms(use_true_random=False))
def test_a_cell_is_unknown_exactly_when_a_masked_pixel_touches_it(height, width, rows, columns, random):
    hole = np.array([[random.random() < 0.1 for _ in range(width)] for _ in range(height)])
    expected = np.zeros((rows, columns), bool)
    for y, x in zip(*np.nonzero(hole), strict=True):
        top, bottom = y * rows // height, -(-(y + 1) * rows // height)
        left, right = x * columns // width, -(-(x + 1) * columns // width)
        expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(cells(hole, (rows, columns)), expected)


def test_the_feather_lies_inside_the_hole():
    hole = np.zeros((20, 20), bool)
    hole[4:16, 4:20] = True  # reaches the right border of the picture, which is no rim
    old, new = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 240, np.uint8)
    red = composite(old, new, hole, feather=4)[..., 0]
    assert (red[~hole] == 0).all()
    assert red[10, 4:9].tolist() == [60, 120, 180, 240, 240] and red[10, 19] == 240
    assert (composite(old, new, hole, feather=1)[hole] == 240).all()


def test_a_thin_hole_is_painted_all_the_same():
    hole = np.zeros((20, 20), bool)
    hole[:, 10] = True
    old, new = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 240, np.uint8)
    assert (composite(old, new, hole, feather=8)[:, 10] == 240).all()


def test_transparency_is_laid_over_white():
    image = Image.new('RGBA', (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert list(np.asarray(flatten(image))[0].tolist()) == [[10, 20, 30], [255, 255, 255]]
    assert flatten(Image.new('L', (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_wrong_input(tiny_model):
    image = noise(16, 16)
    with pytest.raises(UserError, match='mask is 8×16, the picture 16×16'):
        tiny_model.inpaint(image, Image.new('L', (8, 16)), 'a')
    with pytest.raises(UserError, match='mask is a str'):
        tiny_model.inpaint(image, 'mask.png', 'a')
    with pytest.raises(UserError, match='prompt 3'):
        tiny_model.inpaint(image, Image.new('L', (16, 16), 255), 3)
