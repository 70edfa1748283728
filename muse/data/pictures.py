"""Any picture, however stored, to RGB uint8: whole (`open_picture`) or as a square of one size for training.

Grey, palette, CMYK and 16-bit pictures become RGB; transparency is laid over white; EXIF rotation is applied; of an
animation the first frame is taken, with a warning. Size is checked in the header, before any pixel is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from muse.errors import UserError, warn

MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')

Picture = Image.Image | np.ndarray | str | Path  # of any mode, uint8 pixels [H, W, 3], or a file's path

_ALPHA_MODES = ('RGBA', 'RGBa', 'LA', 'La', 'PA')


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why."""


def open_picture(source: Picture | bytes) -> np.ndarray:
    """The pixels of a picture at its own size.

    Args:
        source: a path, a file's bytes, a PIL picture of any mode, or uint8 pixels [H, W, 3].

    Returns:
        uint8 [H, W, 3], at least 1x1, as a person would see it: upright, over white.

    Raises:
        UserError: no such file, not a picture, truncated, over MAX_PIXELS pixels or MAX_SIDE on a side (both checked
            before decoding), or an array of another shape or type.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or not source.size:
            raise UserError(f'pixels are {source.dtype} {list(source.shape)}: give uint8 [height, width, 3], 0 to 255')
        return source
    where = f"picture '{' '.join(str(source).split())}'" if isinstance(source, str | Path) else 'the picture'
    if isinstance(source, str | Path) and not os.path.isfile(source):  # False for a name that is too long as well
        raise UserError(f'{where} does not exist: give the path of a picture file')
    try:
        with _opened(Path(source) if isinstance(source, str) else source, where) as picture:
            return np.asarray(to_rgb(ImageOps.exif_transpose(picture)))
    except BadPicture as error:
        raise UserError(f'{where} cannot be used ({error}): give a whole picture file, e.g. PNG or JPEG') from None


def picture_files(folder: str | Path) -> list[Path]:
    """Every picture file below a folder, by its ending, in order of their names.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"folder of pictures '{folder}' does not exist: give a folder that holds pictures")
    found = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"'{folder}' holds no pictures: give a folder of {', '.join(SUFFIXES)} files")
    return found


def read_picture(source: bytes | Path, image_size: int, min_side: int = 0) -> np.ndarray:
    """Decodes a picture of any mode, fits its short side to `image_size` and crops its middle.

    Args:
        source: a file's bytes or its path.
        image_size: side of the result in pixels.
        min_side: fewest pixels on the shorter side.

    Returns:
        uint8 [image_size, image_size, 3].

    Raises:
        BadPicture: as `open_picture` refuses, or too small, for a training set to skip.
    """
    with _opened(source, 'a picture' if isinstance(source, bytes) else f"picture '{source}'") as picture:
        check_size(*picture.size, min_side)
        picture.draft('RGB', (image_size, image_size))  # JPEG: decodes at the smallest sufficient scale
        return fit(ImageOps.exif_transpose(picture), image_size)


@contextlib.contextmanager
def _opened(source: bytes | Path | Image.Image, where: str) -> Iterator[Image.Image]:
    """A picture whose size is checked and whose pixels are not decoded yet; what then fails becomes BadPicture."""
    try:
        if isinstance(source, Image.Image):
            check_size(*source.size)
            yield source
            return
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            check_size(*picture.size)
            # A phone's JPEG may hold a second picture (MPO) and is no animation.
            if (frames := getattr(picture, 'n_frames', 1)) > 1 and picture.format != 'MPO':
                warn(f'{where} has {frames} frames: the first is used')
            yield picture
    except BadPicture:
        raise
    except UnidentifiedImageError:  # its own message holds an address in memory
        raise BadPicture('it is no picture file, or cut off in its first bytes') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own check of the header
        raise BadPicture(f'it is over {MAX_PIXELS // 1_000_000} million pixels') from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadPicture((str(error).splitlines() or [type(error).__name__])[0]) from None


def check_size(width: int, height: int, min_side: int = 0) -> None:
    """Raises BadPicture for more pixels or a longer side than are ever decoded, or a side under `min_side`."""
    if width * height > MAX_PIXELS:
        raise BadPicture(f'{width}x{height} is over {MAX_PIXELS // 1_000_000} million pixels')
    if max(width, height) > MAX_SIDE:
        raise BadPicture(f'{width}x{height} is over {MAX_SIDE} pixels on a side')
    if min(width, height) < min_side:
        raise BadPicture(f'{width}x{height} is under {min_side} pixels on its shorter side')


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
