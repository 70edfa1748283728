"""Mask-free editing, variations and upscaling (§2.4, §3.3)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny import watch_draws

from muse.config import FreeEditConfig
from muse.drawing import traces
from muse.errors import InputWarning, UserError

RNG = np.random.default_rng(1)
FREE = FreeEditConfig(iterations=6, share=0.25)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def bits(image: Image.Image) -> bytes:
    return np.asarray(image).tobytes()


@pytest.mark.parametrize(
    ('name', 'size'), [('tiny_model', (16, 16)), ('tiny_model', (30, 9)), ('cascade_model', (32, 32))]
)
def test_strength_zero_is_the_picture_without_passing_the_tokenizer(name, size, request):
    model, image = request.getfixturevalue(name), noise(*size)
    before = traces.total()
    assert bits(model.variation(image, 'a', strength=0)) == bits(image)
    assert traces.total() == before


@pytest.mark.parametrize('name', ['tiny_model', 'cascade_model'])
def test_strength_one_ignores_the_picture(name, request):
    model = request.getfixturevalue(name)
    one, other = noise(*model.size), noise(*model.size)
    drawn = model.generate('a dog', seed=4)[0]
    assert bits(model.variation(one, 'a dog', strength=1, seed=4)) == bits(drawn)
    assert bits(model.variation(other, 'a dog', strength=1.0, seed=4)) == bits(drawn)
    long = [bits(model.variation(noise(50, 20), 'a dog', strength=1, seed=4)) for _ in range(2)]
    assert long[0] == long[1]


def test_strength_says_how_many_tokens_are_drawn_and_the_seed_which(tiny_model, monkeypatch):
    image, seen = noise(16, 16), watch_draws(monkeypatch, tiny_model)

    def unknown(strength, seed):
        tiny_model.variation(image, 'a', strength=strength, seed=seed)
        return seen[-1].low == -1

    quarter, half, other = unknown(0.25, 0), unknown(0.5, 0), unknown(0.5, 1)
    assert quarter.sum() == 4 and half.sum() == 8 and other.sum() == 8
    assert not (quarter & ~half).any() and (half != other).any()


def test_an_edit_changes_the_picture_step_by_step_towards_the_prompt(tiny_model):
    image, free = noise(20, 16), dataclasses.replace(FREE, temperature=300.0)
    frames = tiny_model.edit_frames(image, 'a dog', [0, 1, 3, 6], free=free, seed=1)
    assert bits(frames[0]) == bits(image)
    assert [frame.size for frame in frames] == [(20, 16)] * 4
    assert len({bits(frame) for frame in frames}) == 4
    assert bits(tiny_model.edit(image, 'a dog', free=free, seed=1)) == bits(frames[-1])
    knobs = {'share': 0.5, 'guidance_scale': 0.1, 'temperature': 0.5, 'top_k': 30, 'top_p': 0.6}
    others = [
        tiny_model.edit(image, 'a red apple', free=free, seed=1),
        tiny_model.edit(image, 'a dog', free=free, seed=2),
        tiny_model.edit(image, 'a dog', free=free, seed=1, negative_prompt='a cat'),
        *(
            tiny_model.edit(image, 'a dog', free=dataclasses.replace(free, **{knob: value}), seed=1)
            for knob, value in knobs.items()
        ),
    ]
    assert len({bits(picture) for picture in (*others, frames[-1])}) == len(others) + 1


def test_the_first_iterations_do_not_depend_on_how_many_follow(tiny_model):
    image = noise(16, 16)
    long = tiny_model.edit_frames(image, 'a dog', [2], free=FREE, seed=1)[0]
    short = tiny_model.edit(image, 'a dog', free=dataclasses.replace(FREE, iterations=2), seed=1)
    assert bits(long) == bits(short)


def test_an_edit_of_the_cascade_keeps_fine_tokens_where_the_base_changed_nothing(cascade_model, monkeypatch):
    image, seen = noise(32, 32), watch_draws(monkeypatch, cascade_model)
    edited = cascade_model.edit(image, 'a dog', free=dataclasses.replace(FREE, share=0.06))
    small = image.resize((16, 16), Image.Resampling.LANCZOS)
    changed = seen[-1].low != cascade_model.encode(small)
    assert 1 <= changed.sum() <= 6 and edited.size == (32, 32)
    np.testing.assert_array_equal(seen[-1].high == -1, np.kron(changed, np.ones((2, 2), bool)))


def test_other_edits_compile_nothing_new(tiny_model):
    tiny_model.edit(noise(16, 16), 'a dog', free=FREE)
    before = traces.total()
    free = dataclasses.replace(FREE, share=0.4, guidance_scale=2.0, temperature=0.5, top_k=9)
    tiny_model.edit(noise(31, 8), 'a cat', free=free, seed=8, negative_prompt='a dog')
    assert traces.total() == before


@pytest.mark.parametrize('size', [pytest.param((16, 24), marks=pytest.mark.slow), (9, 14)])  # slow: in windows
def test_upscaling_doubles_the_picture(cascade_model, size):
    image = noise(*size)
    large = cascade_model.upscale(image, seed=1)
    assert large.size == (2 * size[0], 2 * size[1])
    assert bits(large) != bits(cascade_model.upscale(image, seed=2))


def test_upscaling_follows_the_picture(cascade_model):
    """The same as drawing over the low-res tokens of the picture, by hand."""
    from muse.pipeline import Row

    image = noise(16, 16)
    row = Row(prompt='a dog', low=cascade_model.encode(image))
    [drawn] = cascade_model.draw([row], cascade_model.settings(seed=3))
    assert bits(cascade_model.upscale(image, 'a dog', seed=3)) == bits(drawn.image)
    assert bits(cascade_model.upscale(noise(16, 16), 'a dog', seed=3)) != bits(drawn.image)


def test_wrong_input(tiny_model, cascade_model):
    image = noise(16, 16)
    with pytest.raises(UserError, match='holds no super-res') as caught:
        tiny_model.upscale(image)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='the picture is 65×16'):
        cascade_model.upscale(noise(65, 16))
    for strength in (-0.1, 1.1, float('nan'), '1'):
        with pytest.raises(UserError, match='strength is'):
            tiny_model.variation(image, 'a', strength=strength)
    for at in (-1, 7, 1.5):
        with pytest.raises(UserError, match='frame is'):
            tiny_model.edit_frames(image, 'a', [at], free=FREE)
    for knob, value in {'iterations': 0, 'share': 0.0, 'top_k': -1, 'top_p': 0, 'guidance_scale': -1}.items():
        with pytest.raises(UserError, match=f'{knob} is'):
            tiny_model.edit(image, 'a', free=dataclasses.replace(FREE, **{knob: value}))
    with pytest.raises(UserError, match='prompt 3'):
        tiny_model.edit(image, 3, free=FREE)


def picture_files(folder):
    """Files of every kind a user may have, and what they show; two pixels, left red and right blue."""
    red, blue = [255, 0, 0], [0, 0, 255]
    plain = Image.fromarray(np.array([[red, blue]], np.uint8))
    grey = Image.fromarray(np.array([[0, 65535]], np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be seen turned by 90° clockwise
    files = {
        'plain': (plain, {}, [[red, blue]]),
        'palette': (plain.convert('P'), {}, [[red, blue]]),
        'deep': (grey, {}, [[[0] * 3, [255] * 3]]),
        'alpha': (Image.fromarray(np.array([[[*red, 255], [*blue, 0]]], np.uint8)), {}, [[red, [255] * 3]]),
        'turned': (plain, {'exif': turned}, [[red], [blue]]),
    }
    for name, (picture, more, shown) in files.items():
        picture.save(folder / f'{name}.png', **more)
        yield folder / f'{name}.png', np.array(shown, np.uint8)
    plain.convert('CMYK').save(folder / 'cmyk.tif')
    yield folder / 'cmyk.tif', np.array([[red, blue]], np.uint8)


def test_pictures_of_every_kind_are_taken(tiny_model, tmp_path):
    for path, shown in picture_files(tmp_path):
        found = tiny_model.variation(path, 'a', strength=0)
        np.testing.assert_array_equal(np.asarray(found), shown, err_msg=path.name)
        with Image.open(path) as opened:
            assert bits(tiny_model.variation(opened, 'a', strength=0)) == bits(found)


def test_pictures_that_cannot_be_used_are_refused(tiny_model, tmp_path):
    noise(64, 64).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:3000])
    (tmp_path / 'text.png').write_text('no picture')
    Image.new('1', (20_000, 10)).save(tmp_path / 'wide.png')
    for name, said in {
        'cut': 'cannot be used',
        'text': 'cannot be used',
        'wide': '16384',
        'none': 'does not exist',
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            tiny_model.variation(tmp_path / f'{name}.png', 'a', strength=0)
        assert '\n' not in str(caught.value)
    frames = [noise(8, 8), noise(8, 8)]
    frames[0].save(tmp_path / 'moving.gif', save_all=True, append_images=frames[1:])
    with pytest.warns(InputWarning, match='2 frames'):
        assert tiny_model.variation(tmp_path / 'moving.gif', 'a', strength=0).size == (8, 8)
