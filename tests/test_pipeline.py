"""Prompts in, pictures out: what the picture depends on, what it does not, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

import muse
from muse.drawing import traces
from muse.errors import InputWarning, UserError

PROMPTS = ['a red apple', 'two green dogs on the moon', 'star']


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope='module')
def pictures(tiny_model):
    """Two pictures of each prompt, drawn together."""
    return pixels(tiny_model.generate(PROMPTS, num_images=2, seed=7))


@pytest.fixture(scope='module')
def batched_model(release_folder):
    """The same model as it runs on an accelerator: in padded batches."""
    model = muse.load(release_folder)
    model.cascade.on_cpu = False
    return model


def test_pictures_have_the_models_size_and_differ(tiny_model, pictures):
    assert pictures.shape == (6, 16, 16, 3) and pictures.dtype == np.uint8
    assert tiny_model.size == (16, 16)
    assert len({picture.tobytes() for picture in pictures}) == 6


@pytest.mark.parametrize('batch_size', [1, 3, 4])
def test_batch_size_changes_no_bit(tiny_model, pictures, batch_size):
    again = pixels(tiny_model.generate(PROMPTS, num_images=2, seed=7, batch_size=batch_size))
    np.testing.assert_array_equal(again, pictures)


@pytest.mark.parametrize(
    'batch_size', [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4]
)
def test_padded_batches_draw_the_same_tokens(batched_model, pictures, batch_size):
    again = pixels(batched_model.generate(PROMPTS, num_images=2, seed=7, batch_size=batch_size))
    # Float rounding may move a pixel by one; another token would move many.
    assert np.abs(again.astype(int) - pictures).max() <= 1


def test_batch_mates_and_long_neighbours_do_not_matter(tiny_model, pictures):
    mates = [PROMPTS[0], 'a ' * 9 + 'cat', 'two']
    again = pixels(tiny_model.generate(mates, num_images=2, seed=7))
    np.testing.assert_array_equal(again[:2], pictures[:2])
    assert (again[2:] != pictures[2:]).any()


def test_one_prompt_may_be_a_plain_string(tiny_model, pictures):
    np.testing.assert_array_equal(pixels(tiny_model.generate(PROMPTS[0], num_images=2, seed=7)), pictures[:2])


def test_every_knob_reaches_the_picture(tiny_model):
    def draw(prompt='a red apple', **knobs):
        return pixels(tiny_model.generate(prompt, **{'seed': 1, **knobs})).tobytes()

    drawn = [
        draw(),
        draw('a blue dog'),
        draw(seed=2),
        draw(steps=2),
        draw(guidance_scale=0.0),
        draw(guidance_scale=6.0),
        draw(temperature=3.0),
        draw(negative_prompt='a blue dog'),
    ]
    assert len(set(drawn)) == len(drawn)
    assert draw(negative_prompt='') == draw()
    assert draw(steps=4, guidance_scale=1.5, temperature=1.0) == draw(), 'None is not the default of the release'


def test_without_text_and_guidance_the_scale_does_not_matter(tiny_model):
    """Conditional and unconditional branch are then equal: (1 + t) · l − t · l = l, up to rounding."""
    with pytest.warns(InputWarning, match='empty'):
        blank = tiny_model.generate(' ', seed=3, guidance_scale=2.0)
    with pytest.warns(InputWarning, match='empty'):
        unguided = tiny_model.generate('', seed=3, guidance_scale=0.0)
    assert np.abs(pixels(blank).astype(int) - pixels(unguided)).max() <= 1


def test_the_negative_prompt_equal_to_the_prompt_cancels_guidance(tiny_model):
    both = tiny_model.generate('a red apple', negative_prompt='a red apple', seed=3, guidance_scale=2.0)
    unguided = tiny_model.generate('a red apple', seed=3, guidance_scale=0.0)
    assert np.abs(pixels(both).astype(int) - pixels(unguided)).max() <= 1


def test_nothing_is_compiled_twice(release_folder):
    model = muse.load(release_folder)
    before = traces['fill_base']
    model.generate(['a cat', 'a dog'], seed=1, steps=5)
    assert traces['fill_base'] == before + 1
    other = {'seed': 2, 'guidance_scale': 4.0, 'temperature': 0.5}
    model.generate(['the sun', 'two', 'three'], steps=5, **other)
    muse.load(release_folder).generate('a cat', steps=5)
    assert traces['fill_base'] == before + 1
    model.generate('a cat', steps=5, guidance_scale=0.0)
    assert traces['fill_base'] == before + 2
    for negative in ('moon', 'two dogs'):
        model.generate(['the sun', 'two'], steps=5, negative_prompt=negative, **other)
    assert traces['fill_base'] == before + 3


def test_pictures_are_streamed(tiny_model, pictures):
    stream = tiny_model.stream(PROMPTS, tiny_model.settings(seed=7), num_images=2)
    np.testing.assert_array_equal(np.asarray(next(stream)), pictures[0])


def test_tokens_and_pixels(tiny_model):
    tokens = np.arange(24).reshape(4, 6) % 64
    image = tiny_model.decode(tokens)
    assert image.size == (24, 16)
    found = tiny_model.encode(image)
    assert found.shape == (4, 6) and found.dtype == np.int32 and found.min() >= 0 and found.max() < 64
    np.testing.assert_array_equal(tiny_model.encode(np.asarray(image)), found)
    other = tiny_model.decode((tokens + 1) % 64)
    assert (np.asarray(other) != np.asarray(image)).mean() > 0.5


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({'prompts': 3}, 'prompts'),
        ({'prompts': ['a', 3]}, 'prompt 3 is a int'),
        ({'prompts': []}, 'no prompt'),
        ({'prompts': 'x' * (2**20 + 1)}, 'over the limit'),
        ({'prompts': 'a', 'negative_prompt': 3}, 'negative_prompt'),
        ({'prompts': 'a', 'num_images': 0}, 'num_images is 0'),
        ({'prompts': 'a', 'num_images': -1}, 'num_images is -1'),
        ({'prompts': 'a', 'batch_size': 0}, 'batch_size is 0'),
        ({'prompts': 'a', 'steps': 0}, 'steps is 0'),
        ({'prompts': 'a', 'steps': 2.5}, 'steps is 2.5'),
        ({'prompts': 'a', 'seed': -1}, 'seed is -1'),
        ({'prompts': 'a', 'seed': 2**32}, 'seed is 4294967296'),
        ({'prompts': 'a', 'guidance_scale': -1.0}, 'guidance_scale is -1.0'),
        ({'prompts': 'a', 'guidance_scale': float('nan')}, 'guidance_scale is nan'),
        ({'prompts': 'a', 'temperature': float('inf')}, 'temperature is inf'),
        ({'prompts': 'a', 'temperature': 'hot'}, "temperature is 'hot'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(tiny_model, arguments, said):
    with pytest.raises(UserError) as caught:
        tiny_model.generate(**arguments)
    assert said in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_wrong_tokens_and_pictures_are_refused(tiny_model):
    for tokens in (np.zeros((4, 4)), np.zeros(4, int), np.full((4, 4), 64), np.full((4, 4), -1), np.zeros((0, 4), int)):
        with pytest.raises(UserError, match='tokens'):
            tiny_model.decode(tokens)
    with pytest.raises(UserError, match='4 divides both sides'):
        tiny_model.encode(Image.new('RGB', (17, 16)))
    with pytest.raises(UserError, match='image is a list'):
        tiny_model.encode([[0]])
    with pytest.raises(UserError, match='float64'):
        tiny_model.encode(np.zeros((16, 16, 3)))


def test_a_negative_prompt_without_guidance_warns(tiny_model):
    with pytest.warns(InputWarning, match='no effect'):
        tiny_model.generate('a cat', negative_prompt='a dog', guidance_scale=0.0)


def test_the_compilation_cache_respects_a_choice_already_made(release_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'chosen'))
    before = jax.config.values['jax_compilation_cache_dir']
    try:
        jax.config.update('jax_compilation_cache_dir', None)
        muse.load(release_folder)
        assert jax.config.values['jax_compilation_cache_dir'] is None and not (tmp_path / '.cache').exists()
        monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
        muse.load(release_folder)
        assert jax.config.values['jax_compilation_cache_dir'] == str(tmp_path / '.cache' / 'muse')
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
