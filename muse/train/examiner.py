"""Evaluations and sheets of pictures while training goes on."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from muse.config import Run
from muse.mesh import replicated
from muse.train import feed
from muse.train.metrics import Writer
from muse.train.task import Batch, State, Task


class Examiner:
    """Evaluates and draws on the same held-out batches every time."""

    def __init__(self, config: Run, task: Task, mesh: Mesh, key: Key[Array, '']):
        self._config, self._task, self._mesh, self._key = config, task, mesh, key
        self._evaluate = jax.jit(task.evaluate, out_shardings=replicated(mesh))
        self._batches: list[Batch] | None = None

    def _kept(self) -> list[Batch]:
        if self._batches is None:
            batches = feed.host_batches(self._config.eval_data, self._config, self._task, 0)
            self._batches = list(itertools.islice(batches, max(self._config.train.eval_batches, 1)))
        return self._batches

    def evaluate(self, state: State) -> dict[str, float]:
        """Means over the held-out batches."""
        found = []
        for i, batch in enumerate(self._kept()):
            placed = feed.place(batch, self._task, self._mesh)
            found.append(self._evaluate(state, placed, jax.random.fold_in(self._key, i)))
        found = jax.device_get(found)
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    def draw(self, step: int, state: State, writer: Writer) -> None:
        """Writes the task's sheet of pictures."""
        if self._task.grid is None:
            return
        img_BHWC = self._task.grid(state, feed.place(self._kept()[0], self._task, self._mesh), self._key)
        if img_BHWC is not None:
            writer.pictures(step, np.asarray(jax.device_get(img_BHWC)))
