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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from muse.config import MeshConfig
from muse.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

RULES: dict[str, str] = {
    'embed': 'fsdp',
    'mlp': 'tensor',
    'heads': 'tensor',
    'vocab': 'tensor',
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes 'data', 'fsdp', 'tensor', each left to the compiler (`AxisType.Auto`).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = f'data={config.data} fsdp={config.fsdp} tensor={config.tensor}'
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f'mesh {wanted}: sizes are 1 or more, and -1 on one axis at most; change config.mesh')
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f'mesh {wanted} does not fit {len(devices)} devices: change config.mesh')
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _spec(shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh) -> P:
    """Splits each dimension as `RULES` says where it divides; a mesh axis is used once; the rest is replicated."""
    if len(axes) != len(shape):  # e.g. Adafactor's factored moments, which are small
        return P()
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES.get(axis) if axis else None
        fits = target is not None and target not in spec and size % mesh.shape[target] == 0
        spec.append(target if fits else None)
    return P(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
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
