"""Starting a large run: every device holds its share of the state, and nobody a copy of the whole."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from muse.config import BaseRun, MeshConfig, read_run
from muse.mesh import make_mesh
from muse.train import base
from muse.train.loop import abstract_state

ROOT = Path(__file__).parents[2]
GIB = 2**30

MEASURE = """
import json, sys
import jax
from toys import toy_run, with_model
from muse.config import MeshConfig
from muse.mesh import make_mesh
from muse.train import base
from muse.train.loop import abstract_state


def status(key):
    return 1024 * int(open('/proc/self/status').read().split(key + ':')[1].split()[0])


run = with_model(toy_run(), width=512, mlp_dim=2048, heads=8, layers=16)
mesh = make_mesh(MeshConfig(data=1, fsdp=8))
with jax.set_mesh(mesh):
    init, key = (lambda key: base.init_state(run, key)), jax.random.key(0)
    abstract = abstract_state(init, key, mesh)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    start = jax.jit(init, out_shardings=layout).lower(key).compile()
    open('/proc/self/clear_refs', 'w').write('5')  # the peak from here on
    before = status('VmRSS')
    state = jax.block_until_ready(start(key))
    held = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
found = {'peak': status('VmHWM') - before, 'state': size(state), 'params': size(state['params']), 'held': held}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_device_and_no_host_holds_a_whole_copy(tmp_path):
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
        'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'tests', ROOT / 'tests' / 'train'))),
    }
    done = subprocess.run([sys.executable, '-c', MEASURE], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found['params'] > 200e6
    assert max(found['held'].values()) < found['state'] / 8 * 1.02
    # Eight devices share this host's memory: the state once, and beside it less than a copy of the parameters.
    assert found['peak'] < found['state'] + 0.5 * found['params']


@pytest.mark.slow
def test_the_3b_starts_in_the_memory_of_its_shares():
    run = read_run(runpy.run_path(str(ROOT / 'configs' / 'paper' / 'base_3b.py'))['get_config']().to_dict())
    assert isinstance(run, BaseRun)
    run = dataclasses.replace(run, mesh=MeshConfig(data=1, fsdp=8))
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        abstract = abstract_state(lambda key: base.init_state(run, key), jax.random.key(0), mesh)
        layout = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(lambda key: base.init_state(run, key), out_shardings=layout)
        memory: Any = init.lower(jax.random.key(0)).compile().memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract['params']))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    print(f'parameters {whole / GIB:.2f} GiB, state {state / GIB:.2f} GiB; a device: {memory}')
    assert whole > 12 * GIB
    assert memory.output_size_in_bytes < state / 8 * 1.02
    assert memory.temp_size_in_bytes < whole / 8
