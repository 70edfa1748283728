"""Rows with settings of their own, the two levels together, large canvases, and the frames of a drawing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import muse
from muse.canvas import windows
from muse.config import DecodeConfig
from muse.drawing import _superres_branches, batch_of, traces
from muse.errors import UserError
from muse.pipeline import Row

ROWS = [
    Row(prompt='a red apple', seed=3, index=1),
    Row(prompt='two dogs', guidance_scale=4.0),
    Row(prompt='two dogs', guidance_scale=0.0),
    Row(prompt='two dogs', temperature=100.0),
    Row(prompt='star', negative_prompt='the moon'),
    Row(prompt='star'),
    Row(prompt='star', low=np.array([[5, -1, 7, -1]] * 4)),
]


def tokens(drawn) -> list[bytes]:
    return [each.low.tobytes() for each in drawn]


@pytest.fixture(scope='module')
def alone(tiny_model):
    """Each row drawn by itself."""
    settings = tiny_model.settings(seed=7)
    return [next(tiny_model.draw([row], settings)) for row in ROWS]


def test_rows_of_one_batch_have_their_own_settings(tiny_model, alone):
    together = list(tiny_model.draw(ROWS, tiny_model.settings(seed=7)))
    assert tokens(together) == tokens(alone) and len(set(tokens(alone))) == len(ROWS)
    for row, drawn in zip(ROWS, alone, strict=True):
        own = {'seed': 7 if row.seed is None else row.seed, 'guidance_scale': row.guidance_scale}
        settings = tiny_model.settings(temperature=row.temperature, negative_prompt=row.negative_prompt, **own)
        plain = Row(prompt=row.prompt, index=row.index, low=row.low)
        assert tokens(tiny_model.draw([plain], settings)) == [drawn.low.tobytes()]


def test_known_tokens_stay(alone):
    assert (alone[-1].low[:, [0, 2]] == [5, 7]).all() and (alone[-1].low_steps[:, :, [0, 2]] == [5, 7]).all()


def test_the_super_res_draws_over_the_bases_tokens(cascade_model):
    settings = cascade_model.settings(seed=1)
    [drawn] = cascade_model.draw([Row(prompt='a red apple')], settings)
    base = cascade_model.settings(seed=1, superres=False)
    [low] = cascade_model.draw([Row(prompt='a red apple')], base)
    np.testing.assert_array_equal(drawn.low, low.low)
    assert drawn.image.size == (32, 32) and low.image.size == (16, 16) and low.high is None
    assert np.asarray(cascade_model.decode(drawn.high, high=True)).tobytes() == np.asarray(drawn.image).tobytes()
    [over] = cascade_model.draw([Row(prompt='a red apple', low=drawn.low)], settings)
    np.testing.assert_array_equal(over.high, drawn.high)
    [other] = cascade_model.draw([Row(prompt='a red apple', low=drawn.low[::-1])], settings)
    assert (other.high != drawn.high).any()
    known = np.where(np.arange(64).reshape(8, 8) % 3 == 0, drawn.high, -1)
    [kept] = cascade_model.draw([Row(prompt='two dogs', high=known)], settings)
    assert (kept.high[known >= 0] == known[known >= 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize('model', ['tiny_model', 'cascade_model'])
def test_one_program_to_pixels_draws_what_the_steps_one_by_one_do(model, request, monkeypatch):
    """As accelerators do, rows with and without negative prompts, guidance and known tokens in one batch."""
    model = request.getfixturevalue(model)
    rows = [*ROWS[1:3], ROWS[4], ROWS[6]]
    known = np.where(np.arange(64).reshape(8, 8) % 3 == 0, 9, -1) if model.has_superres else None
    rows.append(Row(prompt='star', negative_prompt='', high=known))
    settings = model.settings(seed=7)
    alone = list(model.draw(rows, settings))
    monkeypatch.setattr(model.cascade, 'on_cpu', False)
    together = list(model.draw(rows, settings, batch_size=len(rows)))
    high = model.has_superres
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.low_steps, theirs.low_steps)
        if high:
            np.testing.assert_array_equal(ours.high_steps, theirs.high_steps)
    grids = np.stack([each.high if high else each.low for each in together])
    for ours, image in zip(together, model.cascade.pixels(grids, high=high), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.image), np.asarray(image))


def test_the_super_res_has_knobs_of_its_own(cascade_model):
    config = cascade_model.release.superres_decode
    assert cascade_model.settings().superres == config and config.steps == 3
    greedy = dataclasses.replace(config, temperature=0.0, choice_temperature=0.0, guidance_scale=0.0)
    settings = cascade_model.settings(superres=greedy)
    low = np.arange(16).reshape(4, 4)
    one, two = (next(cascade_model.draw([Row(prompt='a', low=low, seed=s)], settings)).high for s in (0, 1))
    np.testing.assert_array_equal(one, two)


def test_windows_agree_with_the_whole_where_there_is_one(cascade_model):
    """A canvas of two windows: each token's logits are the weighted mean of what the windows say about it."""
    superres = nnx.merge(cascade_model.cascade.superres.graph, cascade_model.cascade.superres.params)
    rng = np.random.default_rng(0)
    low_BT, tok_BT = rng.integers(0, 64, (1, 24)), rng.integers(0, 65, (1, 96))
    txt_GBSD = jnp.asarray(rng.normal(size=(1, 1, 24, 32)), jnp.float32)
    batch = batch_of(DecodeConfig(), txt_GBSD, np.array([[5]], np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32))
    length, whole = (
        jnp.array([5]),
        jax.jit(lambda low, tok: _superres_branches(superres, low, batch, (8, 12))(tok, length)),
    )
    window = jax.jit(lambda low, tok: superres(tok, low, txt_GBSD[0], length))
    logits = whole(low_BT, tok_BT)
    expected = np.zeros((96, 64))
    for low_t, high_t, weight_t in zip(*windows((4, 6), (4, 4), (2, 2))[1:], strict=True):
        expected[high_t] += np.asarray(window(low_BT[:, low_t], tok_BT[:, high_t])[0]) * weight_t[:, None]
    np.testing.assert_allclose(np.asarray(logits[0]), expected, rtol=1e-3, atol=1e-3)


def test_other_orders_and_limits_reach_the_picture(tiny_model):
    check_all_differ(
        tiny_model,
        {},
        {'guidance_scale': 9.0},
        {'guidance_scale': 9.0, 'guidance_interval': (0.9, 1.0)},
        {'top_k': 64, 'top_p': 0.3, 'temperature': 60.0},
        {'top_k': 4, 'top_p': 0.9999, 'temperature': 60.0},
        {'temperature': 60.0, 'final_temperature': 0.0},
        {'temperature': 60.0},
        {'choice_temperature': 0.0},
    )


@pytest.mark.slow
def test_each_of_them_alone(tiny_model):
    hot = {'temperature': 60.0}
    variants = [{'order': 'halton'}, {'order': 'random'}]
    variants += [{'guidance_schedule': 'constant'}, {'guidance_schedule': 'cosine'}]
    check_all_differ(tiny_model, {}, hot, *variants, {'top_p': 0.3, **hot}, {'top_k': 4, **hot}, {'schedule': 'cubic'})


def check_all_differ(model, *variants):
    drawn = []
    for knobs in variants:
        settings = model.settings(seed=2, decoding=dataclasses.replace(model.release.decode, **knobs))
        drawn += tokens(model.draw([Row(prompt='a red apple')], settings))
    assert len(set(drawn)) == len(variants)


def test_halton_fills_in_its_order(tiny_model):
    decoding = dataclasses.replace(tiny_model.release.decode, order='halton')
    [drawn] = tiny_model.draw([Row(prompt='a')], tiny_model.settings(decoding=decoding))
    from muse.decode import halton_order

    order_hw = halton_order((4, 4)).reshape(4, 4)
    for step_hw in drawn.low_steps:
        known = step_hw < 64
        assert (known == (order_hw < known.sum())).all()


def test_other_values_of_the_knobs_compile_nothing(tiny_model):
    own = dataclasses.replace(tiny_model.release.decode, top_k=3, top_p=0.9, guidance_interval=(0.1, 0.9))
    tiny_model.generate('a', decoding=own)
    before = traces.total()
    other = dataclasses.replace(
        own, top_k=9, top_p=0.2, guidance_interval=(0.0, 0.5), final_temperature=0.1, choice_temperature=0.0
    )
    tiny_model.generate('a dog', decoding=other, seed=5, guidance_scale=2.0, temperature=0.3)
    assert traces.total() == before


def test_frames_show_the_picture_as_it_is_filled(tiny_model, cascade_model):
    [drawn] = tiny_model.draw([Row(prompt='a dog')], tiny_model.settings(steps=4))
    frames = tiny_model.frames(drawn)
    assert len(frames) == 4 and np.array_equal(np.asarray(frames[-1]), np.asarray(drawn.image))
    grey = [(np.asarray(frame) == 128).all(-1) for frame in frames]
    for shown, step_hw in zip(grey, drawn.low_steps, strict=True):
        np.testing.assert_array_equal(shown | False, np.kron(step_hw == 64, np.ones((4, 4), bool)))
    [drawn] = cascade_model.draw([Row(prompt='a dog')], cascade_model.settings())
    frames = cascade_model.frames(drawn)
    assert len(frames) == 4 + 3 and {frame.size for frame in frames} == {(32, 32)}
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(drawn.image))


def test_wrong_rows_are_refused_before_anything_is_drawn(tiny_model):
    settings = tiny_model.settings()
    for row, said in (
        (Row(prompt=3), 'prompt 3'),  # pyright: ignore[reportArgumentType]
        (Row(prompt='a', seed=-1), 'seed is -1'),
        (Row(prompt='a', index=-1), 'index is -1'),
        (Row(prompt='a', guidance_scale=-2.0), 'guidance_scale is -2'),
        (Row(prompt='a', temperature=float('nan')), 'temperature is nan'),
        (Row(prompt='a', negative_prompt=4), 'negative_prompt 4'),  # pyright: ignore[reportArgumentType]
        (Row(prompt='a', low=np.zeros((3, 4), int)), 'low tokens are int64'),
        (Row(prompt='a', low=np.zeros((4, 4))), 'low tokens are float64'),
        (Row(prompt='a', low=np.full((4, 4), 64)), 'low tokens run from 64'),
        (Row(prompt='a', low=np.full((4, 4), -2)), 'low tokens run from -2'),
    ):
        with pytest.raises(UserError, match=said):
            tiny_model.draw([Row(prompt='a'), row], settings)
    with pytest.raises(UserError, match='batch_size is 0'):
        tiny_model.draw([], settings, batch_size=0)
    assert list(tiny_model.draw([], settings)) == []


@pytest.mark.slow
def test_rows_are_spread_over_the_devices_of_a_host(release_folder, alone):
    """As on accelerators, with virtual CPU devices; the second batch is filled up."""
    model = muse.load(release_folder)
    devices = jax.devices()[:2]
    model.cascade.on_cpu, model.cascade._mesh = False, Mesh(np.array(devices), ('data',))
    together = list(model.draw(ROWS, model.settings(seed=7), batch_size=4))
    assert tokens(together) == tokens(alone)
