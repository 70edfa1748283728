"""A training step of the tokenizer at the paper's size: time, images/s, share of the chip's peak, and what bounds it.

    python tools/bench.py tokenizer --variants=now,no_perceptual --batches=64
    python tools/bench.py tokenizer --first=DIR --variants=first,now           beside an older tree of this project
    python tools/bench.py tokenizer --variants=now --profile=20                the 20 costliest operations as well
    python tools/bench.py tokenizer --tiny --batches=2 --steps=2               on a CPU

Each case compiles in a process of its own, all at once; then they are timed one after another, each alone on the
device. VGG16's weights are random here: the numbers in them do not change the time. The critic plays in every step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.tokenizer_trials import numbers

ROOT = Path(__file__).resolve().parent.parent
CASE = ROOT / 'tools' / 'tokenizer_case.py'

# Name → keys of the config that differ, and names of patches in tools/tokenizer_case.py.
VARIANTS: dict[str, dict[str, Any]] = {
    'first': {},  # another tree, given by --first
    'now': {},
    'no_perceptual': {'loss': {'perceptual': 0.0}},
    'no_adversarial': {'loss': {'adversarial': 0.0}},
    'no_r1': {'loss': {'r1': 0.0}},
    'lecam': {'loss': {'r1': 0.0, 'lecam': 0.01}},
    'adaptive': {'loss': {'adversarial_adaptive': True}},
    'doubled': {'patches': ['doubled']},  # the decoder's pictures are doubled, then convolved
    'plain_norm': {'patches': ['plain_norm']},  # the norm's backward pass is JAX's own
    'both_old': {'patches': ['doubled', 'plain_norm']},
    'remat': {'patches': ['remat']},  # residual blocks are computed again in the backward pass
    'float32_perceptual': {'patches': ['float32_perceptual']},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--config', default='configs/paper/tokenizer_f16.py', help='what to train')
    parser.add_argument('--variants', default='now', help=f'with commas: {", ".join(VARIANTS)}')
    parser.add_argument('--first', default='', metavar='DIR', help="tree of variant 'first', with muse/ and configs/")
    parser.add_argument('--batches', type=numbers, default=(64,), help='pictures a step to measure, with commas')
    parser.add_argument('--steps', type=int, default=16, help='steps timed; R1 falls into one of 16')
    parser.add_argument('--xla_flags', default='', help='XLA_FLAGS of the cases')
    parser.add_argument('--profile', type=int, default=0, help='print so many of the costliest operations')
    parser.add_argument('--tiny', action='store_true', help='a model and pictures for a CPU')


def _settings(args: argparse.Namespace, weights: str) -> Iterator[dict[str, Any]]:
    from muse.errors import UserError, nearest

    for batch in args.batches:
        for name in args.variants.split(','):
            if name not in VARIANTS:
                raise UserError(f"--variants names '{name}'{nearest(name, VARIANTS)}")
            if name == 'first' and not args.first:
                raise UserError("variant 'first' is an older tree: give its folder as --first=DIR")
            tree = Path(args.first).resolve() if name == 'first' else ROOT
            variant = {'loss': {}, 'patches': [], **VARIANTS[name]}
            loss = {'perceptual_net': weights, **variant['loss']}
            setting = {'variant': name, 'tree': str(tree), 'config': args.config, 'batch': batch, 'tiny': args.tiny}
            yield setting | {'loss': loss, 'patches': variant['patches'], 'steps': args.steps, 'top': args.profile}


def _write_weights(folder: str) -> None:
    """VGG16-LPIPS in shape, with random weights of unit gain."""
    import numpy as np
    from safetensors.numpy import save_file

    from muse.models.perceptual import shapes

    rng = np.random.default_rng(0)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        gain = math.sqrt(2 / math.prod(shape[:-1])) if name.endswith('kernel') else 0.1
        return (
            np.abs(rng.normal(0, gain, shape)).astype(np.float32)
            if name.startswith('lin')
            else (rng.normal(0, gain, shape).astype(np.float32))
        )

    save_file({name: weight(name, shape) for name, shape in shapes('vgg').items()}, f'{folder}/vgg.safetensors')


def _start(setting: dict[str, Any], flags: str) -> subprocess.Popen[str]:

    env = os.environ | {'PYTHONPATH': f'{setting["tree"]}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    env |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()}
    return subprocess.Popen(
        [sys.executable, str(CASE), json.dumps(setting)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=setting['tree'],
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """The next JSON line of a case, or None when it ended without one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{'):
            return json.loads(line)
    return None


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One dict a batch size and variant; with --profile a further one with the costliest operations."""
    import jax

    from muse.config import VQConfig, VQLossConfig, read
    from muse.train.flops import peak_flops, tokenizer_step_flops

    peak = peak_flops(jax.devices()[0].device_kind)
    with tempfile.TemporaryDirectory() as weights:
        _write_weights(weights)
        settings = list(_settings(args, weights))
        started = [_start(setting, args.xla_flags) for setting in settings]
        ready = [_answer(process) for process in started]
        for setting, process, compiled in zip(settings, started, ready, strict=True):
            about = {key: setting[key] for key in ('variant', 'config', 'batch')} | {'xla_flags': args.xla_flags}
            found = None
            if compiled:
                assert process.stdin is not None
                process.stdin.write('go\n')
                process.stdin.close()
                found = _answer(process)
            process.wait()
            if found is None:
                yield about | {'failed': f'the process ended with {process.returncode}; its error is above'}
                continue
            model, loss = read(VQConfig, found.pop('model')), read(VQLossConfig, found.pop('loss'))
            profile = found.pop('profile')
            flops = tokenizer_step_flops(model, loss, setting['batch'], found['side'])
            per_second = flops / found['ms'] * 1e3
            share = {
                'images_per_s': round(setting['batch'] / found['ms'] * 1e3, 1),
                'tflop_an_image': round(flops / setting['batch'] / 1e12, 4),
                'tflops_per_s': round(per_second / 1e12, 2),
                'share_of_peak': round(per_second / peak, 4) if peak else None,
            }
            yield about | share | found
            if profile:
                yield about | {'profile': profile}
