"""Any picture becomes the right RGB pixels, or a clear refusal."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from muse.data.pictures import BadPicture, open_picture, picture_files, read_picture, to_rgb
from muse.errors import InputWarning, UserError


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


def test_open_picture_keeps_the_size_and_reads_bytes_paths_pil_and_pixels(tmp_path):
    picture = halves('RGBA', (255, 0, 0, 255), (255, 0, 0, 51), (7, 5))
    expected = np.full((5, 7, 3), (255, 204, 204), np.uint8)
    expected[:, :3] = (255, 0, 0)
    (tmp_path / 'a.png').write_bytes(encoded(picture))
    for source in (encoded(picture), tmp_path / 'a.png', str(tmp_path / 'a.png'), picture, expected):
        found = open_picture(source)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
    assert open_picture(Image.new('L', (1, 1), 9)).tolist() == [[[9, 9, 9]]]


def test_open_picture_turns_as_the_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 8  # shown turned by 90 degrees counter-clockwise: left becomes bottom
    turned = Image.open(io.BytesIO(encoded(halves('RGB', (255, 0, 0), (0, 0, 255), (6, 4)), 'PNG', exif=exif)))
    found = open_picture(turned)
    assert found.shape == (6, 4, 3) and (found[-1] == (255, 0, 0)).all() and (found[0] == (0, 0, 255)).all()


def test_sixteen_bits_are_scaled_and_not_cut():
    steps = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert open_picture(encoded(Image.fromarray(steps)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_first_frame_of_an_animation_with_a_warning(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    (tmp_path / 'a.webp').write_bytes(
        encoded(frames[0], 'WEBP', save_all=True, append_images=frames[1:], lossless=True)
    )
    with pytest.warns(InputWarning, match=r"picture '.*a\.webp' has 3 frames: the first is used"):
        assert (open_picture(tmp_path / 'a.webp') == (255, 0, 0)).all()


@pytest.mark.parametrize(
    'source, message',
    [
        ('nowhere.png', "picture 'nowhere.png' does not exist"),
        (b'not a picture', 'the picture cannot be used'),
        (encoded(Image.effect_noise((64, 64), 50))[:900], 'the picture cannot be used .*truncated'),
        (encoded(Image.effect_noise((64, 64), 50).convert('RGB'), 'JPEG')[:900], 'truncated'),
        (Image.new('1', (20_000, 2)), '20000x2 is over 16384 pixels on a side'),
        (np.zeros((4, 4), np.uint8), r'pixels are uint8 \[4, 4\]'),
        (np.zeros((4, 4, 3), np.float32), 'pixels are float32'),
    ],
    ids=['missing', 'text', 'png', 'jpeg', 'wide', 'grey array', 'float array'],
)
def test_open_picture_refuses_in_one_line(source, message):
    with pytest.raises(UserError, match=message) as error:
        open_picture(source)
    assert '\n' not in str(error.value)


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


@pytest.mark.parametrize('width, height, message', [(20_000, 50, 'on a side'), (30_000, 30_000, '64 million')])
def test_absurd_sizes_are_refused_from_the_header_alone(width, height, message):
    head = struct.pack('>I4sIIBBBBB', 13, b'IHDR', width, height, 1, 0, 0, 0, 0)
    png = b'\x89PNG\r\n\x1a\n' + head + struct.pack('>I', zlib.crc32(head[4:]))
    png += struct.pack('>I4sI', 0, b'IDAT', zlib.crc32(b'IDAT'))
    with pytest.raises(UserError, match=message):
        open_picture(png)


@pytest.mark.parametrize('data', [b'', b'not a picture', encoded(PALETTE)[:60]])
def test_broken_pictures(data):
    with pytest.raises(BadPicture):
        read_picture(data, 16)


def test_rgb_is_left_alone():
    picture = Image.new('RGB', (4, 4), (1, 2, 3))
    assert to_rgb(picture) is picture


def test_picture_files(tmp_path):
    with pytest.raises(UserError, match='holds no pictures'):
        picture_files(tmp_path)
    (tmp_path / 'b').mkdir()
    for name in ('b/2.PNG', 'b/notes.txt', '1.jpeg'):
        (tmp_path / name).write_bytes(b'')
    assert picture_files(tmp_path) == [tmp_path / '1.jpeg', tmp_path / 'b' / '2.PNG']
    with pytest.raises(UserError, match='does not exist'):
        picture_files(tmp_path / 'c')


@pytest.mark.parametrize('name', ['x' * 300, 'a\0b', '\udcff' * 3])
def test_a_name_that_no_file_can_have_does_not_exist(name, tmp_path):
    with pytest.raises(UserError, match='does not exist: give'):
        open_picture(tmp_path / name)
    with pytest.raises(UserError, match='does not exist: give'):
        picture_files(tmp_path / name)
