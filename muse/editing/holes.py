"""Inpainting and outpainting (§3.3): the tokens outside the hole are kept, those inside drawn anew, on both levels.

What lies outside the hole never changes: its pixels are copied from the picture, not decoded from tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, UInt8

from muse.cascade import UNKNOWN
from muse.data.pictures import MAX_PIXELS, MAX_SIDE, Picture
from muse.editing import regions
from muse.editing.regions import Box
from muse.errors import UserError, warn
from muse.settings import Row, Settings, count, text
from muse.settings import context as checked_context

if TYPE_CHECKING:
    from muse.pipeline import Muse

SIDES = ('left', 'top', 'right', 'bottom')


def inpaint(
    model: Muse,
    img_HWC: UInt8[np.ndarray, 'H W 3'],
    mask: Picture,
    prompt: str,
    settings: Settings,
    context: float,
) -> UInt8[np.ndarray, 'H W 3']:
    """The picture with the white of the mask painted anew; see `Muse.inpaint`."""
    checked_context(context)
    hole_HW = regions.open_mask(mask, (img_HWC.shape[1], img_HWC.shape[0]))
    if not hole_HW.any():
        warn('the mask is empty (no pixel of 128 or more): the picture is returned as it is')
        return img_HWC
    if hole_HW.all():
        warn('the mask covers the whole picture: nothing of it is kept')
    return _repaint(model, img_HWC, hole_HW, [regions.window(hole_HW, settings.size, context)], prompt, settings)


def outpaint(
    model: Muse, img_HWC: UInt8[np.ndarray, 'H W 3'], sides: Sequence[int], prompt: str, settings: Settings
) -> UInt8[np.ndarray, 'H W 3']:
    """The picture with new pixels to its left, top, right and bottom; see `Muse.outpaint`."""
    height, width = img_HWC.shape[:2]
    size, (left, top, right, bottom) = outpainted((width, height), sides), sides
    if size == (width, height):
        warn('nothing to outpaint (all sides are 0): the picture is returned as it is')
        return img_HWC
    start = left, top, left + width, top + height
    hole_HW = np.ones(size[::-1], bool)
    hole_HW[start[1] : start[3], start[0] : start[2]] = False
    larger_HWC = regions.grow(img_HWC, (-left, -top, width + right, height + bottom))
    return _repaint(model, larger_HWC, hole_HW, regions.spread(hole_HW, start, settings.size), prompt, settings)


def outpainted(size: tuple[int, int], sides: Sequence[int]) -> tuple[int, int]:
    """Width and height of a picture with so many new pixels to its left, top, right and bottom."""
    left, top, right, bottom = (count(name, n, 0) for name, n in zip(SIDES, sides, strict=True))
    larger = size[0] + left + right, size[1] + top + bottom
    if max(larger) > MAX_SIDE or larger[0] * larger[1] > MAX_PIXELS:
        limits = f'{MAX_SIDE} pixels a side and {MAX_PIXELS // 1_000_000} million in all'
        raise UserError(f'the outpainted picture would be {larger[0]}×{larger[1]}; at most {limits} are painted')
    return larger


def _repaint(
    model: Muse,
    img_HWC: np.ndarray,
    hole_HW: Bool[np.ndarray, 'H W'],
    boxes: Sequence[Box],
    prompt: str,
    settings: Settings,
) -> np.ndarray:
    """Paints the hole box by box; each box sees what those before it have painted, and blends into it."""
    text('prompt', prompt)
    left_HW, canvas = hole_HW.copy(), model.canvas(settings)
    size = img_HWC.shape[1], img_HWC.shape[0]
    for index, box in enumerate(boxes):
        left, top, right, bottom = regions.visible(size, box)
        if not left_HW[top:bottom, left:right].any():
            continue
        low_hw = regions.cells(left_HW, canvas.low, box)
        high_hw = None if canvas.high is None else regions.cells(left_HW, canvas.high, box)
        part_HWC = paint(model, img_HWC, box, low_hw, high_hw, Row(prompt=prompt, index=index), settings)
        blend_HW = hole_HW if index == 0 else regions.grown(left_HW, regions.feather(box)) & hole_HW
        img_HWC = regions.paste(img_HWC, part_HWC, blend_HW, box)
        left_HW[top:bottom, left:right] = False
    return img_HWC


def paint(
    model: Muse,
    img_HWC: UInt8[np.ndarray, 'H W 3'],
    box: Box,
    unknown_low_hw: Bool[np.ndarray, 'h w'],
    unknown_high_hw: Bool[np.ndarray, 'h2 w2'] | None,
    row: Row,
    settings: Settings,
) -> UInt8[np.ndarray, 'H2 W2 3']:
    """A box of a picture with some token cells drawn anew, at the model's size and back: its visible part."""
    low_hw = known_tokens(model, img_HWC, box, unknown_low_hw)
    high_hw = None if unknown_high_hw is None else known_tokens(model, img_HWC, box, unknown_high_hw, high=True)
    row = dataclasses.replace(row, low=low_hw, high=high_hw)
    [drawn] = model.cascade.draw([row], settings, model.canvas(settings))
    return regions.back(np.asarray(drawn.image), box, (img_HWC.shape[1], img_HWC.shape[0]))


def known_tokens(
    model: Muse, img_HWC: np.ndarray, box: Box, unknown_hw: Bool[np.ndarray, 'h w'], *, high: bool = False
) -> Int[np.ndarray, 'h w']:
    """Tokens of a box of a picture, UNKNOWN where they are to be drawn."""
    if unknown_hw.all():
        return np.full(unknown_hw.shape, UNKNOWN, np.int32)
    part = model.release.superres_tokenizer if high else model.release.tokenizer
    assert part is not None
    size = unknown_hw.shape[1] * part.config.factor, unknown_hw.shape[0] * part.config.factor
    return np.where(unknown_hw, UNKNOWN, model.cascade.tokens(regions.look(img_HWC, box, size), high=high))
