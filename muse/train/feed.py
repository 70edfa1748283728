"""The batches of a run: from its data to the devices."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from muse.config import DataConfig, Run
from muse.mesh import shard_batch
from muse.train.task import Batch, Task

_ARRAYS = ('img', 'ids', 'len', 'tok', 'low', 'txt')  # what of a batch goes to the devices; captions and indices stay


def host_batches(data: DataConfig, config: Run, task: Task, start_step: int) -> Iterator[Batch]:
    """What this host reads for each step from `start_step` on."""
    from muse.data.pipeline import make_loader

    loader = make_loader(
        data,
        batch_size=config.train.batch_size // jax.process_count(),
        seed=config.train.seed,
        start_step=start_step,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        encode_text=task.encode_text,
        repeat=True,
    )
    return iter(loader)


def place(host_batch: Batch, task: Task, mesh: Mesh) -> Batch:
    """A host's rows as the global batch on the mesh, after the task's `prepare`."""
    batch = shard_batch(mesh, {name: host_batch[name] for name in _ARRAYS if name in host_batch})
    return task.prepare(batch) if task.prepare else batch
