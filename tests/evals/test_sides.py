"""The colour on each side of a picture, as tools/eval_sides.py counts it."""

from __future__ import annotations

import numpy as np
import pytest

from tools import eval_sides


def picture(left, right) -> np.ndarray:
    img_HWC = np.full((32, 32, 3), 255, np.uint8)
    img_HWC[8:24, 2:12], img_HWC[4:20, 20:30] = left, right
    return img_HWC


@pytest.mark.parametrize(('left', 'right'), [(left, right) for _, left, right in eval_sides.prompts()])
def test_sides(left, right):
    shades = [np.array(eval_sides.COLOURS[colour]) * 0.7 for colour in (left, right)]
    assert eval_sides.sides(picture(*shades), left, right) == (True, True)
    assert eval_sides.sides(picture(*shades[::-1]), left, right) == (False, False)
    assert eval_sides.sides(picture(shades[0], shades[0]), left, right) == (True, False)
    assert eval_sides.sides(picture(255, shades[1]), left, right) == (False, True)


def test_prompts_trade_their_colours():
    found = eval_sides.prompts()
    assert found[0][0] == 'a red heart left of a blue heart, noto style'
    assert found[10][0] == 'an orange book left of a green book, noto style'
    for (one, *colours), (two, *traded) in zip(found[::2], found[1::2], strict=True):
        assert sorted(one.split()) == sorted(two.split()) or 'an' in one + two
        assert colours == traded[::-1]
