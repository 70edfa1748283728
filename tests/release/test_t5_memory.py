"""Loading a T5 or a release never holds it twice: peak memory of the host and what each of eight devices holds.

On a CPU a device's memory is the host's, so the peak counts the loaded encoder too.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from flax import nnx

from muse.config import T5Config, to_dict
from muse.release.format import FORMAT, graphdef_and_template
from muse.release.storage import Kind, Storage, kinds
from muse.release.stored import open_safetensors, stored_hash, write_safetensors

pytestmark = pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='reads Linux’s memory figures')

ROOT = Path(__file__).parents[2]
NAMES = {'F32': 4, 'BF16': 2}
# What malloc keeps for later, in an arena for each thread, is not held by the loader and varies with the machine's load
# by half of a small encoder: one arena, and what is freed goes back at once.
MALLOC = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
# Loads [[folder, type], ...] one after the other, and prints what each held.
MEASURE = """
import json, re, sys
from functools import partial
import jax, jax.numpy as jnp
from muse.config import MeshConfig
from muse.mesh import make_mesh
from muse.release.format import load_part
from muse.release.t5_checkpoints import load_t5

def high_water():
    return int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read()).group(1))

cases, devices = json.loads(sys.argv[1]), int(sys.argv[2])
mesh = make_mesh(MeshConfig(data=1, fsdp=devices)) if devices > 1 else None
jnp.zeros(10).block_until_ready()

def measure(folder, dtype):
    load = partial(load_part, part='text_encoder') if 'release' in folder else load_t5
    small = load(folder + '/small', dtype=dtype, mesh=mesh)  # whatever is imported and made once
    open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark is what is held now
    before = high_water()
    loaded = load(folder + '/large', dtype=dtype, mesh=mesh)
    leaves = jax.block_until_ready(jax.tree.leaves(loaded.params))
    after = high_water()
    held = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return {
        'encoder': sum(leaf.nbytes for leaf in leaves), 'peak': (after - before) * 1024,
        'parameters': sum(leaf.size for leaf in leaves), 'held': list(held.values()),
    }

print(json.dumps([measure(*case) for case in cases]))
"""


def write_sparse(folder: Path, *, width: int, layers: int, rows: int, stored: str) -> None:
    """A checkpoint of zeros that takes no room on the disk, in two shards."""
    heads, mlp = width // 64, width * 5 // 2
    config = {'model_type': 't5', 'feed_forward_proj': 'gated-gelu', 'd_model': width, 'num_heads': heads}
    shapes = {
        'shared.weight': [rows, width],
        'encoder.final_layer_norm.weight': [width],
        'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': [32, heads],
    }
    for layer in range(layers):
        block = f'encoder.block.{layer}.layer'
        shapes |= {f'{block}.0.SelfAttention.{x}.weight': [width, width] for x in 'qkvo'}
        shapes |= {f'{block}.1.DenseReluDense.wi_{i}.weight': [mlp, width] for i in (0, 1)}
        shapes |= {f'{block}.1.DenseReluDense.wo.weight': [width, mlp]}
        shapes |= {f'{block}.{i}.layer_norm.weight': [width] for i in (0, 1)}
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    places = {name: f'model-{i % 2 + 1:05d}-of-00002.safetensors' for i, name in enumerate(shapes)}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    for file in set(places.values()):
        header, offset = {}, 0
        for name in (name for name in shapes if places[name] == file):
            end = offset + math.prod(shapes[name]) * NAMES[stored]
            header[name] = {'dtype': stored, 'shape': shapes[name], 'data_offsets': [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        with (folder / file).open('wb') as out:
            out.write(len(text).to_bytes(8, 'little') + text)
            out.truncate(8 + len(text) + offset)


def write_sparse_release(folder: Path, config: T5Config, storage: Storage) -> None:
    """A release's text encoder of zeros."""
    written: dict[str, Kind] = {}
    for route, variable in nnx.to_flat_state(graphdef_and_template('text_encoder', config)[1]):
        written |= kinds('.'.join(map(str, route)), variable.shape, int('layers' in route), storage)
    folder.mkdir(parents=True)
    file = folder / 'text_encoder.safetensors'
    write_safetensors(file, written, ())
    size = 8 + int.from_bytes(file.read_bytes()[:8], 'little')
    with file.open('r+b') as out:
        out.truncate(size + sum(dtype.itemsize * math.prod(shape) for dtype, shape in written.values()))
    entry = {'config': to_dict(config), 'sha256': stored_hash(open_safetensors(file))}
    (folder / 'config.json').write_text(json.dumps({'format': FORMAT, 'parts': {'text_encoder': entry}}))


def measure(cases: list[tuple[Path, str]], devices: int) -> list[dict]:
    environment = MALLOC | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'PATH': '/usr/bin:/bin',
        'HOME': str(cases[0][0]),
    }
    told = json.dumps([(str(folder), dtype) for folder, dtype in cases])
    command = [sys.executable, '-c', MEASURE, told, str(devices)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict, devices: int, most: float) -> None:
    assert found['peak'] <= most, found
    assert found['peak'] >= 0.9 * found['encoder'], f'the measurement saw nothing: {found}'
    assert len(found['held']) == devices
    assert max(found['held']) <= 1.02 * found['encoder'] / devices, found


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(('stored', 'dtype'), [('F32', 'bfloat16'), ('BF16', 'float32')])
def test_a_billion_parameters(stored, dtype, devices, tmp_path):
    write_sparse(tmp_path / 'small', width=256, layers=1, rows=128, stored=stored)
    write_sparse(tmp_path / 'large', width=2048, layers=20, rows=32128, stored=stored)
    [found] = measure([(tmp_path, dtype)], devices)
    assert found['parameters'] > 1e9
    print(f'{stored} to {dtype}, {devices} devices: peak {found["peak"] / found["encoder"]:.2f} of the encoder')
    check(found, devices, 1.3 * found['encoder'])


def test_a_hundred_million_parameters(tmp_path):
    """A published folder and releases of two storages, one after the other in one process."""
    published, releases = tmp_path / 'published', {'int8': 'float32', 'bfloat16': 'bfloat16'}
    write_sparse(published / 'small', width=256, layers=1, rows=128, stored='F32')
    write_sparse(published / 'large', width=1024, layers=8, rows=8192, stored='F32')
    config = T5Config(width=1024, mlp_dim=2560, heads=16, layers=8, vocab_size=8192)
    for storage in releases:
        folder = tmp_path / 'release' / storage
        write_sparse_release(folder / 'small', replace(config, layers=1, vocab_size=128), storage)
        write_sparse_release(folder / 'large', config, storage)
    cases = [(published, 'bfloat16'), *((tmp_path / 'release' / storage, dtype) for storage, dtype in releases.items())]
    for (folder, dtype), found in zip(cases, measure(cases, 1), strict=True):
        print(f'{folder.name} to {dtype}: peak {found["peak"] / found["encoder"]:.3f} of the encoder')
        assert found['parameters'] > 1e8
        check(found, 1, 1.15 * found['encoder'])  # holding the largest tensor twice would be 1.2
