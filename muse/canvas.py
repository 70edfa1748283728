"""Which pictures a release can draw: sizes as grids of tokens, checked drafts, and windows of the super-res."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from muse import settings as knobs
from muse.config import DecodeConfig
from muse.errors import UserError
from muse.release.format import Release
from muse.settings import SuperresDecoding

Grid = tuple[int, int]  # token rows and columns

LARGEST = 2  # a canvas of the base holds at most so many times the tokens that it was trained on
LARGEST_UPSCALED = 4  # and one that is only upscaled, which is done in windows, so many times


class Canvas(NamedTuple):
    """Grids of one picture. `high` is None where the base alone draws it."""

    low: Grid
    high: Grid | None
    size: tuple[int, int]  # width and height in pixels


class Draft(NamedTuple):
    """What is drawn and how, with the release's defaults filled in."""

    canvas: Canvas
    base: DecodeConfig
    superres: DecodeConfig | None  # None: the base alone draws


def draft(release: Release, size: tuple[int, int] | None, base: DecodeConfig, superres: SuperresDecoding) -> Draft:
    """Checks what a user asks of a release, whose weights are not read.

    Args:
        release: the model, perhaps described alone.
        size: width and height in pixels; None: what was trained on.
        base: decoding of the base.
        superres: that of the super-res; None: the release's own, False: the base alone draws.

    Raises:
        UserError: a value out of range, a size that cannot be drawn, or a super-res that the release does not hold.
    """
    if superres:
        need_superres(release)
    both = release.superres is not None and superres is not False
    canvas = native(release, both) if size is None else of_size(release, knobs.size(size), both)
    checked = knobs.decoding(base, math.prod(canvas.low))
    if canvas.high is None:
        return Draft(canvas, checked, None)
    config = superres or release.superres_decode
    assert config is not None
    return Draft(canvas, checked, knobs.decoding(config, math.prod(canvas.high), 'superres.'))


def need_superres(release: Release) -> None:
    """Raises UserError where the release holds no super-res."""
    if release.superres is None:
        raise UserError(
            f'{release.name} holds no super-res, so that it draws {_text(native(release, False).size)} pixels and '
            'cannot upscale; load a release that holds one'
        )


def native(release: Release, superres: bool) -> Canvas:
    """The size that was trained on."""
    low = release.base.config.grid
    return of_low(release, low, superres)


def of_low(release: Release, low: Grid, superres: bool) -> Canvas:
    """The canvas over a grid of low-res tokens."""
    if superres and release.superres and release.superres_tokenizer:
        ratio, factor = _ratio(release), release.superres_tokenizer.config.factor
        high = low[0] * ratio[0], low[1] * ratio[1]
        return Canvas(low, high, (high[1] * factor, high[0] * factor))
    factor = release.tokenizer.config.factor
    return Canvas(low, None, (low[1] * factor, low[0] * factor))


def of_size(release: Release, size: tuple[int, int], superres: bool) -> Canvas:
    """The canvas of a picture of `size` (width, height).

    Raises:
        UserError: sides that do not divide into tokens, or a picture larger than the model can draw.
    """
    own = native(release, superres)
    unit = pixel_unit(release, superres)
    width, height = size
    if width % unit[0] or height % unit[1] or min(size) < 1:
        sides = f'{unit[0]}' if unit[0] == unit[1] else f'{unit[0]} (width) and {unit[1]} (height)'
        raise UserError(f'size is {width}×{height}; give multiples of {sides} pixels, for example {_text(own.size)}')
    if width * height > LARGEST * math.prod(own.size):
        without = '' if superres else ': this release holds no super-res, which would draw larger ones'
        raise UserError(
            f'size is {width}×{height}; at most {LARGEST} times the pixels of {_text(own.size)} can be drawn{without}'
        )
    low = height * own.low[0] // own.size[1], width * own.low[1] // own.size[0]
    return of_low(release, low, superres)


def pixel_unit(release: Release, superres: bool) -> tuple[int, int]:
    """What a picture's width and height must be multiples of."""
    own, rows, columns = native(release, superres), *low_unit(release, superres)
    return own.size[0] // own.low[1] * columns, own.size[1] // own.low[0] * rows


def low_unit(release: Release, superres: bool) -> Grid:
    """What the low-res grid's rows and columns must be multiples of: the super-res works in blocks."""
    if not (superres and release.superres):
        return 1, 1
    block = release.superres.config.block
    rows, columns = (block // math.gcd(block, ratio) for ratio in _ratio(release))
    return rows, columns


def _ratio(release: Release) -> Grid:
    """High-res tokens along one low-res token."""
    assert release.superres is not None
    high, low = release.superres.config.grid, release.superres.config.low_grid
    return high[0] // low[0], high[1] // low[1]


def _text(size: tuple[int, int]) -> str:
    return f'{size[0]}×{size[1]}'


class Windows(NamedTuple):
    """Overlapping windows of one shape over a canvas; places are indices into the canvas, row by row."""

    window: Grid  # high-res rows and columns of each
    low_Wt: np.ndarray  # places of each window's low-res tokens
    high_Wt: np.ndarray  # and of its high-res ones
    weight_Wt: np.ndarray  # of each window at its places, float32; at every place of the canvas they add up to 1


def windows(low: Grid, trained: Grid, ratio: Grid) -> Windows:
    """Covers a canvas of `low` low-res tokens by windows of at most `trained`, neighbours sharing at least a quarter.

    Args:
        low: rows and columns of low-res tokens of the canvas.
        trained: of the largest window.
        ratio: high-res tokens along a low-res one.
    """
    size = min(low[0], trained[0]), min(low[1], trained[1])
    high, window = (low[0] * ratio[0], low[1] * ratio[1]), (size[0] * ratio[0], size[1] * ratio[1])
    starts = [_starts(*sides) for sides in zip(low, size, strict=True)]
    corners = [(top, left) for top in starts[0] for left in starts[1]]
    low_Wt = np.stack([_places(low, corner, size) for corner in corners])
    high_Wt = np.stack([_places(high, (top * ratio[0], left * ratio[1]), window) for top, left in corners])
    tent_t = np.outer(_tent(window[0]), _tent(window[1])).ravel()
    total_T = np.zeros(high[0] * high[1])
    for at_t in high_Wt:
        total_T[at_t] += tent_t
    return Windows(window, low_Wt, high_Wt, (tent_t / total_T[high_Wt]).astype(np.float32))


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin along one side: evenly, the first at 0, the last flush with the end."""
    stride = max(1, window - window // 4)
    count = 1 + math.ceil((length - window) / stride)
    return [round(start) for start in np.linspace(0, length - window, count)]


def _places(grid: Grid, corner: Grid, window: Grid) -> np.ndarray:
    rows, columns = corner[0] + np.arange(window[0]), corner[1] + np.arange(window[1])
    return (rows[:, None] * grid[1] + columns).ravel().astype(np.int32)


def _tent(length: int) -> np.ndarray:
    place = np.arange(length)
    return np.minimum(place + 1, length - place).astype(np.float64)
