"""Numbers that no run could use are one line, before anything is loaded."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest
from toys import toy_run

from muse.config import read_run
from muse.errors import UserError
from muse.train import ranges
from muse.train.ranges import check_attention, check_ranges

CONFIGS = sorted((Path(__file__).parents[2] / 'configs').glob('*/*.py'))


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_shipped_config_is_in_range(config):
    check_ranges(read_run(runpy.run_path(str(config))['get_config']().to_dict()))


def test_the_ends_of_the_ranges_are_in_them():
    check_ranges(changed('train', eval_every_steps=0, save_every_steps=0, save_every_minutes=0.0, ema_decay=0.0))
    check_ranges(changed('optim', learning_rate=0.0, b1=0.0, gradient_clip=0.0, warmup_steps=0, final_fraction=1.0))
    check_ranges(changed('loss', label_smoothing=0.0, text_dropout=1.0))


@pytest.mark.parametrize(
    ('group', 'name', 'value', 'said'),
    [
        ('train', 'steps', 0, 'train.steps is 0: give at least 1'),
        ('train', 'eval_batches', 0, 'train.eval_batches is 0: give at least 1'),
        ('train', 'save_every_minutes', -3.0, 'train.save_every_minutes is -3.0: give 0 or more'),
        ('train', 'stall_minutes', float('inf'), 'train.stall_minutes is inf: give 0 or more'),
        ('train', 'ema_decay', 1.0, 'train.ema_decay is 1.0: give a number from 0 to below 1'),
        ('optim', 'learning_rate', -1e-4, 'optim.learning_rate is -0.0001: give 0 or more'),
        ('optim', 'learning_rate', float('nan'), 'optim.learning_rate is nan: give 0 or more'),
        ('optim', 'b2', 1.5, 'optim.b2 is 1.5: give a number from 0 to below 1'),
        ('optim', 'gradient_clip', -1.0, 'optim.gradient_clip is -1.0: give 0 or more'),
        ('optim', 'warmup_steps', -5, 'optim.warmup_steps is -5: give at least 0'),
        ('optim', 'final_fraction', 2.0, 'optim.final_fraction is 2.0: give a number from 0 to 1'),
        ('loss', 'text_dropout', 2.0, 'loss.text_dropout is 2.0: give a number from 0 to 1'),
        ('loss', 'label_smoothing', 1.0, 'loss.label_smoothing is 1.0: give a number from 0 to below 1'),
        ('model', 'layers', 0, 'model.layers is 0: give at least 1'),
        ('model', 'grid', (4, 0), r'model.grid\[1\] is 0: give at least 1'),
        ('model', 'heads', 3, 'model.heads is 3 and model.width 32: heads must divide the width'),
        ('decode', 'steps', 0, 'decode.steps is 0; give an integer from 1'),
        ('decode', 'temperature', -1.0, 'decode.temperature is -1.0; give a number from 0'),
    ],
)
def test_a_number_out_of_range_is_named(group, name, value, said):
    with pytest.raises(UserError, match=said):
        check_ranges(changed(group, **{name: value}))


def test_a_critic_has_an_optimiser_of_its_own():
    run = read_run(runpy.run_path(str(CONFIGS[0].parents[1] / 'tiny' / 'tokenizer.py'))['get_config']().to_dict())
    wrong = dataclasses.replace(run, discriminator_optim=dataclasses.replace(run.optim, b1=1.0))
    with pytest.raises(UserError, match='discriminator_optim.b1 is 1.0'):
        check_ranges(wrong)


def test_cudnn_wants_an_nvidia_gpu():
    check_attention(changed('model', attention='fused'), 'cpu')
    for platform in ('cpu', 'tpu'):
        with pytest.raises(UserError, match="model.attention is 'cudnn': .*; use 'auto'"):
            check_attention(changed('model', attention='cudnn'), platform)


def test_cudnn_wants_bfloat16(monkeypatch):
    monkeypatch.setattr(ranges, 'has_cudnn', lambda: True)
    check_attention(changed('model', attention='cudnn', dtype='bfloat16'), 'gpu')
    with pytest.raises(UserError, match="model.dtype 'float32': use 'bfloat16', or 'auto'"):
        check_attention(changed('model', attention='cudnn'), 'gpu')


def changed(group, **values):
    run = toy_run()
    return dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **values)})
