"""Any picture file to the pixels a model is trained on: RGB uint8, square, of one size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000

_ALPHA_MODES = ('RGBA', 'RGBa', 'LA', 'La', 'PA')


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why."""


def read_picture(source: bytes | Path, image_size: int) -> np.ndarray:
    """Decodes a picture of any mode, fits its short side to `image_size` and crops its middle.

    Grey, palette, CMYK and 16-bit pictures become RGB; transparency is laid over white; EXIF rotation is applied.

    Args:
        source: a file's bytes or its path.
        image_size: side of the result in pixels.

    Returns:
        uint8 [image_size, image_size, 3].

    Raises:
        BadPicture: not a picture, truncated, or of more than 64 million pixels (checked before decoding).
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadPicture(f'{width}x{height} is over {MAX_PIXELS // 1_000_000} million pixels')
            picture.draft('RGB', (image_size, image_size))  # JPEG: decodes at the smallest sufficient scale
            return fit(ImageOps.exif_transpose(picture), image_size)
    except BadPicture:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadPicture(str(error) or type(error).__name__) from None
    except Image.DecompressionBombWarning as error:  # an error only where the user's warning filter says so
        raise BadPicture(str(error)) from None


def fit(picture: Image.Image, image_size: int) -> np.ndarray:
    """The centre square of a picture at image_size, uint8 [image_size, image_size, 3]."""
    picture = to_rgb(picture)
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    if side != image_size or picture.width != picture.height:
        picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB over white, from any mode."""
    if picture.mode in ('I', 'F') or picture.mode.startswith('I;16'):
        picture = Image.fromarray(_grey_to_uint8(np.asarray(picture)))
    if picture.mode in _ALPHA_MODES or 'transparency' in picture.info:
        picture = picture.convert('RGBA')
        white = Image.new('RGB', picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel('A'))
        return white
    return picture if picture.mode == 'RGB' else picture.convert('RGB')


def _grey_to_uint8(grey_HW: np.ndarray) -> np.ndarray:
    """16-bit integers, or floats in [0, 1] or [0, 255], to bytes."""
    values = grey_HW.astype(np.float64)
    largest = 65535.0 if grey_HW.dtype.kind in 'iu' else 1.0 if values.max(initial=0) <= 1 else 255.0
    scale = 255 / largest
    return np.clip(np.nan_to_num(values * scale), 0, 255).round().astype(np.uint8)
