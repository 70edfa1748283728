"""What may lie beside pictures: a sheet of all of them, the steps of a decode as a GIF, tokens, before and after."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from muse.errors import UserError
from muse.evals.grids import grid

MAX_GRID = 1000  # pictures on one sheet
_SHEET_PIXELS = 32_000_000  # pictures are made smaller where a sheet would hold more
_STEP_MS, _LAST_MS = 120, 2000
_STRIP_HEIGHT, _GAP = 512, 8


def check_grid(pictures: int) -> None:
    """Raises UserError for more pictures than a sheet takes."""
    if pictures > MAX_GRID:
        raise UserError(f'--grid is for up to {MAX_GRID} pictures, not {pictures}: leave it out, or draw fewer')


def sheet(pictures: Iterator[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """All pictures on white, with captions. Those of another size than the largest lie in the middle of their cell.

    Only small copies are kept, so that the sheet bounds the memory.
    """
    side = math.isqrt(_SHEET_PIXELS // max(1, len(captions)))
    kept = []
    for picture in pictures:
        picture = picture.convert('RGB')
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        kept.append(picture)
    width, height = max(picture.width for picture in kept), max(picture.height for picture in kept)
    cells = []
    for picture in kept:
        cell = Image.new('RGB', (width, height), 'white')
        cell.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        cells.append(np.asarray(cell))
    return grid(np.stack(cells), columns=columns, captions=captions)


def gif(frames: Sequence[Image.Image]) -> bytes:
    """An endless GIF; the last frame stays longer."""
    stream = io.BytesIO()
    times = [_STEP_MS] * (len(frames) - 1) + [_LAST_MS]
    frames[0].save(stream, format='GIF', save_all=True, append_images=frames[1:], duration=times, loop=0)
    return stream.getvalue()


def tokens(low: np.ndarray, high: np.ndarray | None) -> bytes:
    """An .npz of 'low' and, where a super-res drew, 'high': int32 [rows, columns]."""
    stream = io.BytesIO()
    if high is None:
        np.savez_compressed(stream, low=low)
    else:
        np.savez_compressed(stream, low=low, high=high)
    return stream.getvalue()


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on white, all of the height of the highest, 512 at most."""
    height = min(_STRIP_HEIGHT, max(picture.height for picture in pictures))
    scaled = [
        picture.convert('RGB').resize((max(1, round(picture.width * height / picture.height)), height))
        for picture in pictures
    ]
    whole = Image.new('RGB', (sum(picture.width + _GAP for picture in scaled) - _GAP, height), 'white')
    left = 0
    for picture in scaled:
        whole.paste(picture, (left, 0))
        left += picture.width + _GAP
    return whole
