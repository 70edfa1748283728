"""The batches of a run: from its data to the devices."""

from __future__ import annotations

from collections.abc import Iterator

from jax.sharding import Mesh

from muse.config import DataConfig, Run
from muse.mesh import batch_sharding, shard_batch
from muse.train.row_weights import WEIGHT
from muse.train.task import Batch, Task

# What of a batch goes to the devices; captions and indices stay.
_ARRAYS = ('img', 'ids', 'len', 'tok', 'low', 'txt', WEIGHT)


def host_batches(data: DataConfig, config: Run, task: Task, mesh: Mesh, start_step: int) -> Iterator[Batch]:
    """What this host reads for each step from `start_step` on."""
    from muse.data.pipeline import make_loader

    loader = make_loader(
        data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        start_step=start_step,
        rows=local_rows(mesh, config.train.batch_size),
        encode_text=task.encode_text,
        repeat=True,
    )
    return iter(loader)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that this host's devices hold, ascending: what `shard_batch` wants of it."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in slices if index for row in range(*index[0].indices(batch_size))})


def place(host_batch: Batch, task: Task, mesh: Mesh) -> Batch:
    """A host's rows as the global batch on the mesh, after the task's `prepare`."""
    batch = shard_batch(mesh, {name: host_batch[name] for name in _ARRAYS if name in host_batch})
    if not task.prepare:
        return batch
    weights = {name: batch[name] for name in (WEIGHT,) if name in batch}
    return {**task.prepare(batch), **weights}
