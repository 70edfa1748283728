"""The T5 encoder with random weights: time, share of the chip's peak and memory, beside PyTorch's T5EncoderModel.

    python tools/bench.py text                                          T5-XXL, bfloat16, 64 texts of 128 tokens
    python tools/bench.py text --size=xl --peer_modes= --attention=xla  ours alone
    python tools/bench.py text --size=tiny --batch=2 --length=16        on a CPU

Every row of the batch has its full length, so that no work is saved on padding. The peer is compiled by `torch.compile`
in each of --peer_modes in turn, in a process of its own as ours is, so that neither sits in the other's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from muse.config import Dtype, T5Config
from muse.models.t5 import T5Encoder
from muse.train.flops import peak_flops, t5_flops
from tools.peers.run import run_peer
from tools.random_weights import random_weights
from tools.timing import compiled_memory, peak_memory_gib, share_of_peak, timed

SIZES = {
    'tiny': T5Config(vocab_size=128, width=64, mlp_dim=160, head_dim=16, heads=4, layers=2),
    'small': T5Config(width=512, mlp_dim=1024, heads=6, layers=8),
    'base': T5Config(width=768, mlp_dim=2048, heads=12, layers=12),
    'large': T5Config(width=1024, mlp_dim=2816, heads=16, layers=24),
    'xl': T5Config(width=2048, mlp_dim=5120, heads=32, layers=24),
    'xxl': T5Config(),
}
PEER = Path(__file__).resolve().parent / 'peers' / 't5_torch.py'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--size', choices=SIZES, default='xxl', help='T5-v1.1 size')
    parser.add_argument('--batch', type=int, default=64, help='texts a call')
    parser.add_argument('--length', type=int, default=128, help='tokens a text')
    parser.add_argument('--dtype', choices=get_args(Dtype), default='bfloat16', help='of weights and arithmetic')
    parser.add_argument('--attention', default='xla,cudnn', help='backends of ours to measure, with commas')
    parser.add_argument('--unroll', default='1', help='layers a scan step to measure, with commas')
    parser.add_argument(
        '--option',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help='XLA compiler option; each measured once more with all of them, beside none',
    )
    parser.add_argument('--repeats', type=int, default=15, help='calls timed')
    parser.add_argument(
        '--peer_modes',
        default='default,reduce-overhead,max-autotune-no-cudagraphs',
        help="torch.compile modes to measure, with commas; 'eager' is no compile; empty: no peer",
    )
    parser.add_argument('--peer_seconds', type=float, default=150.0, help='time limit of all peer modes together')


def _ours(config: T5Config, params: nnx.State, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    what = {'attention': config.attention, 'unroll': config.unroll, 'options': options}
    graphdef = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(params=0))), nnx.Param)[0]
    ids_BS = jax.random.randint(jax.random.key(0), (args.batch, args.length), 2, min(config.vocab_size, 32000))
    len_B = jnp.full((args.batch,), args.length, jnp.int32)
    encode = jax.jit(lambda params, ids, lengths: nnx.merge(graphdef, params)(ids, lengths))
    start = time.perf_counter()
    try:
        compiled = encode.lower(params, ids_BS, len_B).compile(options)
    except (RuntimeError, ValueError) as error:  # cudnn off a GPU, an option that does not exist
        return what | {'failed': str(error).strip().splitlines()[0][:300]}
    compile_s = time.perf_counter() - start
    times = timed(lambda: compiled(params, ids_BS, len_B), repeats=args.repeats)
    return {
        **what,
        **times,
        **share_of_peak(t5_flops(config, args.batch, args.length), times['ms']),
        **compiled_memory(compiled),
        'peak_gib': peak_memory_gib(),
        'compile_s': round(compile_s, 1),
    }


def _value(text: str) -> bool | str:
    return {'true': True, 'false': False}.get(text, text)


def _peer(config: T5Config, mode: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """One mode of PyTorch's encoder."""
    setting = {
        'config': dataclasses.asdict(config),
        'batch': args.batch,
        'length': args.length,
        'repeats': args.repeats,
        'mode': mode,
    }
    found = run_peer(PEER, setting, seconds)
    if 'failed' in found:
        return {'mode': mode, **found}
    per_second = t5_flops(config, args.batch, args.length) / found['ms'] * 1e3
    peak = peak_flops(found['torch_device'])
    share = {
        'tflops_per_s': round(per_second / 1e12, 3),
        'share_of_peak': round(per_second / peak, 4) if peak else None,
    }
    return {'mode': mode, **found, **share}


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ours with each attention backend and unrolling, then the peer in each mode."""
    config = dataclasses.replace(SIZES[args.size], dtype=args.dtype)
    what = {'size': args.size, 'batch': args.batch, 'length': args.length, 'dtype': args.dtype}
    params = random_weights(lambda: T5Encoder(config, rngs=nnx.Rngs(params=0)), jnp.dtype(args.dtype))[1]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    what['weights_gib'] = round(weights / 2**30, 3)
    chosen = {name: _value(text) for name, _, text in (option.partition('=') for option in args.option)}
    for attention in filter(None, args.attention.split(',')):
        for unroll in map(int, args.unroll.split(',')):
            variant = dataclasses.replace(config, attention=attention, unroll=unroll)
            for options in ({}, chosen) if chosen else ({},):
                yield {'model': 'muse', **what, **_ours(variant, params, options, args)}
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    modes = [mode for mode in args.peer_modes.split(',') if mode]
    if modes and not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')):
        yield {'model': 'transformers', **what, 'failed': 'torch and transformers are not installed'}
        return
    end = time.monotonic() + args.peer_seconds
    for mode in modes:
        yield {'model': 'transformers', **what, **_peer(config, mode, max(1.0, end - time.monotonic()), args)}
