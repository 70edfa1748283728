"""Sheets, GIFs, tokens and strips hold what they should."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from muse.errors import UserError
from muse.jobs import extras


def plain(colour, size=(16, 16)):
    return Image.new('RGB', size, colour)


def test_a_sheet_centres_smaller_pictures():
    sheet = extras.sheet(iter([plain('red'), plain('blue', (8, 16))]), ['', ''], columns=2)
    pixels = np.asarray(sheet)
    assert tuple(pixels[10, 10]) == (255, 0, 0)
    np.testing.assert_array_equal(pixels[10, 24:40], [(255,) * 3] * 4 + [(0, 0, 255)] * 8 + [(255,) * 3] * 4)


def test_a_large_sheet_holds_small_pictures(monkeypatch):
    monkeypatch.setattr(extras, '_SHEET_PIXELS', 4 * 8 * 8)
    sheet = extras.sheet((plain('red') for _ in range(4)), [''] * 4, columns=4)
    assert sheet.width == 4 * 12 + 4
    with pytest.raises(UserError, match='up to 1000 pictures, not 1001'):
        extras.check_grid(1001)
    extras.check_grid(1000)


def test_gif_shows_every_frame_and_stays_on_the_last():
    image = Image.open(io.BytesIO(extras.gif([plain('red'), plain('lime'), plain('blue')])))
    shown, times = [], []
    for frame in range(image.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
        image.seek(frame)
        shown.append(image.convert('RGB').getpixel((3, 3)))
        times.append(image.info['duration'])
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert times[0] == times[1] < times[2] and image.info['loop'] == 0


def test_one_frame_is_a_gif_too():
    assert Image.open(io.BytesIO(extras.gif([plain('red')]))).format == 'GIF'


def test_tokens_come_back_and_have_no_time_in_them(monkeypatch):
    low, high = np.arange(16, dtype=np.int32).reshape(4, 4), np.arange(64, dtype=np.int32).reshape(8, 8)
    first = extras.tokens(low, high)
    monkeypatch.setattr('time.time', lambda: 2e9)
    assert extras.tokens(low, high) == first
    with np.load(io.BytesIO(first)) as found:
        np.testing.assert_array_equal(found['low'], low)
        np.testing.assert_array_equal(found['high'], high)
    with np.load(io.BytesIO(extras.tokens(low, None))) as found:
        assert found.files == ['low']


def test_a_strip_has_one_height():
    strip = extras.strip([plain('red', (10, 20)), plain('blue', (40, 40))])
    assert strip.size == (20 + 8 + 40, 40)
    assert strip.getpixel((5, 20)) == (255, 0, 0) and strip.getpixel((60, 20)) == (0, 0, 255)
    assert extras.strip([plain('red', (1000, 2000))]).size == (256, 512)
