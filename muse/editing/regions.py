"""Where an edit takes place: masks, token cells, windows of a large picture, and the blend back into it.

A box is (left, top, right, bottom) in pixels of the picture. It may reach beyond: there the picture's rim is repeated.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from muse.data.pictures import Picture, open_picture
from muse.errors import UserError

FEATHER = 64  # the blend at a hole's rim takes 1/64 of the box's short side
WHOLE = 1.5  # a picture at most so many times as large as the window needed is taken whole

Box = tuple[int, int, int, int]
Size = tuple[int, int]  # width, height


def open_mask(mask: Picture, size: Size) -> Bool[np.ndarray, 'H W']:
    """Where to repaint: where the mask is at least half grey.

    Args:
        mask: black and white or grey (colours are read as their brightness), opaque; as an array uint8 or bool
            [height, width].
        size: width and height that it must have.

    Raises:
        UserError: a mask of another size, with transparency, of a type that is no mask, or no readable picture.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype in (bool, np.uint8):
        hole_HW = mask if mask.dtype == bool else mask >= 128
    elif isinstance(mask, Image.Image | str | Path) or (isinstance(mask, np.ndarray) and mask.ndim == 3):
        img_HWC = open_picture(mask)
        if not isinstance(mask, np.ndarray) and _transparent(mask):
            raise UserError(
                'the mask has transparent parts; give a grey one without: white is repainted, black is kept'
            )
        hole_HW = np.asarray(Image.fromarray(img_HWC).convert('L')) >= 128
    else:
        what = f'{mask.dtype} {mask.shape}' if isinstance(mask, np.ndarray) else f'a {type(mask).__name__}'
        raise UserError(f'mask is {what}; give a grey picture, or uint8 or bool [height, width]')
    height, width = hole_HW.shape
    if (width, height) != size:
        raise UserError(f'mask is {width}×{height}, the picture {size[0]}×{size[1]}; give a mask of the same size')
    return hole_HW


def _transparent(mask: Image.Image | str | Path) -> bool:
    if not isinstance(mask, Image.Image):
        with Image.open(mask) as opened:
            return _transparent(opened)
    lowest = mask.convert('RGBA').getchannel('A').getextrema()[0] if mask.has_transparency_data else 255
    return lowest < 255  # pyright: ignore[reportOperatorIssue]


def cells(hole_HW: Bool[np.ndarray, 'H W'], grid: tuple[int, int], box: Box | None = None) -> Bool[np.ndarray, 'h w']:
    """The token cells that any masked pixel touches, however small its share, at whatever size of picture.

    Args:
        hole_HW: of the whole picture.
        grid: rows and columns of cells.
        box: what they cover; None: the picture.
    """
    left, top, right, bottom = box or (0, 0, hole_HW.shape[1], hole_HW.shape[0])
    rows_hW = np.stack([hole_HW[part].any(axis=0) for part in _touched(top, bottom, grid[0])])
    return np.stack([rows_hW[:, part].any(axis=1) for part in _touched(left, right, grid[1])], axis=1)


def _touched(start: int, stop: int, tokens: int) -> list[slice]:
    """The pixels of each cell, also those that it covers in part, where `tokens` cells lie between start and stop."""
    length = stop - start
    ends = [(start + t * length // tokens, start - (-(t + 1) * length // tokens)) for t in range(tokens)]
    return [slice(max(0, first), max(0, last)) for first, last in ends]


def whole(size: Size, model: Size) -> Box:
    """The smallest box of the model's aspect around a whole picture."""
    width = max(size[0], math.ceil(size[1] * model[0] / model[1]))
    height = max(size[1], math.ceil(size[0] * model[1] / model[0]))
    return _around(size[0] / 2, size[1] / 2, (width, height))


def window(hole_HW: Bool[np.ndarray, 'H W'], model: Size, context: float) -> Box:
    """A box of the model's aspect around a hole.

    It is `context` times as large as the hole, and not smaller than the model's pictures: those would have to be
    enlarged for it. A picture not much larger than that is taken whole.
    """
    height, width = hole_HW.shape
    (top, bottom), (left, right) = (np.flatnonzero(hole_HW.any(axis))[[0, -1]] for axis in (1, 0))
    scale = max(1.0, context * (right + 1 - left) / model[0], context * (bottom + 1 - top) / model[1])
    everything = whole((width, height), model)
    if everything[2] - everything[0] <= WHOLE * scale * model[0]:
        return everything
    box = _around((left + right + 1) / 2, (top + bottom + 1) / 2, (round(scale * model[0]), round(scale * model[1])))
    return _inside(box, (width, height))


def spread(hole_HW: Bool[np.ndarray, 'H W'], start: Box, model: Size) -> list[Box]:
    """Boxes over a hole around a picture, from the picture outward, each reaching half into what lies before it.

    Args:
        hole_HW: over the grown picture.
        start: the box of the picture itself in it.
        model: size of the model's pictures.
    """
    height, width = hole_HW.shape
    short = min((start[2] - start[0]) / model[0], (start[3] - start[1]) / model[1])
    scale = max(1.0, short)
    everything = whole((width, height), model)
    if everything[2] - everything[0] <= WHOLE * scale * model[0]:
        return [everything]
    side = round(scale * model[0]), round(scale * model[1])
    middle = (start[0] + start[2]) / 2, (start[1] + start[3]) / 2
    boxes = [
        _inside((left, top, left + side[0], top + side[1]), (width, height))
        for left in _steps(width, side[0], start[0], start[2])
        for top in _steps(height, side[1], start[1], start[3])
    ]

    def distance(box: Box) -> float:
        return math.hypot((box[0] + box[2]) / 2 - middle[0], (box[1] + box[3]) / 2 - middle[1])

    return sorted(boxes, key=distance)


def _steps(length: int, side: int, first: int, last: int) -> list[int]:
    """Left edges of boxes along one dimension: from the picture's ends outward in steps of half a box."""
    half = max(1, side // 2)
    outward = [*range(first - half, -half, -half), *range(last - half, length - half, half)]
    inward = range(first, last - half, half)
    # A picture of less than half a box that does not grow along this dimension is met by none of these.
    places = (*outward, *inward) or (first,)
    return sorted({min(max(0, place), max(0, length - side)) for place in places})


def _around(x: float, y: float, size: Size) -> Box:
    left, top = round(x - size[0] / 2), round(y - size[1] / 2)
    return left, top, left + size[0], top + size[1]


def _inside(box: Box, size: Size) -> Box:
    """The box moved into the picture; where it is larger than that, centred on it."""

    def move(start: int, length: int, limit: int) -> int:
        return (limit - length) // 2 if length >= limit else min(max(0, start), limit - length)

    left = move(box[0], box[2] - box[0], size[0])
    top = move(box[1], box[3] - box[1], size[1])
    return left, top, left + box[2] - box[0], top + box[3] - box[1]


def visible(size: Size, box: Box) -> Box:
    """The part of a box that lies within a picture of `size`."""
    return max(0, box[0]), max(0, box[1]), min(size[0], box[2]), min(size[1], box[3])


def grow(img_HWC: UInt8[np.ndarray, 'H W 3'], box: Box) -> UInt8[np.ndarray, 'h w 3']:
    """What a box holds; beyond the picture its rim is repeated."""
    rows = np.clip(np.arange(box[1], box[3]), 0, img_HWC.shape[0] - 1)
    columns = np.clip(np.arange(box[0], box[2]), 0, img_HWC.shape[1] - 1)
    return img_HWC[rows[:, None], columns]


def look(img_HWC: UInt8[np.ndarray, 'H W 3'], box: Box, size: Size) -> UInt8[np.ndarray, 'h w 3']:
    """What a box holds, scaled to `size`; beyond the picture its rim is repeated."""
    left, top, right, bottom = visible((img_HWC.shape[1], img_HWC.shape[0]), box)
    x, y = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    first = round((left - box[0]) * x), round((top - box[1]) * y)
    last = max(first[0] + 1, round((right - box[0]) * x)), max(first[1] + 1, round((bottom - box[1]) * y))
    part_HWC = _resized(img_HWC[top:bottom, left:right], (last[0] - first[0], last[1] - first[1]))
    return grow(part_HWC, (-first[0], -first[1], size[0] - first[0], size[1] - first[1]))


def back(patch_HWC: UInt8[np.ndarray, 'h w 3'], box: Box, size: Size) -> UInt8[np.ndarray, 'H W 3']:
    """The visible part of a box (see `visible`) out of what was painted for the whole of it, at its own scale.

    Args:
        patch_HWC: the whole box at any size.
        box: its place in the picture.
        size: of the picture.
    """
    left, top, right, bottom = visible(size, box)
    x, y = patch_HWC.shape[1] / (box[2] - box[0]), patch_HWC.shape[0] / (box[3] - box[1])
    part = (left - box[0]) * x, (top - box[1]) * y, (right - box[0]) * x, (bottom - box[1]) * y
    return _resized(patch_HWC, (right - left, bottom - top), part)


def _resized(img_HWC: np.ndarray, size: Size, part: tuple[float, float, float, float] | None = None) -> np.ndarray:
    if part is not None and size == (part[2] - part[0], part[3] - part[1]) and all(side.is_integer() for side in part):
        left, top, right, bottom = map(int, part)
        return img_HWC[top:bottom, left:right]
    if part is None and img_HWC.shape[1::-1] == size:
        return img_HWC
    return np.asarray(Image.fromarray(img_HWC).resize(size, Image.Resampling.LANCZOS, box=part))


def paste(img_HWC: np.ndarray, part_HWC: np.ndarray, hole_HW: np.ndarray, box: Box) -> UInt8[np.ndarray, 'H W 3']:
    """The picture with the hole's part in the box taken from what `back` gave, feathered inside the hole's rim."""
    left, top, right, bottom = visible((img_HWC.shape[1], img_HWC.shape[0]), box)
    here = slice(top, bottom), slice(left, right)
    pasted = img_HWC.copy()
    pasted[here] = composite(img_HWC[here], part_HWC, hole_HW[here], feather(box))
    return pasted


def feather(box: Box) -> int:
    """Width in pixels of the blend at a hole's rim."""
    return max(1, min(box[2] - box[0], box[3] - box[1]) // FEATHER)


def grown(hole_HW: Bool[np.ndarray, 'H W'], width: int) -> Bool[np.ndarray, 'H W']:
    """The hole and all that lies within `width` pixels of it, by horizontal and vertical steps."""
    return _distance(hole_HW) <= width


def composite(old_HWC: np.ndarray, new_HWC: np.ndarray, hole_HW: np.ndarray, width: int) -> np.ndarray:
    """`new` inside the hole, `old` outside, blended over `width` pixels inside the hole's rim; uint8 all."""
    result_HWC, around = old_HWC.copy(), _around_hole(hole_HW)
    alpha_HW1 = _alpha(hole_HW[around], width)[..., None]
    blend_HWC = np.rint(alpha_HW1 * new_HWC[around] + (1 - alpha_HW1) * old_HWC[around]).astype(np.uint8)
    result_HWC[around] = np.where(hole_HW[around][..., None], blend_HWC, old_HWC[around])
    return result_HWC


def _around_hole(hole_HW: Bool[np.ndarray, 'H W']) -> tuple[slice, slice]:
    """The hole's rectangle with one pixel more on each side: a large picture is not blended where nothing changes."""
    rows, columns = (np.flatnonzero(hole_HW.any(axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)


def _alpha(hole_HW: Bool[np.ndarray, 'H W'], width: int) -> Float[np.ndarray, 'H W']:
    """0 outside the hole, rising inward to 1 at `width` pixels from the rim (sooner in a hole that is thinner).

    The picture's own border is no rim.
    """
    depth_HW = np.minimum(_distance(~hole_HW), width).astype(np.float32)
    return depth_HW / max(1.0, depth_HW.max(initial=0))


def _distance(marked_HW: Bool[np.ndarray, 'H W']) -> Int[np.ndarray, 'H W']:
    """Horizontal and vertical steps from each pixel to the nearest marked one; very many where none is marked."""
    steps_HW = np.where(marked_HW, 0, 2**30).astype(np.int32)
    for axis in (0, 1):
        place = np.arange(steps_HW.shape[axis], dtype=np.int32)
        place = place[:, None] if axis == 0 else place[None]
        behind = np.minimum.accumulate(steps_HW - place, axis=axis) + place
        ahead = np.flip(np.minimum.accumulate(np.flip(steps_HW + place, axis), axis=axis), axis) - place
        steps_HW = np.minimum(behind, ahead)
    return steps_HW
