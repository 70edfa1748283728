"""From counts to seconds: how long a step takes at least, and what bounds it.

Each term is what a chip would need if it did nothing else at the full rate that its maker states: matrix products, HBM
traffic, traffic over the links between chips (ICI) and between slices (DCN). The step takes at least the longest of
them; at their sum nothing would overlap. A real step lies between, and above both where a rate is not reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muse.aot.chips import Topology
from muse.aot.count import BETWEEN_SLICES, Collective, Totals


@dataclass(frozen=True)
class Roofline:
    """Seconds of each term of one step."""

    terms: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.terms, key=self.terms.__getitem__)

    @property
    def least(self) -> float:
        return max(self.terms.values())

    @property
    def most(self) -> float:
        return sum(self.terms.values())


def links(group: Sequence[int], topology: Topology, devices: Sequence[object]) -> int:
    """Links of a chip that a ring of the group can use at once: two along each dimension of the torus that the group
    goes all around, one along each in which it only stretches.

    Args:
        group: positions in `devices`.
        topology: the torus.
        devices: of the mesh, flattened.
    """
    coords = [tuple(devices[i].coords) for i in group]  # pyright: ignore[reportAttributeAccessIssue]
    total = 0
    for axis, size in enumerate(topology.sizes):
        along = len({coord[axis] for coord in coords})
        if along > 1:
            total += 2 if along == size and size % topology.chip.wraps == 0 else 1
    return max(total, 1)  # two devices of one chip


def roofline(totals: Totals, topology: Topology, devices: Sequence[object]) -> Roofline:
    """Seconds of a step from the counts of one device."""
    chip = topology.chip
    share = 1 / chip.devices  # of the chip, that one device may use
    terms = {
        'compute': totals.flops / (chip.flops * share),
        'HBM': totals.hbm_bytes / (chip.hbm_bandwidth * share),
        'ICI': 0.0,
    }
    for collective, sent in totals.collectives.items():
        if collective.kind == BETWEEN_SLICES:
            terms['DCN'] = sent / (chip.dcn * share)
        else:
            terms['ICI'] += sent / (chip.link * share * links(collective.group, topology, devices))
    return Roofline(terms)


def by_kind(totals: Totals) -> dict[tuple[str, int], float]:
    """Bytes sent of each kind and group size."""
    found: dict[tuple[str, int], float] = {}
    for collective, sent in totals.collectives.items():
        key = _key(collective)
        found[key] = found.get(key, 0.0) + sent
    return found


def _key(collective: Collective) -> tuple[str, int]:
    # A permutation's devices pass on to each other in rings; only a pair of them is known.
    return collective.kind, 0 if collective.kind == 'collective-permute' else len(collective.group)
