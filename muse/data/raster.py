"""Draws the art: SVG or WebP bytes to WebP files with transparency, in a pool of processes.

Kept apart from the dataset builder, for worker processes import this module and should not load TFDS with it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import Image

from muse.errors import UserError

SIDE = 512
_LOSSLESS_LIMIT_BYTES = 48 * 1024  # gradients and blurs above it are stored at quality 92


def draw_svg(svg: bytes, side: int) -> Image.Image:
    """Rasterises an SVG to an RGBA picture of side x side pixels.

    Raises:
        UserError: resvg_py is not installed.
        ValueError: not a drawable SVG.
    """
    try:
        import resvg_py
    except ImportError:
        raise UserError('resvg_py is not installed: pip install resvg_py (it draws the SVG art)') from None
    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert('RGBA')


def draw(data: bytes, side: int) -> Image.Image:
    """RGBA picture of an SVG (side x side pixels) or of a picture file (its own size, unless larger than `side`)."""
    if data.startswith(b'<svg'):
        return draw_svg(data, side)
    picture = Image.open(io.BytesIO(data)).convert('RGBA')
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def webp(picture: Image.Image) -> bytes:
    """A WebP file with transparency: lossless where that is small, else at quality 92."""
    file = io.BytesIO()
    picture.save(file, 'WEBP', lossless=True, method=2, quality=30)
    if file.tell() > _LOSSLESS_LIMIT_BYTES:
        file = io.BytesIO()
        picture.save(file, 'WEBP', quality=92, alpha_quality=100, method=4)
    return file.getvalue()


def draw_webp(data: bytes) -> bytes:
    """WebP file of one piece of art; b'' when it cannot be drawn or comes out empty."""
    try:
        if data.startswith(b'RIFF'):
            with Image.open(io.BytesIO(data)) as picture:
                # Decodes all of it, so that a truncated file fails here.
                visible = picture.convert('RGBA').getchannel('A').getextrema()[1]
            return data if visible else b''
        picture = draw(data, SIDE)
    except (ValueError, OSError, SyntaxError):
        return b''
    return webp(picture) if picture.getchannel('A').getextrema()[1] else b''


def parallel_map(
    function: Callable[[Any], Any], items: Iterable[Any], *, total: int, workers: int, what: str
) -> Iterator[Any]:
    """Yields function(item) in order, from `workers` processes (1: this one), with progress on stderr."""
    began, last = time.monotonic(), 0.0
    with _mapper(workers) as mapped:
        for done, result in enumerate(mapped(function, items), start=1):
            yield result
            now = time.monotonic()
            if now - last > 5 or done == total:
                rate = done / (now - began)
                print(f'{what}: {done}/{total}, {rate:.0f}/s, {(total - done) / rate:.0f} s left', file=sys.stderr)
                last = now


class _mapper:
    """A pool's imap, or the plain map for one worker."""

    def __init__(self, workers: int):
        # spawn: forking a process that already runs threads (TFDS, JAX) can deadlock.
        self._pool = multiprocessing.get_context('spawn').Pool(workers) if workers > 1 else None

    def __enter__(self) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]:
        pool = self._pool
        return map if pool is None else lambda function, items: pool.imap(function, items, chunksize=8)

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def default_workers() -> int:
    """All cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
