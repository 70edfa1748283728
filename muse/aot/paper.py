"""H100s on paper: no compiler, only arithmetic. Every term is a formula of this file; nothing here was run.

One host has 8 GPUs. Computing is model operations at a share of the peak, which what `remat` computes again lowers. A
step moves the weights once for the forward and once for the backward pass (twice with remat 'full') where they are
split over 'fsdp', and sums the gradients, all in bfloat16, within a host over NVLink and between hosts over one
adapter a GPU.
"""

from __future__ import annotations

import re
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from muse.aot.compile import state_bytes
from muse.config import Run
from muse.errors import UserError
from muse.mesh import AXES, check_batch, mesh_sizes
from muse.train.flops import step_flops

_GIB = 2.0**30
# An H100 SXM by its data sheet: dense bfloat16 operations a second and bytes of memory; bytes a second and direction
# over NVLink, and to another host where each GPU has an adapter of 400 Gbit/s.
FLOPS, HBM, NVLINK, NETWORK = 989e12, 80e9, 450e9, 50e9


def paper_row(name: str, run: Run, on: str, share: float) -> str:
    """A row of docs/scaling.md under `muse.aot.report.COLUMNS` for 'h100:GPUS'; memory is that of the state alone.

    Raises:
        UserError: a number of GPUs that is no multiple of 8, a share out of range, a mesh or batch that does not fit.
    """
    found = re.fullmatch(r'h100:(\d+)', on)
    gpus = int(found.group(1)) if found else 0
    if gpus < 8 or gpus % 8:
        raise UserError(f"'{on}': give h100:8, h100:16 … (hosts of 8)")
    if not 0 < share <= 1:
        raise UserError(f'share is {share}: give a share of the peak, above 0 and up to 1')
    sizes = mesh_sizes(run.mesh, gpus)
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    check_batch(mesh, run.train.batch_size, run.train.accumulate)
    held = state_bytes(run, mesh)
    remat = getattr(run.model, 'remat', 'none')
    compute = step_flops(run) / (gpus * FLOPS * share)
    traffic = _traffic(held['params'] / 2, sizes, remat)
    least, most, steps, batch = max(compute, traffic), compute + traffic, run.train.steps, run.train.batch_size
    cells = [
        name,
        f'{gpus} H100 ({gpus})',
        '·'.join(map(str, sizes)),
        str(batch),
        remat,
        f'{sum(held.values()) / _GIB:.1f} (state) of {HBM / _GIB:.0f}',
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
