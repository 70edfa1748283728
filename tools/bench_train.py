"""A training step of the transformers at the paper's sizes: time, share of the chip's peak, memory, beside the peer.

    python tools/bench.py train                                            each model at its batch, and the peer
    python tools/bench.py train --cases=base_632m --batches=64,128 --variants=now,unroll_4 --peer_modes=
    python tools/bench.py train --cases=base_632m --profile=20 --peer_modes=    the 20 costliest operations as well
    python tools/bench.py train --tiny --batches=2 --repeats=2 --peer_modes=    on a CPU

Cases are the files of configs/paper/. Weights, tokens and texts are random; every text has its full length. A variant
is ours with one thing done differently (several joined by '+'). After --minutes what is left is said to have failed.
The peer (aMUSEd-256) is trained by bfloat16 autocast and fused AdamW, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from muse.config import BaseRun, SuperresRun, read_run
from muse.errors import UserError, nearest
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.nn.devices import gpu_kernels
from muse.train import base, masked, superres
from muse.train.flops import step_flops
from tools import cases as what
from tools.bench_sample import peer_cases, rngs
from tools.random_weights import random_weights
from tools.timing import compiled_memory, peak_memory_gib, share_of_peak, timed
from tools.tokenizer_case import profiled_calls
from tools.tokenizer_trials import numbers
from tools.variants import TRAINING_VARIANTS, combined, patched

BATCHES = {'base_632m': 128, 'base_3b': 32, 'superres_268m': 16, 'superres_770m': 8}  # what one GPU of 80 GB holds


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--cases', default='base_632m,base_3b,superres_770m', help=f'with commas: {", ".join(BATCHES)}')
    parser.add_argument('--batches', type=numbers, default=(), help='pictures a step, with commas; default: by case')
    parser.add_argument('--variants', default='now', help=f'with commas: {", ".join(TRAINING_VARIANTS)}')
    parser.add_argument('--optimizer', default='', help="'adamw' or 'adafactor'; default: as the config says")
    parser.add_argument('--repeats', type=int, default=10, help='steps timed')
    parser.add_argument('--profile', type=int, default=0, help='print so many of the costliest operations')
    parser.add_argument('--minutes', type=float, default=30.0, help='no variant is begun after them')
    parser.add_argument('--tiny', action='store_true', help='models for a CPU')
    parser.add_argument('--peer_modes', default='default', help='torch.compile modes of the peer; empty: no peer')
    parser.add_argument('--peer_batches', type=numbers, default=(64,), help='its pictures a step')
    parser.add_argument('--peer_seconds', type=float, default=150.0, help='time limit of all peer modes together')


def make_run(
    case: str, batch: int, variant: str = 'now', *, optimizer: str = '', tiny: bool = False
) -> BaseRun | SuperresRun:
    """The config of a case with what a variant and an optimiser ('': the config's) change."""
    values, change = what.values_of(case, tiny=tiny), combined(variant, TRAINING_VARIANTS)
    values['model'] |= change.config
    values['train'] |= {'batch_size': batch, **change.train}
    values['optim'] |= {'name': optimizer} if optimizer else {}
    run = read_run(values)
    assert isinstance(run, BaseRun | SuperresRun)
    return run


def random_batch(run: BaseRun | SuperresRun) -> dict[str, jax.Array]:
    """Tokens and text states as tools/precompute.py writes them."""
    model, rows = run.model, run.train.batch_size

    def ids(number: int, grid: tuple[int, int], codes: int) -> jax.Array:
        return jax.random.randint(jax.random.key(number), (rows, grid[0] * grid[1]), 0, codes)

    batch = {
        'tok': ids(1, model.grid, model.codebook_size),
        'txt': jax.random.normal(jax.random.key(2), (rows, model.text_length, model.text_width), jnp.bfloat16),
        'len': jnp.full(rows, model.text_length, jnp.int32),
    }
    if isinstance(run, SuperresRun):
        batch['low'] = ids(3, run.model.low_grid, run.model.low_codebook_size)
    return batch


def step_and_state(run: BaseRun | SuperresRun) -> tuple[Any, Any]:
    """The step, to be jitted: (state, batch, key) → (state, metrics); and a state after one step, of random weights."""
    if isinstance(run, SuperresRun):
        graphdef, params = random_weights(lambda: Superres(run.model, rngs=rngs()))
        step = partial(superres.train_step, run, graphdef)
    else:
        graphdef, params = random_weights(lambda: Transformer(run.model, rngs=rngs()))
        step = partial(base.train_step, run, graphdef)
    optimizer = jax.eval_shape(masked.make_optimizer(run.optim, run.train.steps).init, params)
    state = {'step': jnp.ones((), jnp.int32), 'params': params, 'ema': jax.tree.map(jnp.copy, params)}
    return step, {**state, 'opt': jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), optimizer)}


def _measured(run: BaseRun | SuperresRun, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the step costs; or that it failed, and what memory it would have had to get."""
    batch, key = random_batch(run), jax.random.key(0)
    step, state = step_and_state(run)
    jax.clear_caches()  # the trace of a program knows nothing of patches
    change = combined(variant, TRAINING_VARIANTS)
    start, found = time.perf_counter(), {}
    try:
        with patched(change.patches):
            lowered = jax.jit(step, donate_argnums=0).lower(state, batch, key)
        found['trace_s'] = round(time.perf_counter() - start, 1)
        compiled = lowered.compile(compiler_options=change.compiler)
        found |= {'compile_s': round(time.perf_counter() - start, 1), **compiled_memory(compiled)}
        print(f'{variant}: {found}', file=sys.stderr, flush=True)  # before it may run out of memory
        return found | _run(run, compiled, state, batch, key, args)
    except RuntimeError as error:  # does not fit into the memory, or does not compile: the next may
        return found | {'failed': str(error).strip().splitlines()[0][:300]}
    finally:
        for array in jax.tree.leaves((state, batch)):
            array.delete()


def _run(
    run: BaseRun | SuperresRun, compiled: Any, state: Any, batch: Any, key: Any, args: argparse.Namespace
) -> dict[str, Any]:
    loss = None

    def once() -> Any:
        nonlocal state, loss
        state, metrics = compiled(state, batch, key)
        loss = metrics['loss']
        return loss

    first = float(once())
    times = timed(once, repeats=args.repeats)
    rows = run.train.batch_size
    found = {
        **times,
        'images_per_s': round(rows / times['ms'] * 1e3, 1),
        'tflop_an_image': round(step_flops(run) / rows / 1e12, 4),
        **share_of_peak(step_flops(run), times['ms']),
        'peak_gib': peak_memory_gib(),
        'first_loss': first,
    }
    if args.profile:

        def steps() -> Any:
            once()
            return once()

        found['profile'] = profiled_calls(steps, 2, str(compiled.as_text()), args.profile)
    return found


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each case at each batch size in each variant, with --profile a further one; then the peer."""
    for flag, given, known in (('cases', args.cases, BATCHES), ('variants', args.variants, TRAINING_VARIANTS)):
        for name in filter(None, given.replace('+', ',').split(',')):
            if name not in known:
                raise UserError(f"--{flag} names '{name}'{nearest(name, known)}")
    deadline = time.monotonic() + 60 * args.minutes
    for case in filter(None, args.cases.split(',')):
        for rows in args.batches or (BATCHES[case],):
            for variant in args.variants.split(','):
                run = make_run(case, rows, variant, optimizer=args.optimizer, tiny=args.tiny)
                about = {'model': 'muse', 'case': case, 'batch': rows, 'variant': variant, 'optimizer': run.optim.name}
                about |= {'remat': run.model.remat, 'xla_flags': os.environ.get('XLA_FLAGS', '')}
                about |= {'gpu_kernels': gpu_kernels()}
                if time.monotonic() > deadline:
                    yield about | {'failed': 'the time limit came first: give more --minutes'}
                    continue
                found = _measured(run, variant, args)
                profile = found.pop('profile', None)
                yield about | found
                if profile:
                    yield about | {'profile': profile}
    setting = {'task': 'train', 'repeats': args.repeats, 'tiny': args.tiny}
    yield from peer_cases(args.peer_batches, args.peer_modes, args.peer_seconds, setting)
