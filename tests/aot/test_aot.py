"""Topologies, rooflines and the report of `train.py --aot`. What needs the TPU compiler is skipped where missing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from muse.aot.chips import CHIPS, Topology, split_name
from muse.aot.compile import DoesNotFit, compile_here, compile_step, state_bytes
from muse.aot.count import BETWEEN_SLICES, Collective, Totals
from muse.aot.paper import NETWORK, paper_row
from muse.aot.report import advice
from muse.aot.roofline import links, roofline
from muse.config import BaseRun, DataConfig, MeshConfig, OptimConfig, TrainConfig, TransformerConfig
from muse.errors import UserError
from muse.mesh import AXES
from muse.train.flops import PEAKS, step_flops

ROOT = Path(__file__).parents[2]


def small_run(**changes) -> BaseRun:
    model = TransformerConfig(
        codebook_size=256,
        grid=(16, 8),
        width=256,
        mlp_dim=512,
        heads=4,
        layers=2,
        text_width=64,
        text_length=31,
        remat='none',
        attention='splash',
        dtype='bfloat16',
    )
    data = DataConfig(kind='precomputed', path='unused', text_length=31)
    fields = {
        'model': model,
        'train': TrainConfig(steps=1000, batch_size=16),
        'data': data,
        'eval_data': data,
        'tokenizer': 'unused',
        'optim': OptimConfig(name='adafactor'),
        'mesh': MeshConfig(fsdp=2),
    }
    return BaseRun(**(fields | changes))


def torus(kind: str, *sizes: int, slices: int = 1) -> Topology:
    """A topology whose devices are numbered row by row."""
    places = [()]
    for size in sizes:
        places = [(*place, i) for place in places for i in range(size)]
    devices = [SimpleNamespace(coords=place, slice_index=s) for s in range(slices) for place in places]
    return Topology(f'{kind}:{"x".join(map(str, sizes))}', CHIPS[kind], sizes, slices, devices)


def test_names_of_topologies():
    assert split_name('v5e:16x16') == ('v5e', (16, 16), 1)
    assert split_name('v4:4x8x8:2') == ('v4', (4, 8, 8), 2)
    assert split_name('tpu7x:4x4x4') == ('7x', (4, 4, 4), 1)


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e:3x7', 'v5e', 'v5e:16x16:0', 'v4:16x16', 'h100:8', ''])
def test_an_unknown_topology_lists_those_known(name):
    with pytest.raises(UserError, match='is not known: give .*v4, v5p, 7x: 2x2x1 .*; v5e, v6e: 1x1 2x2') as error:
        split_name(name)
    assert '\n' not in str(error.value) and f"'{name}'" in str(error.value)


def test_links_that_a_ring_can_use():
    flat, deep = torus('v5e', 16, 16), torus('v4', 4, 8, 8)
    row = list(range(16))
    assert links(row, flat, flat.devices) == 2, 'a whole row: both ways around'
    assert links(row[:8], flat, flat.devices) == 1, 'half a row is a line'
    assert links(range(256), flat, flat.devices) == 4
    assert links(range(64), deep, deep.devices) == 4, 'a plane of 8x8'
    small = torus('v5e', 2, 2)
    assert links(range(4), small, small.devices) == 2, 'ends of two chips are not joined'


def test_roofline_by_hand():
    """197 TFLOP/s, 819 GB/s and two links of 50 GB/s; what crosses slices goes at 25 Gbit/s a chip."""
    topology = torus('v5e', 16, 16, slices=2)
    inside = tuple(range(16))
    totals = Totals(flops=197e9, hbm_bytes=819e6)
    totals.collectives = Counter({Collective('all-gather', inside): 3e8, Collective(BETWEEN_SLICES, ()): 25e6})
    found = roofline(totals, topology, topology.devices)
    assert found.terms == pytest.approx({'compute': 1e-3, 'HBM': 1e-3, 'ICI': 3e-3, 'DCN': 8e-3})
    assert found.bound == 'DCN' and found.least == pytest.approx(8e-3) and found.most == pytest.approx(13e-3)


def test_half_a_chip_has_half_of_everything():
    topology = torus('7x', 4, 4, 4)
    found = roofline(Totals(flops=2307e9 / 2), topology, topology.devices)
    assert found.terms['compute'] == pytest.approx(1e-3)


def test_state_of_a_device_is_its_share():
    run = small_run()
    whole, split = (
        state_bytes(run, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)) for sizes in ((1, 1, 1), (2, 4, 1))
    )
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: base_params(run))))
    assert whole['params'] == whole['ema'] == 4 * count
    assert whole['batch'] == 16 * (4 * 128 + 2 * 31 * 64 + 4) and split['batch'] == whole['batch'] / 8
    assert whole['params'] / 4 < split['params'] < whole['params'] / 3.5


def base_params(run):
    from flax import nnx

    from muse.models.transformer import Transformer

    return nnx.split(Transformer(run.model, rngs=nnx.Rngs(params=0)), nnx.Param)[1]


def test_h100s_on_paper():
    run = small_run(mesh=MeshConfig(data=2, fsdp=8), train=TrainConfig(steps=864, batch_size=16))
    cells = paper_row('tiny', run, 'h100:16', 0.5).split(' | ')
    compute = step_flops(run) / (16 * PEAKS['H100'] * 0.5)
    held = state_bytes(run, AbstractMesh((2, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3))['params'] / 2
    traffic = held * 7 * 3 / 450e9 + held / NETWORK
    assert cells[1:5] == ['16 H100 (16)', '2·8·1', '16', 'none'] and cells[7] == 'network'
    assert cells[8] == f'{16 / (compute + traffic):,.0f}–{16 / traffic:,.0f}'
    alone = paper_row(
        'tiny', small_run(mesh=MeshConfig(), train=TrainConfig(steps=864, batch_size=16)), '4090:1', 0.5
    ).split(' | ')
    assert alone[1:3] == ['1 RTX 4090 (1)', '1·1·1'] and alone[5].endswith(' of 22') and alone[7] == 'compute'
    assert alone[8].split('–')[0] == f'{16 * PEAKS["RTX 4090"] * 0.5 / step_flops(run):,.0f}'
    for on, share, complaint in (
        ('4090:8', 0.5, 'or 4090:1'),
        ('h100:7', 0.5, 'hosts of 8'),
        ('h100:16', 0.0, 'share is'),
    ):
        with pytest.raises(UserError, match=complaint):
            paper_row('tiny', run, on, share)


@pytest.mark.slow
def test_memory_of_the_step_here():
    run = small_run(mesh=MeshConfig(), model=dataclasses.replace(small_run().model, attention='xla', dtype='float32'))
    whole, parts = (compile_here(dataclasses.replace(run, train=train)) for train in (
        TrainConfig(steps=10, batch_size=64), TrainConfig(steps=10, batch_size=64, accumulate=4)
    ))  # fmt: skip
    assert whole.arguments == pytest.approx(sum(whole.state_bytes.values()), rel=0.01)
    assert 0.25 < parts.temporaries / whole.temporaries < 0.6, 'a quarter of the rows at a time'


def test_advice_names_what_is_left_to_try():
    run = small_run(train=TrainConfig(steps=10, batch_size=64))
    text = advice(run, {'data': 4, 'fsdp': 2, 'tensor': 1})
    assert 'mesh.fsdp=4' in text and 'remat=full' in text and 'accumulate=2' in text and 'batch_size' in text
    full = small_run(model=dataclasses.replace(run.model, remat='full'), train=TrainConfig(steps=10, batch_size=8))
    assert advice(full, {'data': 1, 'fsdp': 8, 'tensor': 1}) == 'try: a slice of more or larger chips'


def test_a_full_memory_is_read_off_the_compilers_message():
    message = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.52G of 15.75G hbm.'
    assert DoesNotFit(message, None, {}).needed == '34.52G of 15.75G'  # pyright: ignore[reportArgumentType]


def train_py(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    command = [sys.executable, 'train.py', '--config=configs/tiny/base.py', *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_refuses_an_unknown_topology_in_one_line():
    done = train_py('--aot=v5e:17x17')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.count('\n') == 1 and 'v5e:17x17' in done.stderr


def test_the_command_compiles_for_chips_that_are_not_there():
    pytest.importorskip('libtpu')
    done = train_py('--aot=v5e:2x2', '--config.mesh.fsdp=2', '--config.model.dtype=bfloat16')
    assert done.returncode == 0, done.stderr
    assert 'base on v5e:2x2: 4 chips, 4 devices; mesh data=2 fsdp=2 tensor=1' in done.stdout
    for word in ('temporaries', 'all-gather', 'roofline: compute', 'bound by', 'days'):
        assert word in done.stdout, word
    assert 'not counted' not in done.stdout


def test_a_state_too_large_is_refused_before_compiling():
    run = small_run(model=dataclasses.replace(small_run().model, width=16384, mlp_dim=65536, layers=4))
    four = torus('v5e', 2, 2)
    mesh = AbstractMesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DoesNotFit) as error:
        patch.setattr('muse.aot.compile.make_mesh', lambda config, devices: mesh)
        patch.setattr('jax.set_mesh', lambda mesh: contextlib.nullcontext())
        compile_step(run, four)
    assert error.value.needed == 'more than it has' and error.value.state_bytes['params'] > 8 * 2**30


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice():
    pytest.importorskip('libtpu')
    done = train_py(
        '--aot=v5e:2x2', '--config.model.width=8192', '--config.model.mlp_dim=32768', '--config.model.heads=64'
    )
    assert done.returncode == 1, done.stderr
    assert 'does not fit' in done.stdout and 'try: split the state over more devices' in done.stdout


@pytest.mark.slow
def test_the_tpu_compilers_two_scanned_layers_count_as_two_unrolled():
    """With splash attention, in a process of its own: jax's devices are already made here."""
    pytest.importorskip('libtpu')
    code = (
        'import dataclasses, sys; sys.path[:0] = ["tests/aot"]\n'
        'from test_aot import small_run\n'
        'from muse.aot.chips import describe, use_no_accelerator\n'
        'use_no_accelerator()\n'
        'from muse.aot.compile import compile_step\n'
        'from muse.aot.report import cost\n'
        'run = small_run()\n'
        'models = [dataclasses.replace(run.model, unroll=n) for n in (1, 2)]\n'
        'four = describe("v5e:2x2")\n'
        'found = [cost(compile_step(dataclasses.replace(run, model=m), four), four).totals for m in models]\n'
        'for t in found: print(t.flops, t.kernel_flops, sum(t.collectives.values()), sum(t.kernels.values()))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    scanned, unrolled = ([float(x) for x in line.split()] for line in done.stdout.splitlines())
    assert scanned[1] > 0 and scanned[3] == unrolled[3] == 12, 'two layers: forward, dq, dkv of self and cross'
    assert scanned[:2] == pytest.approx(unrolled[:2], rel=0.02)
    assert scanned[2] == pytest.approx(unrolled[2], rel=0.15)
