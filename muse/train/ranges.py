"""Numbers of a config that no run could use, found before anything is loaded, written or compiled.

What depends on the data and the frozen nets is checked where they are read, what one task alone has in its module.
"""

from __future__ import annotations

from muse import settings
from muse.config import BaseRun, OptimConfig, Run, SuperresConfig, SuperresRun, TrainConfig, TransformerConfig
from muse.errors import UserError
from muse.nn.attention import has_cudnn

_INFINITY = float('inf')


def check_ranges(run: Run) -> None:
    """Raises UserError when a number of the loop, the optimiser, the model or the drawing is out of range."""
    _loop(run.train)
    _optimizer('optim', run.optim)
    if not isinstance(run, BaseRun | SuperresRun):
        _optimizer('discriminator_optim', run.discriminator_optim)
        return
    _model(run.model)
    _number('loss.label_smoothing', run.loss.label_smoothing, below=1.0)
    _number('loss.text_dropout', run.loss.text_dropout, high=1.0)
    settings.decoding(run.decode, settings.MAX_STEPS, 'decode.')  # a release keeps them; any number of tokens will do


def check_attention(run: Run, platform: str) -> None:
    """Raises UserError when `model.attention` is a kernel that the platform or `model.dtype` does not have."""
    if not isinstance(run, BaseRun | SuperresRun) or run.model.attention != 'cudnn':
        return
    if platform not in ('gpu', 'cuda') or not has_cudnn():
        raise UserError("model.attention is 'cudnn': it runs on NVIDIA GPUs from Ampere on alone; use 'auto'")
    if run.model.dtype != 'bfloat16':
        raise UserError(f"model.attention is 'cudnn' and model.dtype '{run.model.dtype}': use 'bfloat16', or 'auto'")


def _loop(train: TrainConfig) -> None:
    for name in ('steps', 'log_every_steps', 'keep_checkpoints', 'eval_batches'):
        _count(f'train.{name}', getattr(train, name), 1)
    for name in ('save_every_steps', 'eval_every_steps', 'grid_every_steps'):
        _count(f'train.{name}', getattr(train, name), 0)
    _number('train.ema_decay', train.ema_decay, below=1.0)
    _number('train.save_every_minutes', train.save_every_minutes)
    _number('train.stall_minutes', train.stall_minutes)


def _optimizer(group: str, optim: OptimConfig) -> None:
    _number(f'{group}.b1', optim.b1, below=1.0)
    _number(f'{group}.b2', optim.b2, below=1.0)
    _number(f'{group}.final_fraction', optim.final_fraction, high=1.0)
    for name in ('learning_rate', 'weight_decay', 'gradient_clip'):
        _number(f'{group}.{name}', getattr(optim, name))
    _count(f'{group}.warmup_steps', optim.warmup_steps, 0)


def _model(model: TransformerConfig | SuperresConfig) -> None:
    names = ['codebook_size', 'width', 'mlp_dim', 'heads', 'layers', 'text_width', 'text_length', 'unroll']
    grids = {'grid': model.grid}
    if isinstance(model, SuperresConfig):
        names += ['low_codebook_size', 'block']
        grids['low_grid'] = model.low_grid
        _count('model.low_layers', model.low_layers, 0)
    for name in names:
        _count(f'model.{name}', getattr(model, name), 1)
    for name, sides in grids.items():
        for i, side in enumerate(sides):
            _count(f'model.{name}[{i}]', side, 1)
    if model.width % model.heads:
        raise UserError(f'model.heads is {model.heads} and model.width {model.width}: heads must divide the width')


def _count(key: str, value: int, low: int) -> None:
    if value < low:
        raise UserError(f'{key} is {value}: give at least {low}')


def _number(key: str, value: float, *, high: float = _INFINITY, below: float = _INFINITY) -> None:
    """From 0 to `high`, and under `below`; NaN and infinity are neither."""
    if 0 <= value <= high and value < below:
        return
    upper = f'to below {below:g}' if below < _INFINITY else f'to {high:g}'
    wanted = '0 or more' if high == below else f'a number from 0 {upper}'
    raise UserError(f'{key} is {value}: give {wanted}')
