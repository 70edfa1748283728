"""Sizes of pictures, and the windows of the super-res over a canvas larger than it was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muse import canvas
from muse.config import DecodeConfig
from muse.errors import InputWarning, UserError


def test_the_trained_sizes(tiny_model, cascade_model):
    assert canvas.native(tiny_model.release, False) == ((4, 4), None, (16, 16))
    assert canvas.native(cascade_model.release, True) == ((4, 4), (8, 8), (32, 32))
    assert canvas.native(cascade_model.release, False) == ((4, 4), None, (16, 16))


def test_other_sizes(tiny_model, cascade_model):
    assert canvas.of_size(tiny_model.release, (24, 16), False) == ((4, 6), None, (24, 16))
    assert canvas.of_size(tiny_model.release, (8, 4), False) == ((1, 2), None, (8, 4))
    assert canvas.of_size(cascade_model.release, (48, 32), True) == ((4, 6), (8, 12), (48, 32))


@pytest.mark.parametrize(
    ('size', 'superres', 'said'),
    [
        ((24, 17), False, 'multiples of 4 pixels'),
        ((0, 16), False, 'multiples of 4'),
        ((32, 32), False, 'holds no super-res'),
        ((40, 32), True, 'multiples of 16 pixels'),
        ((64, 64), True, 'at most 2 times the pixels of 32×32'),
    ],
)
def test_sizes_that_cannot_be_drawn(tiny_model, cascade_model, size, superres, said):
    with pytest.raises(UserError, match=said):
        canvas.of_size((cascade_model if superres else tiny_model).release, size, superres)


def test_a_draft_fills_in_what_the_release_says(tiny_model, cascade_model):
    base, fine = DecodeConfig(steps=3), DecodeConfig(steps=5, guidance_scale=1.0)
    release = cascade_model.release
    assert canvas.draft(release, None, base, None) == (canvas.native(release, True), base, release.superres_decode)
    assert canvas.draft(release, (48, 32), base, fine) == (((4, 6), (8, 12), (48, 32)), base, fine)
    assert canvas.draft(release, None, base, False) == (canvas.native(release, False), base, None)
    assert canvas.draft(tiny_model.release, (24, 16), base, None) == (((4, 6), None, (24, 16)), base, None)
    with pytest.warns(InputWarning, match='more than the 16 tokens'):
        assert canvas.draft(tiny_model.release, None, DecodeConfig(steps=17), None).base.steps == 16
    with pytest.raises(UserError, match='holds no super-res, so that it draws 16×16 pixels'):
        canvas.draft(tiny_model.release, None, base, fine)
    with pytest.raises(UserError, match='superres.steps is 0'):
        canvas.draft(release, None, base, DecodeConfig(steps=0))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(1, 4))
def test_windows_cover_the_canvas_and_their_weights_add_up(rows, columns, high, wide, ratio):
    found = canvas.windows((rows, columns), (high, wide), (ratio, ratio))
    size = min(rows, high), min(columns, wide)
    assert found.window == (size[0] * ratio, size[1] * ratio)
    total, seen = np.zeros(rows * columns * ratio**2), np.zeros(rows * columns, int)
    for low_t, high_t, weight_t in zip(found.low_Wt, found.high_Wt, found.weight_Wt, strict=True):
        total[high_t] += weight_t
        seen[low_t] += 1
        # The high-res tokens of a window lie under its low-res ones, in the same order.
        y, x = np.divmod(high_t.reshape(found.window), columns * ratio)
        lower = (y // ratio * columns + x // ratio)[::ratio, ::ratio]
        np.testing.assert_array_equal(lower.ravel(), low_t)
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert seen.min() >= 1 and (found.weight_Wt > 0).all()
    if (rows, columns) == size:
        assert len(found.low_Wt) == 1 and (found.weight_Wt == 1).all()


def test_neighbouring_windows_share_a_quarter():
    tops = canvas.windows((40, 16), (16, 16), (1, 1)).low_Wt[:, 0] // 16
    assert tops.tolist() == [0, 12, 24]
