"""What `train.py --aot` prints, and a row of the table in docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from muse.aot.chips import Topology, describe
from muse.aot.compile import DoesNotFit, Program, compile_step
from muse.aot.count import Totals, count
from muse.aot.hlo import parse
from muse.aot.roofline import Roofline, by_kind, roofline
from muse.config import Run
from muse.train.flops import step_flops

_GIB = 2.0**30
_NAMES = {
    'params': 'parameters',
    'ema': 'average',
    'opt': 'optimiser',
    'disc': 'critic',
    'disc_opt': "critic's optimiser",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A compiled program and what it costs. Counts are of one device."""

    topology: Topology
    program: Program
    totals: Totals
    roofline: Roofline

    @property
    def fits(self) -> bool:
        return self.program.memory <= self.topology.chip.hbm / self.topology.chip.devices


def cost(program: Program, topology: Topology) -> Cost:
    """Counts a program that was compiled for `topology`."""
    totals = count(parse(program.text), len(topology.devices))
    times = roofline(totals, topology, list(program.mesh.devices.flat))
    return Cost(topology=topology, program=program, totals=totals, roofline=times)


def days(run: Run, seconds: float) -> float:
    """Of a whole run whose step takes so long."""
    return seconds * run.train.steps / 86400


def check(run: Run, name: str) -> int:
    """Prints what a step of `run` needs on the topology `name`; 0 if it fits, else 1 with advice.

    Raises:
        UserError: a topology, mesh or batch that is not possible, or no TPU compiler.
    """
    topology = describe(name)
    try:
        found = cost(compile_step(run, topology), topology)
    except DoesNotFit as error:
        print(f'{_setting(run, topology, error.mesh)}')
        print(f'does not fit: a device needs {error.needed} of memory, of which {list_bytes(error.state_bytes)}')
        print(advice(run, error.mesh.shape))
        return 1
    print('\n'.join([_setting(run, topology, found.program.mesh), *cost_lines(found), *_schedule(run, found)]))
    if not found.fits:
        print(advice(run, found.program.mesh.shape))
        return 1
    return 0


def _setting(run: Run, topology: Topology, mesh: Mesh) -> str:
    shape = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    model = run.model
    how = [f'{name} {getattr(model, name)}' for name in ('attention', 'remat') if hasattr(model, name)]
    parts = [f'batch {run.train.batch_size}', f'accumulate {run.train.accumulate}', *how]
    slices = f' in {topology.slices} slices' if topology.slices > 1 else ''
    return (
        f'{run.task} on {topology.name}: {topology.chips} chips{slices}, {len(topology.devices)} devices; '
        f'mesh {shape}; {", ".join(parts)}'
    )


def list_bytes(held: dict[str, float]) -> str:
    """Groups of memory over 1 MiB, by name."""
    named = {_NAMES.get(name, name): size / _GIB for name, size in held.items() if size >= 2**20}
    return ', '.join(f'{name} {size:.3g}' for name, size in named.items()) + ' GiB'


def cost_lines(found: Cost) -> list[str]:
    """The part of the report that holds for any program; counts are of one chip."""
    chip, program, totals, times = found.topology.chip, found.program, found.totals, found.roofline
    n = chip.devices
    held = {name: n * size for name, size in program.state_bytes.items()}
    padding = max(n * program.arguments - sum(held.values()), 0.0)
    held |= {'padding': padding, 'temporaries': n * program.temporaries, 'program': n * program.code}
    kernels = f', {n * totals.kernel_flops / 1e12:.3g} of it in attention kernels' if totals.kernels else ''
    text = [
        f'{program.parameters / 1e6:,.0f}M parameters; compiled in {program.seconds:.0f} s. Per chip:',
        f'  memory      {n * program.memory / _GIB:.2f} of {chip.hbm / _GIB:.0f} GiB: {list_bytes(held)}',
        f'  operations  {n * totals.flops / 1e12:.3g} TFLOP{kernels}',
        f'  HBM         {n * totals.hbm_bytes / 1e9:.3g} GB',
    ]
    for (kind, size), sent in sorted(by_kind(totals).items(), key=lambda item: -item[1]):
        over = f' over {size} devices' if size else ''
        text.append(f'  {kind:<19} sends {n * sent / 1e9:.3g} GB{over}')
    text += [f'  not counted: {what} ({times}x)' for what, times in totals.unknown.items()]
    terms = ', '.join(f'{name} {1e3 * seconds:.3g} ms' for name, seconds in times.terms.items())
    most = f'{1e3 * times.most:.3g} ms with no overlap'
    return [*text, f'roofline: {terms}', f'bound by {times.bound}: {1e3 * times.least:.3g} ms at best, {most}']


def _schedule(run: Run, found: Cost) -> list[str]:
    times, batch = found.roofline, run.train.batch_size
    share = step_flops(run) / (found.topology.chips * found.topology.chip.flops * times.least)
    return [
        f'at best {batch / times.least:,.0f} pictures/s, model FLOPs {100 * share:.0f} % of the peak; '
        f'{run.train.steps:,} steps take {days(run, times.least):.2f} to {days(run, times.most):.2f} days'
    ]


def advice(run: Run, ways: Mapping[str, int]) -> str:
    """What to change when a step does not fit on a mesh of these sizes, likely first."""
    tips = []
    if ways['data'] > 1:
        tips.append(f'split the state over more devices (--config.mesh.fsdp={2 * ways["fsdp"]})')
    if getattr(run.model, 'remat', 'full') != 'full':
        tips.append('recompute more (--config.model.remat=full)')
    rows = run.train.batch_size // (ways['data'] * ways['fsdp'] * run.train.accumulate)
    if rows > 1:
        tips.append(f'take the batch in parts (--config.train.accumulate={2 * run.train.accumulate})')
    tips.append('a smaller --config.train.batch_size' if rows > 1 else 'a slice of more or larger chips')
    return 'try: ' + '; '.join(tips)


COLUMNS = (
    'model | chips (devices) | mesh data·fsdp·tensor | batch | remat | memory a chip, GiB | compute, HBM, ICI, ms | '
    'bound | pictures/s | days'
)


def row(name: str, run: Run, found: Cost) -> str:
    """One line of the table in docs/scaling.md, under `COLUMNS`; `name` is the model's."""
    chip, times, mesh = found.topology.chip, found.roofline, found.program.mesh.shape
    n, batch = chip.devices, run.train.batch_size
    cells = [
        name,
        f'{found.topology.name}: {found.topology.chips} ({len(found.topology.devices)})',
        '·'.join(str(size) for size in mesh.values()),
        str(batch),
        str(getattr(run.model, 'remat', '-')),
        f'{n * found.program.memory / _GIB:.1f} of {chip.hbm / _GIB:.0f}',
        ', '.join(f'{1e3 * seconds:.0f}' for seconds in times.terms.values()),
        times.bound,
        f'{batch / times.most:,.0f}–{batch / times.least:,.0f}',
        f'{days(run, times.least):.1f}–{days(run, times.most):.1f}',
    ]
    return '| ' + ' | '.join(cells) + ' |'
