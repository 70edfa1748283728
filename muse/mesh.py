"""The device mesh and the one table that maps logical axes of parameters onto it.

A parameter names its dimensions (`muse.nn.layers.param`); `RULES` says over which mesh axis each is split. A batch is
split over 'data' and 'fsdp' together; 'tensor' splits heads, hidden units and the vocabulary. XLA inserts the
communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from muse.config import MeshConfig
from muse.errors import UserError
from muse.nn.devices import ROWS

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(ROWS)

RULES: dict[str, str] = {
    'embed': 'fsdp',
    'mlp': 'tensor',
    'heads': 'tensor',
    'vocab': 'tensor',
    'conv_out': 'fsdp',
}


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of 'data', 'fsdp' and 'tensor' over so many devices.

    Raises:
        UserError: they do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = f'data={config.data} fsdp={config.fsdp} tensor={config.tensor}'
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f'mesh {wanted}: sizes are 1 or more, and -1 on one axis at most; change config.mesh')
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if int(np.prod(sizes)) != devices:
        raise UserError(f'mesh {wanted} does not fit {devices} devices: change config.mesh')
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes 'data', 'fsdp', 'tensor', each left to the compiler (`AxisType.Auto`).

    Several TPU slices are joined along 'data', so that only the gradients' sum crosses the network between them.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or 'data' is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    types = (AxisType.Auto,) * 3
    if devices[0].platform != 'tpu':
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(_tpu_grid(sizes, devices), AXES, axis_types=types)


def _tpu_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """TPU devices in the shape of the mesh, neighbours in it being neighbours in the torus as far as may be."""
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    data, *rest = sizes
    if data % slices:
        raise UserError(f'mesh data={data} is no multiple of the {slices} slices: only data may cross slices')
    within = (data // slices, *rest)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True, process_is_granule=False
        )
    return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)


def _spec(shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> P:
    """Splits each dimension as `RULES` says where it divides; a mesh axis is used once; the rest is replicated."""
    if len(axes) != len(shape):  # e.g. Adafactor's factored moments, which are small
        return P()
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES.get(axis) if axis else None
        fits = target is not None and target not in spec and size % mesh.shape[target] == 0
        spec.append(target if fits else None)
    return P(*spec)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for each array of a tree of (abstract) arrays.

    Parameters are split by their logical axes. Optimiser states and moving averages are made from the parameters by
    `jax.tree.map` and so carry the same axes. Everything else is replicated.
    """

    def of(leaf: Any) -> Any:
        axes = leaf.get_metadata().get('axes', ()) if isinstance(leaf, nnx.Variable) else ()
        return jax.tree.map(lambda array: NamedSharding(mesh, _spec(array.shape, axes, mesh)), leaf)

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over 'data' and 'fsdp'."""
    return NamedSharding(mesh, BATCH)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError when a global batch cannot be split over the mesh, the hosts and the micro-batches."""
    if batch_size < 1 or accumulate < 1:
        raise UserError(f'train.batch_size is {batch_size} and train.accumulate {accumulate}: both must be 1 or more')
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % (ways * accumulate) or batch_size % jax.process_count():
        raise UserError(
            f'train.batch_size {batch_size} is no multiple of {ways} (mesh data·fsdp) times {accumulate} '
            f'(train.accumulate) and of {jax.process_count()} hosts: change one of them'
        )


def shard_batch(mesh: Mesh, host_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this host's rows of a batch onto its devices as one global array a key."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in host_batch.items()}
