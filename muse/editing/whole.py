"""Mask-free editing, variations and upscaling: all of a picture may change (§2.4, §3.3).

A picture that is not of the model's aspect lies in the middle of one that is, whose rest repeats its rim and is kept.
Tokens that changed look different in other company, so that a picture of which any token changed is decoded whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8

from muse.canvas import LARGEST_UPSCALED, Canvas, low_unit, native, of_low
from muse.config import DecodeConfig, FreeEditConfig
from muse.editing import regions
from muse.editing.holes import known_tokens, paint
from muse.errors import UserError
from muse.settings import Row, Settings, count, number, text

if TYPE_CHECKING:
    from muse.pipeline import Muse


def edit(
    model: Muse,
    img_HWC: UInt8[np.ndarray, 'H W 3'],
    prompt: str,
    settings: Settings,
    config: FreeEditConfig,
    frames: Sequence[int],
) -> list[UInt8[np.ndarray, 'H W 3']]:
    """The picture after some of the iterations of mask-free editing; see `Muse.edit`."""
    text('prompt', prompt)
    if not isinstance(frames, Sequence):
        raise UserError(f'at is {frames!r}; give a list of iterations')
    for frame in frames:
        count('a frame', frame, 0, config.iterations)
    size, canvas = (img_HWC.shape[1], img_HWC.shape[0]), model.canvas(settings)
    box = regions.whole(size, settings.size)
    free_hw = regions.cells(np.ones(img_HWC.shape[:2], bool), canvas.low, box)
    low_hw = known_tokens(model, img_HWC, box, np.zeros(canvas.low, bool))
    decoding = DecodeConfig(
        steps=config.iterations,
        guidance_scale=config.guidance_scale,
        guidance_schedule='constant',
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    after_Khw = model.cascade.resample(low_hw, ~free_hw, Row(prompt=prompt), settings, decoding, config.share)
    edited = []
    for frame in frames:
        now_hw = after_Khw[frame - 1] if frame else low_hw
        changed_hw = now_hw != low_hw
        if not changed_hw.any():
            edited.append(img_HWC)
            continue
        high_hw = None
        if canvas.high is not None:
            high_hw = known_tokens(model, img_HWC, box, _finer(changed_hw, canvas.high), high=True)
        [drawn] = model.cascade.draw([Row(prompt=prompt, low=now_hw, high=high_hw)], settings, canvas)
        edited.append(regions.back(np.asarray(drawn.image), box, size))
    return edited


def variation(
    model: Muse, img_HWC: UInt8[np.ndarray, 'H W 3'], prompt: str, strength: float, settings: Settings
) -> UInt8[np.ndarray, 'H W 3']:
    """The picture with a random share of its tokens drawn anew; see `Muse.variation`."""
    text('prompt', prompt)
    number('strength', strength, high=1)
    size, canvas = (img_HWC.shape[1], img_HWC.shape[0]), model.canvas(settings)
    box = regions.whole(size, settings.size)
    free_hw = regions.cells(np.ones(img_HWC.shape[:2], bool), canvas.low, box)
    # The same cells come first whatever the strength; RandomState's stream is fixed for all versions of NumPy.
    order_T = np.random.RandomState(settings.seed).permutation(free_hw.size)
    order_T = order_T[free_hw.ravel()[order_T]]
    unknown_hw = np.zeros(free_hw.shape, bool)
    unknown_hw.ravel()[order_T[: round(strength * len(order_T))]] = True
    if not unknown_hw.any():
        return img_HWC
    if strength == 1:  # nothing of the picture is left, not even what repeats its rim
        unknown_hw[:] = True
    unknown_high_hw = None if canvas.high is None else _finer(unknown_hw, canvas.high)
    return paint(model, img_HWC, box, unknown_hw, unknown_high_hw, Row(prompt=prompt), settings)


def upscale(
    model: Muse, img_HWC: UInt8[np.ndarray, 'H W 3'], prompt: str, settings: Settings
) -> UInt8[np.ndarray, 'H W 3']:
    """The picture drawn by the super-res from its low-res tokens; see `Muse.upscale`."""
    text('prompt', prompt)
    factor, (height, width) = model.release.tokenizer.config.factor, img_HWC.shape[:2]
    canvas = upscaled(model, (width, height))
    assert canvas.high is not None
    box = (0, 0, canvas.low[1] * factor, canvas.low[0] * factor)
    row = Row(prompt=prompt, low=known_tokens(model, img_HWC, box, np.zeros(canvas.low, bool)))
    [drawn] = model.cascade.draw([row], settings, canvas)
    right, bottom = width * canvas.size[0] / box[2], height * canvas.size[1] / box[3]
    return np.asarray(drawn.image.crop((0, 0, round(right), round(bottom))))


def upscaled(model: Muse, size: tuple[int, int]) -> Canvas:
    """The canvas on which a picture of `size` (width, height) is upscaled.

    Raises:
        UserError: a picture too large.
    """
    factor, (rows, columns) = model.release.tokenizer.config.factor, low_unit(model.release, True)
    width, height = size
    low = math.ceil(height / (factor * rows)) * rows, math.ceil(width / (factor * columns)) * columns
    if math.prod(low) > LARGEST_UPSCALED * math.prod(native(model.release, True).low):
        side = native(model.release, False).size
        raise UserError(
            f'the picture is {width}×{height}; at most {LARGEST_UPSCALED} times the pixels of {side[0]}×{side[1]} can '
            'be upscaled: make it smaller first'
        )
    return of_low(model.release, low, True)


def _finer(marked_hw: Bool[np.ndarray, 'h w'], grid: tuple[int, int]) -> np.ndarray:
    """The high-res cells under marked low-res ones."""
    rows, columns = grid[0] // marked_hw.shape[0], grid[1] // marked_hw.shape[1]
    return marked_hw.repeat(rows, axis=0).repeat(columns, axis=1)
