"""Picture sheets."""

from __future__ import annotations

import numpy as np
import pytest

from muse.errors import UserError
from muse.evals.grids import grid


def pictures(number, size=32):
    return np.random.default_rng(0).integers(0, 200, (number, size, size, 3)).astype(np.uint8)


def test_pictures_are_whole_and_in_order():
    img = pictures(5)
    sheet = np.asarray(grid(img, columns=2))
    assert sheet.shape == (3 * 36 + 4, 2 * 36 + 4, 3)
    for i, expected in enumerate(img):
        y, x = 4 + i // 2 * 36, 4 + i % 2 * 36
        np.testing.assert_array_equal(sheet[y : y + 32, x : x + 32], expected)
    assert (sheet[4 + 72 :, 40:] == 255).all()  # the empty place


def test_captions_lie_under_their_pictures():
    img = pictures(2, 96)
    plain = grid(img, columns=2)
    captions = ['a red apple', 'an extraordinarily-long-single-word-that-fits-nowhere and then many more words follow']
    sheet = np.asarray(grid(img, columns=2, captions=captions))
    assert sheet.shape[0] > plain.height and sheet.shape[1] == plain.width
    under = sheet[4 + 96 : -4]
    assert (under[:, 4:100] < 128).any() and (under[:, 104:200] < 128).any()
    assert (under[:, 100:104] == 255).all()  # no caption runs into its neighbour
    np.testing.assert_array_equal(sheet[4:100, 4:100], img[0])


def test_bad_counts():
    with pytest.raises(UserError, match='1 captions for 2 pictures'):
        grid(pictures(2), columns=2, captions=['one'])
    with pytest.raises(UserError, match='0 columns'):
        grid(pictures(2), columns=0)
    with pytest.raises(UserError, match='grid of 0 pictures'):
        grid(pictures(0), columns=2)
