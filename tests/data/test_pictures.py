"""Any picture becomes the right RGB pixels, or a clear refusal."""

import io

import numpy as np
import pytest
from PIL import Image

from muse.data.pictures import BadPicture, read_picture, to_rgb


def encoded(picture: Image.Image, format: str = 'PNG', **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def halves(mode: str, left, right, size: tuple[int, int] = (40, 40)) -> Image.Image:
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


PALETTE = halves('RGB', (255, 0, 0), (0, 0, 255)).convert('P', palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    'data, left, right',
    [
        (encoded(halves('RGB', (255, 0, 0), (0, 0, 255))), (255, 0, 0), (0, 0, 255)),
        (encoded(halves('L', 20, 200)), (20, 20, 20), (200, 200, 200)),
        (encoded(halves('1', 0, 1)), (0, 0, 0), (255, 255, 255)),
        (encoded(halves('LA', (20, 255), (20, 0))), (20, 20, 20), (255, 255, 255)),
        (encoded(halves('RGBA', (255, 0, 0, 255), (255, 0, 0, 51))), (255, 0, 0), (255, 204, 204)),
        (encoded(PALETTE), (255, 0, 0), (0, 0, 255)),
        (encoded(PALETTE, transparency=PALETTE.getpixel((39, 0))), (255, 0, 0), (255, 255, 255)),
        (encoded(halves('CMYK', (0, 255, 255, 0), (255, 255, 0, 0)), 'TIFF'), (255, 0, 0), (0, 0, 255)),
        (encoded(Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))), (100,) * 3, (100,) * 3),
        (encoded(Image.fromarray(np.full((8, 8), 0.2, np.float32)), 'TIFF'), (51,) * 3, (51,) * 3),
    ],
    ids=['rgb', 'grey', 'bits', 'grey-alpha', 'rgba', 'palette', 'palette-alpha', 'cmyk', '16-bit', 'float'],
)
def test_modes(data, left, right):
    img = read_picture(data, 16)
    assert img.shape == (16, 16, 3) and img.dtype == np.uint8
    np.testing.assert_allclose(img[:, 1], np.broadcast_to(left, (16, 3)), atol=1)
    np.testing.assert_allclose(img[:, -2], np.broadcast_to(right, (16, 3)), atol=1)


def test_short_side_fits_and_the_middle_is_kept():
    wide = Image.new('RGB', (90, 30), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 30, 30))
    wide.paste((0, 0, 255), (60, 0, 90, 30))
    for picture in (wide, wide.rotate(90, expand=True)):
        img = read_picture(encoded(picture), 20)
        assert (img[3:-3, 3:-3] == (0, 255, 0)).all()


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    img = read_picture(encoded(halves('RGB', (255, 0, 0), (0, 0, 255)), 'PNG', exif=exif), 16)
    assert (img[2] == (255, 0, 0)).all() and (img[-3] == (0, 0, 255)).all()


def test_jpeg_draft_keeps_enough_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).resize((1024, 1024))
    img = read_picture(encoded(noise, 'JPEG', quality=95), 64)
    np.testing.assert_allclose(img.astype(float), np.asarray(noise.resize((64, 64), Image.Resampling.BOX)), atol=40)


def test_huge_picture_is_refused_before_decoding():
    head = encoded(Image.new('1', (9000, 8000)))[:2000]  # truncated: decoding it would say so
    with pytest.raises(BadPicture, match='9000x8000 is over 64 million'):
        read_picture(head, 16)


@pytest.mark.parametrize('data', [b'', b'not a picture', encoded(PALETTE)[:60]])
def test_broken_pictures(data):
    with pytest.raises(BadPicture):
        read_picture(data, 16)


def test_rgb_is_left_alone():
    picture = Image.new('RGB', (4, 4), (1, 2, 3))
    assert to_rgb(picture) is picture
