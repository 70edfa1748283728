"""The mesh on TPUs: which chips are neighbours in it, and what may cross slices. Everything else needs real devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from muse.config import MeshConfig
from muse.errors import UserError
from muse.mesh import _tpu_grid, mesh_sizes


def chips(*sizes: int, slices: int = 1, kind: str = 'TPU v5 lite') -> list[SimpleNamespace]:
    """Stand-ins for the devices of TPU slices."""
    places = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
    return [
        SimpleNamespace(
            platform='tpu', device_kind=kind, coords=place, core_on_chip=0, slice_index=s, process_index=0, id=i
        )
        for s in range(slices)
        for i, place in enumerate(places)
    ]


def test_only_data_crosses_slices():
    grid = _tpu_grid((4, 8, 1), chips(4, 4, 1, slices=2))
    assert grid.shape == (4, 8, 1)
    assert [{device.slice_index for device in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match='data=1 is no multiple of the 2 slices: only data may cross slices'):
        _tpu_grid((1, 32, 1), chips(4, 4, 1, slices=2))


def test_fsdp_runs_along_an_axis_of_the_torus():
    grid = _tpu_grid((16, 16, 1), chips(16, 16, 1))
    rows = [{device.coords[1] for device in row.flat} for row in grid]
    columns = [{device.coords[0] for device in row.flat} for row in grid]
    assert all(len(row) == 1 for row in rows) or all(len(column) == 1 for column in columns)


def test_a_size_that_is_no_product_of_the_torus_axes_splits_one():
    """jax refuses this unless it may split a physical axis: 2 of 4x4x8 chips."""
    grid = _tpu_grid((64, 2, 1), chips(4, 4, 8, kind='TPU v5'))
    for first, second in grid[:, :, 0]:
        assert sum(abs(a - b) for a, b in zip(first.coords, second.coords, strict=True)) == 1, 'neighbours'


@pytest.mark.parametrize('config, wrong', [(MeshConfig(fsdp=3), 'does not fit 8'), (MeshConfig(data=0), 'sizes are 1')])
def test_sizes_that_do_not_fit(config, wrong):
    with pytest.raises(UserError, match=wrong):
        mesh_sizes(config, 8)
    assert mesh_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == (2, 2, 2)
