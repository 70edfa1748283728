"""GPUs on paper: no compiler, only arithmetic. Every term is a formula of this file; nothing here was run.

One host has 8 H100s, or one RTX 4090. Computing is model operations at a share of the peak, which what `remat` computes
again lowers. A step moves the weights once for the forward and once for the backward pass (twice with remat 'full')
where they are split over 'fsdp', and sums the gradients, all in bfloat16, within a host over NVLink and between hosts
over one adapter a GPU.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import AbstractMesh, AxisType

from muse.aot.compile import state_bytes
from muse.config import Run
from muse.errors import UserError
from muse.mesh import AXES, check_batch, mesh_sizes
from muse.train.flops import PEAKS, step_flops
from muse.train.ranges import check_ranges

_GIB = 2.0**30
# By their data sheets: name in `PEAKS` and bytes of memory.
CARDS = {'h100': ('H100', 80e9), '4090': ('RTX 4090', 24e9)}
# Bytes a second and direction over NVLink (H100 SXM), and to another host where each GPU has an adapter of 400 Gbit/s.
NVLINK, NETWORK = 450e9, 50e9


def paper_row(name: str, run: Run, on: str, share: float) -> str:
    """A row of docs/scaling.md under `muse.aot.report.COLUMNS` for 'h100:GPUS'; memory is that of the state alone.

    Raises:
        UserError: a card that is not known, a number of GPUs that is neither 1 nor a multiple of 8, a share or a
            number of the run out of range, a mesh or batch that does not fit.
    """
    kind, _, count = on.partition(':')
    gpus = int(count) if count.isdecimal() else 0
    if kind not in CARDS or not (gpus == 1 or (kind == 'h100' and gpus and gpus % 8 == 0)):
        raise UserError(f"'{on}': give h100:1, h100:8, h100:16 … (hosts of 8) or 4090:1")
    card, memory = CARDS[kind]
    if not 0 < share <= 1:
        raise UserError(f'share is {share}: give a share of the peak, above 0 and up to 1')
    check_ranges(run)
    sizes = mesh_sizes(run.mesh, gpus)
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    check_batch(mesh, run.train.batch_size, run.train.accumulate)
    held = state_bytes(run, mesh)
    remat = getattr(run.model, 'remat', 'none')
    compute = step_flops(run) / (gpus * PEAKS[card] * share)
    traffic = _traffic(held['params'] / 2, sizes, remat)
    least, most, steps, batch = max(compute, traffic), compute + traffic, run.train.steps, run.train.batch_size
    cells = [
        name,
        f'{gpus} {card} ({gpus})',
        '·'.join(map(str, sizes)),
        str(batch),
        remat,
        f'{sum(held.values()) / _GIB:.1f} (state) of {memory / _GIB:.0f}',
        f'{1e3 * compute:.0f}, -, {1e3 * traffic:.0f}',
        'compute' if compute >= traffic else 'network',
        f'{batch / most:,.0f}–{batch / least:,.0f}',
        f'{least * steps / 86400:.1f}–{most * steps / 86400:.1f}',
    ]
    return '| ' + ' | '.join(cells) + ' |'


def _traffic(shard: float, sizes: tuple[int, int, int], remat: str) -> float:
    """Seconds a step that a GPU sends; `shard` is its part of the weights in bfloat16. 'tensor' adds nothing."""
    data, fsdp, tensor = sizes
    gathers = 3 if remat == 'full' else 2
    within = shard * (fsdp - 1) * (gathers + 1)  # weights gathered, gradients summed and scattered
    between = 2 * shard * (data - 1) / data
    inner = NVLINK if fsdp * tensor <= 8 else NETWORK
    return within / inner + between / (NVLINK if data * fsdp * tensor <= 8 else NETWORK)
