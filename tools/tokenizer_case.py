"""One case of tools/bench_tokenizer.py: compiles a training step or, when the setting says so, times it as well.

The bench calls it twice: the program of the first call comes back from the persistent compilation cache in the second.
Runs under the tree that PYTHONPATH names, which may be an older one of this project: it uses only what all have.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import json
import re
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muse.config import read_run, to_dict
from muse.models import vqgan
from muse.train import tokenizer

# Named scopes of the models and of their training, by which a profile is summed.
PARTS = ('encoder', 'search', 'decoder', 'norm', 'perceptual', 'critic', 'optimizer', 'revival')
PARTS += ('embed', 'self', 'cross', 'mlp', 'head', 'loss', 'draw')
TINY = {'channels': 8, 'channel_mult': (1, 1, 2), 'num_res_blocks': 1, 'codebook_size': 64, 'code_dim': 8}


def _doubled() -> None:
    home: Any = sys.modules[vqgan.UpConv.__module__]  # older trees have it in vqgan itself
    home._convolve_doubled_merged = home._convolve_doubled
    home._convolve_doubled_merged_backward = home._convolve_doubled_backward


def _plain_norm() -> None:
    vqgan.GroupNorm.swish = lambda self, x_BHWC: jax.nn.silu(self(x_BHWC))


def _no_search() -> None:
    vqgan.VQGAN.lookup = lambda self, latents_BhwC: jnp.zeros(latents_BhwC.shape[:-1], jnp.int32)


def _remat() -> None:
    from flax import nnx

    call = vqgan.ResBlock.__call__

    def again(self: Any, x_BHWC: Any) -> Any:
        graphdef, params = nnx.split(self, nnx.Param)
        return jax.checkpoint(lambda params, x_BHWC: call(nnx.merge(graphdef, params), x_BHWC))(params, x_BHWC)

    vqgan.ResBlock.__call__ = again


def _float32_perceptual() -> None:
    load = tokenizer.load_net
    tokenizer.load_net = lambda *args: load(*args).astype('float32')


PATCHES = {'doubled': _doubled, 'plain_norm': _plain_norm, 'no_search': _no_search, 'remat': _remat}
PATCHES['float32_perceptual'] = _float32_perceptual


def make_run(setting: dict[str, Any]) -> tuple[Any, int]:
    """The run of the config with the setting's changes, and the side of its pictures."""
    values = runpy.run_path(setting['config'])['get_config']().to_dict()
    values['loss'] |= setting['loss'] | {'adversarial_start_step': 0}
    values['train']['batch_size'] = setting['batch']
    if setting['tiny']:
        values['model'] |= TINY
        values['loss'] |= {'perceptual_net': '', 'discriminator_channels': 4}
        values['data']['image_size'] = 16
    run = read_run(values)
    return run, run.data.image_size


def _events(planes: list[Any]) -> Iterator[tuple[str, float]]:
    """Operations a device ran, by name, and nanoseconds. A kernel of a CUDA graph has no operation: its own name."""
    devices = [plane for plane in planes if plane.name.startswith('/device:')]
    for plane in devices or planes:
        lines = list(plane.lines)
        for line in [line for line in lines if line.name.startswith('Stream')] or lines:
            for event in line.events:
                name = dict(event.stats).get('hlo_op') or (event.name if devices else None)
                if name:
                    yield str(name), event.duration_ns


def _largest(spent: Mapping[str, float], top: int) -> list[tuple[str, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])[:top]


def _part(source: str) -> str:
    """'back decoder norm' for an operation of that scope in the backward pass; '' outside of all."""
    names = [name for name in re.findall(r'\w+', source) if name in PARTS]
    return ' '.join(['back'] * ('transpose(' in source) + list(dict.fromkeys(names)))


def summed(spent: Mapping[str, float], text: str, top: int) -> list[dict[str, Any]]:
    """The costliest parts of the model, kinds of operation and operations.

    Args:
        spent: operation → milliseconds.
        text: the compiled program, which says where an operation comes from.
        top: rows of each.
    """
    where = dict(re.findall(r'%?([\w.-]+) = ([^\n]*)', text))
    found = {name: re.search(r'op_name="([^"]*)"', where.get(name, '')) for name in spent}
    sources = {name: match.group(1) if match else '' for name, match in found.items()}
    total = sum(spent.values())
    parts: collections.defaultdict[str, float] = collections.defaultdict(float)
    kinds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, ms in spent.items():
        parts[_part(sources[name])] += ms
        kinds[re.sub(r'[._]?\d+$', '', name)] += ms
    rows = []
    for label, group in (('part', parts), ('kind', kinds), ('op', spent)):
        for name, ms in _largest(group, top):
            rows.append({label: name, 'ms': round(ms, 3), 'share': round(ms / total, 4)})
            if label == 'op':
                rows[-1] |= {'shape': where.get(name, '').split(' ')[0][:90], 'from': sources[name][-110:]}
    return rows


def profiled(step: Any, state: Any, batch: Any, key: Any, top: int) -> list[dict[str, Any]]:
    """What two steps spend their time on: milliseconds a step, share, and where in the model it comes from."""

    def steps() -> Any:
        nonlocal state
        for _ in range(2):
            state, metrics = step(state, batch, key)
        return metrics

    return profiled_calls(steps, 2, str(step.as_text()), top)


def profiled_calls(run: Callable[[], Any], calls: int, text: str, top: int) -> list[dict[str, Any]]:
    """As `profiled`, of the `calls` calls that `run` makes of the compiled program `text`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        spent: collections.defaultdict[str, float] = collections.defaultdict(float)
        for name, duration_ns in _events(list(data.planes)):
            spent[name] += duration_ns / 1e6 / calls
    return summed(spent, text, top)


def _filled(abstract: Any) -> Any:
    """A state of small positive numbers."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> Any:
        value = np.abs(rng.normal(0, 0.02, x.shape)) if x.ndim > 1 else np.ones(x.shape)
        return jnp.asarray(value, x.dtype)

    return jax.tree.map(fill, abstract)


def main(setting: dict[str, Any]) -> None:
    """Compiles, measures when asked to, prints one line."""
    for name in setting['patches']:
        PATCHES[name]()
    run, side = make_run(setting)
    task = tokenizer.tokenizer_task(run)
    assert task.prepare is not None
    rows = np.random.default_rng(0).integers(0, 256, (setting['batch'], side, side, 3), np.uint8)
    batch, key = task.prepare({'img': jnp.asarray(rows)}), jax.random.key(0)
    abstract = jax.eval_shape(task.init, key)
    begun = time.perf_counter()
    step = jax.jit(task.step, donate_argnums=0).lower(abstract, batch, key).compile()
    seconds = round(time.perf_counter() - begun, 1)
    found: dict[str, Any] = {'compile_s': seconds}
    if setting['timed']:
        found = {'load_s': seconds} | _measured(step, _filled(abstract), batch, key, setting)
        found |= {'side': side, 'model': to_dict(run.model), 'loss': dataclasses.asdict(run.loss)}
    print(json.dumps(found), flush=True)


def _measured(step: Any, state: Any, batch: Any, key: Any, setting: dict[str, Any]) -> dict[str, Any]:
    """Times of steps, memory, and the profile. Any weights do: the initialisers would have to be compiled."""
    state, metrics = step(state, batch, key)
    jax.block_until_ready(metrics)
    state['step'] = state['step'] * 0 + 1
    times = []
    for _ in range(setting['steps']):
        begun = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - begun) * 1e3)
    memory: Any = step.memory_analysis()
    stats = jax.devices()[0].memory_stats()
    return {
        'ms': round(statistics.mean(times), 3),  # the mean, since R1 comes in some steps only
        'ms_median': round(statistics.median(times), 3),
        'ms_max': round(max(times), 3),
        'steps': len(times),
        'temporaries_gib': round(memory.temp_size_in_bytes / 2**30, 3),
        'peak_gib': round(stats['peak_bytes_in_use'] / 2**30, 3) if stats else None,
        'loss_value': float(metrics['loss']),
        'profile': profiled(step, state, batch, key, setting['top']) if setting['top'] else [],
    }


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
