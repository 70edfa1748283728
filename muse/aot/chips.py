"""TPU chips and slices that need not be there: what the makers state of a chip, and libtpu's devices for a topology."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from muse.errors import UserError
from muse.train.flops import PEAKS


@dataclass(frozen=True)
class Chip:
    """One chip as Google's Cloud TPU pages give it; bytes and seconds, bfloat16 operations.

    `link` is one direction of one ICI link: a chip has one to each neighbour, along 2 or 3 dimensions. Where a
    dimension of the slice is a multiple of `wraps`, its ends are joined and traffic may go around both ways. `dcn` is
    a chip's share of its host's network. v4's page gives neither rate: its links are taken at 400 Gbit/s each way, its
    network as v5e's.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    wraps: int
    dcn: float
    devices: int = 1  # jax devices on a chip
    libtpu: str = ''  # libtpu's name where it is another
    options: tuple[tuple[str, str], ...] = ()  # libtpu's, that make one device of a chip with two cores


_GIB = 2.0**30
CHIPS = {
    'v4': Chip(PEAKS['TPU v4'], 32 * _GIB, 1200e9, 50e9, 4, dcn=25e9 / 8, options=(('chip_config_name', 'megacore'),)),
    'v5e': Chip(PEAKS['TPU v5 lite'], 16 * _GIB, 819e9, 50e9, 16, dcn=25e9 / 8),
    'v5p': Chip(PEAKS['TPU v5'], 95 * _GIB, 2765e9, 100e9, 4, dcn=50e9 / 8),
    'v6e': Chip(PEAKS['TPU v6 lite'], 32 * _GIB, 1638e9, 100e9, 16, dcn=100e9 / 8),
    '7x': Chip(2 * PEAKS['TPU7x'], 192 * _GIB, 7380e9, 100e9, 4, dcn=100e9 / 8, devices=2, libtpu='tpu7x'),
}
_FLAT = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'.split()
_DEEP = '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16'.split()
SIZES = {'v4': _DEEP, 'v5e': _FLAT, 'v5p': _DEEP, 'v6e': _FLAT, '7x': _DEEP}


@dataclass(frozen=True)
class Topology:
    """A slice, or several of one size: `devices` are libtpu's, for `make_mesh` and for compiling."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    slices: int
    devices: Sequence[Any]

    @property
    def chips(self) -> int:
        return math.prod(self.sizes) * self.slices


def split_name(name: str) -> tuple[str, tuple[int, ...], int]:
    """'v5e:16x16' → ('v5e', (16, 16), 1); 'v5e:16x16:2' are two such slices.

    Raises:
        UserError: a chip or a form that is not known; lists those known.
    """
    found = re.fullmatch(r'(?:tpu)?([\w]+):(\d+(?:x\d+){1,2})(?::(\d+))?', name)
    known = found is not None and found.group(1) in CHIPS
    if not found or not known or found.group(2) not in SIZES[found.group(1)] or found.group(3) == '0':
        chips = {tuple(sizes): [c for c in CHIPS if SIZES[c] == sizes] for sizes in SIZES.values()}
        listed = '; '.join(f'{", ".join(names)}: {" ".join(sizes)}' for sizes, names in chips.items())
        raise UserError(f"topology '{name}' is not known: give CHIP:SIZE or CHIP:SIZE:SLICES of {listed}")
    sizes = tuple(int(size) for size in found.group(2).split('x'))
    return found.group(1), sizes, int(found.group(3) or 1)


def use_no_accelerator() -> None:
    """Keeps jax on the CPU and libtpu from asking for a machine that is not there. Call before jax's first device."""
    jax.config.update('jax_platforms', 'cpu')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
    os.environ.setdefault('TPU_LOG_DIR', 'disabled')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # two compiles at once: neither opens a chip


def describe(name: str) -> Topology:
    """The devices of a topology, made by the TPU compiler alone; call `use_no_accelerator` before.

    Raises:
        UserError: a topology that is not known, or no TPU compiler on this machine.
    """
    kind, sizes, slices = split_name(name)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--aot needs the TPU compiler: pip install -e '.[tpu]'") from None
    from jax.experimental import topologies

    chip = CHIPS[kind]
    options: dict[str, Any] = dict(chip.options) | ({'num_slices': slices} if slices > 1 else {})
    if math.prod(sizes) < 4:
        options['chips_per_host_bounds'] = (1, 1, 1)
    description = topologies.get_topology_desc(
        platform='tpu', topology_name=f'{chip.libtpu or kind}:{"x".join(map(str, sizes))}', **options
    )
    return Topology(name, chip, sizes, slices, description.devices)
