"""A training step of the tokenizer at the paper's size: time, images/s, share of the chip's peak, and what bounds it.

    python tools/bench.py tokenizer --variants=now,no_perceptual --batches=64
    python tools/bench.py tokenizer --first=DIR --variants=first,now           beside an older tree of this project
    python tools/bench.py tokenizer --variants=now --profile=20                the 20 costliest operations as well
    python tools/bench.py tokenizer --tiny --batches=2 --steps=2               on a CPU

Each case compiles in a process of its own, --jobs at a time; then they are timed one after another, each alone on the
device, from the compilation cache. After --minutes what is there is printed and the rest is said to have failed.
VGG16's weights are random here: the numbers in them do not change the time. The critic plays in every step. With
--profile CUDA graphs are off, in which operations have no names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.tokenizer_trials import numbers

_NAMED = '--xla_gpu_enable_command_buffer='  # no CUDA graphs
_SECONDS_A_CASE = 40  # of the time limit, kept from compiling for timing
_STILL_ON = 'the time limit came first: give more --minutes'
ROOT = Path(__file__).resolve().parent.parent
CASE = ROOT / 'tools' / 'tokenizer_case.py'

# Name → keys of the config that differ, and names of patches in tools/tokenizer_case.py.
VARIANTS: dict[str, dict[str, Any]] = {
    'first': {},  # another tree, given by --first
    'now': {},
    'no_perceptual': {'loss': {'perceptual': 0.0}},
    'no_adversarial': {'loss': {'adversarial': 0.0}},
    'no_search': {'patches': ['no_search']},  # every token gets code 0
    'no_revival': {'loss': {'revive_after_steps': 0}},
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
    parser.add_argument('--jobs', type=int, default=2, help='cases compiled at a time; they tune on the one device')
    parser.add_argument('--minutes', type=float, default=30.0, help='time limit of all cases together')
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
            if not (tree / 'muse').is_dir() or not (tree / args.config).is_file():
                raise UserError(
                    f"'{tree}' holds no muse/ or no {args.config}: give a tree of this project and a config"
                )
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


def _case(setting: dict[str, Any], flags: str, cache: str, *, timed: bool, seconds: float) -> dict[str, Any]:
    """What the process of a case prints; {'failed': …} when it ends without a number or takes too long."""
    if seconds <= 0:
        return {'failed': _STILL_ON}
    env = os.environ | {'PYTHONPATH': f'{setting["tree"]}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    env |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()}
    env |= {'JAX_ENABLE_COMPILATION_CACHE': 'true', 'JAX_COMPILATION_CACHE_DIR': cache}
    env |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    command = [sys.executable, str(CASE), json.dumps(setting | {'timed': timed})]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=env, cwd=setting['tree'], timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {'failed': _STILL_ON}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{')]
    if done.returncode or not lines:
        return {'failed': f'the process ended with {done.returncode}; its error is above'}
    return json.loads(lines[-1])


def _speed(setting: dict[str, Any], found: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """Images and operations a second, and the share of the chip's peak."""
    from muse.config import VQConfig, VQLossConfig, read
    from muse.train.flops import tokenizer_step_flops

    model, loss = read(VQConfig, found.pop('model')), read(VQLossConfig, found.pop('loss'))
    flops = tokenizer_step_flops(model, loss, setting['batch'], found['side'])
    per_second = flops / found['ms'] * 1e3
    return {
        'images_per_s': round(setting['batch'] / found['ms'] * 1e3, 1),
        'tflop_an_image': round(flops / setting['batch'] / 1e12, 4),
        'tflops_per_s': round(per_second / 1e12, 2),
        'share_of_peak': round(per_second / peak, 4) if peak else None,
    }


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One dict a batch size and variant; with --profile a further one with the costliest operations."""
    import jax

    from muse.errors import UserError
    from muse.train.flops import peak_flops

    for name, value in (('jobs', args.jobs), ('steps', args.steps), ('minutes', args.minutes)):
        if value <= 0:
            raise UserError(f'--{name}={value}: give more than 0')
    peak = peak_flops(jax.devices()[0].device_kind)
    deadline = time.monotonic() + 60 * args.minutes
    flags = f'{args.xla_flags} {_NAMED if args.profile else ""}'.strip()
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(folder)
        settings = list(_settings(args, folder))

        def compile_case(setting: dict[str, Any]) -> dict[str, Any]:
            seconds = deadline - time.monotonic() - _SECONDS_A_CASE * len(settings)
            return _case(setting, flags, f'{folder}/cache', timed=False, seconds=seconds)

        with ThreadPoolExecutor(args.jobs) as pool:
            compiled = list(pool.map(compile_case, settings))
        for setting, found in zip(settings, compiled, strict=True):
            about = {key: setting[key] for key in ('variant', 'config', 'batch')} | {'xla_flags': flags}
            about |= found
            if 'failed' not in found:
                left = deadline - time.monotonic()
                found = _case(setting, flags, f'{folder}/cache', timed=True, seconds=left)
            if 'failed' in found:
                yield about | found
                continue
            profile = found.pop('profile')
            yield about | _speed(setting, found, peak) | found
            if profile:
                yield about | {'profile': profile}
