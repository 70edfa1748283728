"""Sheets of pictures for people to look at, with captions under the pictures if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from muse.errors import UserError

_GAP = 4
_GROUND = (255, 255, 255)
_INK = (40, 40, 40)


def grid(img_NHWC: UInt8[np.ndarray, 'N H W 3'], *, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Lays pictures out row by row on white.

    Args:
        img_NHWC: the pictures, uint8.
        columns: pictures a row; the last row may be shorter.
        captions: one a picture, wrapped under it and cut with an ellipsis after three lines.

    Raises:
        UserError: no pictures, fewer than one column, or another number of captions than pictures.
    """
    number, height, width = img_NHWC.shape[:3]
    if number == 0 or columns < 1:
        raise UserError(f'a grid of {number} pictures in {columns} columns: both must be at least 1')
    if captions is not None and len(captions) != number:
        raise UserError(f'{len(captions)} captions for {number} pictures: give one for each')
    columns = min(columns, number)
    size = max(10, min(16, width // 12))
    font = ImageFont.load_default(size=size)
    texts = ['\n'.join(_wrap(caption, font, width)) for caption in captions or [''] * number]
    line = _GAP + int(size * 1.2)
    below = max(text.count('\n') + 1 for text in texts) * line if captions else 0
    rows = -(-number // columns)
    sheet = Image.new('RGB', (columns * (width + _GAP) + _GAP, rows * (height + below + _GAP) + _GAP), _GROUND)
    ink = ImageDraw.Draw(sheet)
    for i, (pixels_HWC, text) in enumerate(zip(img_NHWC, texts, strict=True)):
        x = _GAP + i % columns * (width + _GAP)
        y = _GAP + i // columns * (height + below + _GAP)
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels_HWC)), (x, y))
        for row, words in enumerate(text.split('\n')):
            ink.text((x, y + height + row * line), words, fill=_INK, font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int = 3) -> list[str]:
    """Words broken into at most `lines` lines of `width` pixels."""
    found = ['']
    for word in text.split():
        longer = f'{found[-1]} {word}'.strip()
        if found[-1] and font.getlength(longer) > width:
            found.append(word)
        else:
            found[-1] = longer
    if len(found) > lines:
        found = found[:lines]
        found[-1] += ' …'
    for i, words in enumerate(found):
        while words and font.getlength(words) > width:  # one word wider than the picture
            words = words[:-2].rstrip(' …') + '…' if len(words) > 2 else ''
        found[i] = words
    return found
