"""Knobs: what is refused, and what is said and done all the same."""

from __future__ import annotations

import dataclasses
import json

import pytest

from muse.config import DecodeConfig
from muse.errors import InputWarning, UserError
from muse.settings import decoding


@pytest.mark.parametrize(
    ('knobs', 'said'),
    [
        ({'steps': 0}, 'steps is 0'),
        ({'steps': -3}, 'steps is -3'),
        ({'steps': 10_001}, 'steps is 10001'),
        ({'steps': 2.0}, 'steps is 2.0'),
        ({'guidance_scale': -1.0}, 'guidance_scale is -1.0'),
        ({'guidance_scale': float('inf')}, 'guidance_scale is inf; give a number from 0 to 1,000,000'),
        ({'guidance_schedule': 'constnat'}, "guidance_schedule is 'constnat'; did you mean 'constant'"),
        ({'guidance_interval': (0.5, 0.2)}, 'must not lie behind'),
        ({'guidance_interval': 0.5}, 'guidance_interval is 0.5; give (start, end)'),
        ({'guidance_interval': (0.0, 1.5)}, 'guidance_interval is 1.5; give a number from 0 to 1'),
        ({'temperature': True}, 'temperature is True'),
        ({'final_temperature': -1.0}, 'final_temperature is -1.0'),
        ({'choice_temperature': '4'}, "choice_temperature is '4'"),
        ({'top_k': -1}, 'top_k is -1'),
        ({'top_k': 2**31}, 'top_k is 2147483648'),
        ({'top_p': 0.0}, 'top_p is 0.0; give a number above 0'),
        ({'top_p': 1.1}, 'top_p is 1.1'),
        ({'order': 'random order'}, "order is 'random order'"),
        ({'schedule': 'cos'}, "schedule is 'cos'; did you mean 'cosine'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(knobs, said):
    with pytest.raises(UserError) as caught:
        decoding(dataclasses.replace(DecodeConfig(), **knobs), 256)
    assert said in str(caught.value) and '\n' not in str(caught.value)


def test_more_steps_than_tokens_are_said_and_not_taken(tiny_model):
    with pytest.warns(InputWarning, match='steps is 500, more than the 16 tokens'):
        settings = tiny_model.settings(steps=500)
    assert settings.steps == 16
    assert tiny_model.settings(steps=16).steps == 16


def test_a_knob_given_by_itself_comes_before_those_given_together(tiny_model):
    own = DecodeConfig(steps=7, guidance_scale=9.0, top_k=3)
    settings = tiny_model.settings(decoding=own, steps=5)
    assert (settings.steps, settings.guidance_scale, settings.top_k) == (5, 9.0, 3)
    assert tiny_model.settings(guidance_scale=0).guidance_scale == 0.0
    assert tiny_model.settings().guidance_scale == tiny_model.release.decode.guidance_scale


def test_settings_can_be_written_down(cascade_model):
    written = json.loads(json.dumps(dataclasses.asdict(cascade_model.settings(seed=3, size=(48, 32)))))
    assert written['seed'] == 3 and written['size'] == [48, 32] and written['superres']['steps'] == 3


def test_what_needs_a_super_res_says_so(tiny_model):
    for arguments in ({'superres': DecodeConfig()}, {'size': (32, 32)}):
        with pytest.raises(UserError, match='holds no super-res') as caught:
            tiny_model.settings(**arguments)
        assert '\n' not in str(caught.value)
    for size in (3, '16x16', (16,), (16.0, 16), (-16, 16)):
        with pytest.raises(UserError, match='is'):
            tiny_model.settings(size=size)


def test_knobs_of_another_type_are_refused(tiny_model, cascade_model):
    for arguments in ({'decoding': {'steps': 3}}, {'decoding': 3}):
        with pytest.raises(UserError, match='give a muse.config.DecodeConfig'):
            tiny_model.settings(**arguments)
    for wrong in (True, {'steps': 3}):
        with pytest.raises(UserError, match='superres is a'):
            cascade_model.settings(superres=wrong)
