"""Masks, cells, boxes and the blend: the geometry of editing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muse.editing import regions
from muse.errors import UserError

RNG = np.random.default_rng(0)
SIDES = st.integers(1, 40)


def true_cells(hole: np.ndarray, grid: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Pixel by pixel, in whole numbers: the cells whose rectangle a masked pixel's unit square overlaps."""
    expected = np.zeros(grid, bool)
    height, width = box[3] - box[1], box[2] - box[0]
    for y, x in zip(*np.nonzero(hole), strict=True):
        y, x = y - box[1], x - box[0]
        if not (0 <= y < height and 0 <= x < width):
            continue
        top, bottom = y * grid[0] // height, -(-(y + 1) * grid[0] // height)
        left, right = x * grid[1] // width, -(-(x + 1) * grid[1] // width)
        expected[top:bottom, left:right] = True
    return expected


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1), st.booleans())
def test_a_cell_is_unknown_exactly_when_a_masked_pixel_touches_it(height, width, rows, columns, seed, boxed):
    rng = np.random.default_rng(seed)
    hole = rng.random((height, width)) < 0.1
    box = (0, 0, width, height)
    if boxed:  # may lie partly beyond the picture
        left, top = (int(rng.integers(-9, side)) for side in (width, height))
        box = (left, top, left + int(rng.integers(1, 50)), top + int(rng.integers(1, 50)))
    found = regions.cells(hole, (rows, columns), box if boxed else None)
    np.testing.assert_array_equal(found, true_cells(hole, (rows, columns), box))


def test_the_feather_lies_inside_the_hole():
    hole = np.zeros((20, 20), bool)
    hole[4:16, 4:20] = True  # reaches the right border of the picture, which is no rim
    old, new = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 240, np.uint8)
    red = regions.composite(old, new, hole, width=4)[..., 0]
    assert (red[~hole] == 0).all()
    assert red[10, 4:9].tolist() == [60, 120, 180, 240, 240] and red[10, 19] == 240
    assert (regions.composite(old, new, hole, width=1)[hole] == 240).all()


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_grown_holes_and_depths_are_those_of_stepwise_growing(height, width, steps, seed):
    hole = np.random.default_rng(seed).random((height, width)) < 0.2
    expected = hole.copy()
    for _ in range(steps):
        padded = np.pad(expected, 1)
        expected = expected | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    np.testing.assert_array_equal(regions.grown(hole, steps), expected)


def test_a_thin_hole_is_painted_all_the_same():
    hole = np.zeros((20, 20), bool)
    hole[:, 10] = True
    old, new = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 240, np.uint8)
    assert (regions.composite(old, new, hole, width=8)[:, 10] == 240).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_window_holds_the_hole_and_has_the_models_aspect(data):
    width, height = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 3000))
    model = data.draw(st.sampled_from([(256, 256), (512, 256), (32, 48)]))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    hole = np.zeros((height, width), bool)
    hole[top:bottom, left:right] = True
    box = regions.window(hole, model, data.draw(st.sampled_from([1.0, 2.0, 1e6])))
    assert box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    assert abs(box_width - box_height * model[0] / model[1]) <= 1 + model[0] / model[1]
    whole = regions.whole((width, height), model)
    assert box == whole or (box_width <= whole[2] - whole[0] and box_width >= model[0])


def test_the_window_gives_context_without_enlarging_and_takes_small_pictures_whole():
    hole = np.zeros((1000, 2000), bool)
    hole[500:600, 40:140] = True
    assert regions.window(hole, (256, 256), 2.0) == (0, 422, 256, 678)  # moved into the picture
    assert regions.window(hole, (256, 256), 4.0) == (0, 350, 400, 750)
    assert regions.window(hole, (256, 256), 1e6) == (0, -500, 2000, 1500)
    assert regions.window(hole[400:700, :300], (256, 256), 2.0) == (0, 0, 300, 300)


def test_a_box_is_looked_at_and_brought_back():
    picture = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    box = (0, -5, 30, 25)
    seen = regions.look(picture, box, (30, 30))
    np.testing.assert_array_equal(seen[5:25], picture)
    np.testing.assert_array_equal(seen[:5], np.broadcast_to(picture[:1], (5, 30, 3)))
    np.testing.assert_array_equal(regions.back(seen, box, (30, 20)), picture)
    inner = (3, 4, 13, 14)
    np.testing.assert_array_equal(regions.look(picture, inner, (10, 10)), picture[4:14, 3:13])
    smaller = regions.look(picture, inner, (5, 5))
    expected = Image.fromarray(picture[4:14, 3:13]).resize((5, 5), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(smaller, np.asarray(expected))
    assert regions.back(smaller, inner, (30, 20)).shape == (10, 10, 3)


def test_looking_at_a_long_picture_takes_little_memory():
    """The box around it has 10 billion pixels."""
    picture = np.zeros((2, 100_000, 3), np.uint8)
    picture[:, 50_000:] = 200
    box = regions.whole((100_000, 2), (64, 64))
    seen = regions.look(picture, box, (64, 64))
    assert seen.shape == (64, 64, 3) and seen[:, :28].max() == 0 and (seen[:, 36:] == 200).all()
    assert regions.back(seen, box, (100_000, 2)).shape == picture.shape


@pytest.mark.parametrize(('width', 'height'), [(1, 1), (2, 5), (7, 3)])
def test_a_picture_of_a_few_pixels_grows_one_way(width, height):
    for sides in ((24, 0, 0, 0), (0, 24, 0, 0), (0, 0, 60, 0), (0, 0, 0, 60)):
        left, top, right, bottom = sides
        start = (left, top, left + width, top + height)
        hole = np.ones((top + height + bottom, left + width + right), bool)
        hole[start[1] : start[3], start[0] : start[2]] = False
        for box in regions.spread(hole, start, (16, 16)):
            x0, y0, x1, y1 = regions.visible(hole.shape[::-1], box)
            assert not hole[y0:y1, x0:x1].all()
            hole[y0:y1, x0:x1] = False
        assert not hole.any(), sides


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_boxes_around_a_grown_picture_cover_all_of_it_and_always_see_something(data):
    width, height = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
    left, top, right, bottom = (data.draw(st.integers(0, 200)) for _ in range(4))
    model = data.draw(st.sampled_from([(16, 16), (32, 32), (64, 32)]))
    start = (left, top, left + width, top + height)
    hole = np.ones((top + height + bottom, left + width + right), bool)
    hole[start[1] : start[3], start[0] : start[2]] = False
    todo = hole.copy()
    boxes = regions.spread(hole, start, model)
    for box in boxes:
        x0, y0, x1, y1 = regions.visible(hole.shape[::-1], box)
        here = todo[y0:y1, x0:x1]
        assert not here.all(), 'a box sees nothing that is known'
        here[:] = False
    assert not todo.any()


def test_masks_of_all_kinds():
    grey = RNG.integers(0, 256, (5, 7), np.uint8)
    expected = grey >= 128
    image = Image.fromarray(grey)
    for mask in (image, image.convert('RGB'), image.convert('RGBA'), grey, expected, image.convert('P')):
        np.testing.assert_array_equal(regions.open_mask(mask, (7, 5)), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(regions.open_mask(deep, (7, 5)), expected)
    bits = Image.fromarray(expected.astype(np.uint8) * 255).convert('1')
    np.testing.assert_array_equal(regions.open_mask(bits, (7, 5)), expected)


def test_masks_from_files(tmp_path):
    mask = Image.new('L', (7, 5), 255)
    mask.save(tmp_path / 'mask.png')
    assert regions.open_mask(tmp_path / 'mask.png', (7, 5)).all()
    mask.putalpha(Image.new('L', (7, 5), 9))
    mask.save(tmp_path / 'alpha.png')
    with pytest.raises(UserError, match='transparent'):
        regions.open_mask(str(tmp_path / 'alpha.png'), (7, 5))
    with pytest.raises(UserError, match='does not exist'):
        regions.open_mask(tmp_path / 'none.png', (7, 5))


@pytest.mark.parametrize(
    ('mask', 'said'),
    [
        (Image.new('L', (8, 5)), 'mask is 8×5, the picture 7×5'),
        (Image.new('RGBA', (7, 5), (255, 255, 255, 0)), 'transparent'),
        (Image.new('LA', (7, 5), (255, 100)), 'transparent'),
        (np.zeros((5, 7), np.float32), 'mask is float32'),
        (np.zeros((5, 8), bool), 'mask is 8×5'),
        (3, 'mask is a int'),
    ],
)
def test_wrong_masks(mask, said):
    with pytest.raises(UserError, match=said):
        regions.open_mask(mask, (7, 5))
