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
from muse.train.averages import average
from muse.train.judge import Judge
from muse.train.metrics import Writer
from muse.train.row_weights import normalise
from muse.train.task import Batch, Metrics, State, Task


class Examiner:
    """Evaluates and draws on the same held-out batches every time."""

    def __init__(self, config: Run, task: Task, mesh: Mesh, key: Key[Array, '']):
        self._config, self._task, self._mesh, self._key = config, task, mesh, key

        def evaluate(state: State, batch: Batch, key: Key[Array, '']) -> Metrics:
            return task.evaluate(state, normalise(batch), key)

        self._evaluate = jax.jit(evaluate, out_shardings=replicated(mesh))
        self._judge = Judge(config.train) if config.train.eval_features and task.pictures else None
        self._batches: list[Batch] | None = None

    def _kept(self) -> list[Batch]:
        if self._batches is None:
            batches = feed.host_batches(self._config.eval_data, self._config, self._task, self._mesh, 0)
            self._batches = list(itertools.islice(batches, self._config.train.eval_batches))
        return self._batches

    def _placed(self, batch: Batch) -> Batch:
        return feed.place(batch, self._task, self._mesh)

    def evaluate(self, state: State) -> dict[str, float]:
        """Means over the held-out batches, and what the judge says of pictures drawn for them."""
        found = []
        for i, batch in enumerate(self._kept()):
            found.append(self._evaluate(state, self._placed(batch), jax.random.fold_in(self._key, i)))
        means = average(jax.device_get(found))
        if self._judge is None:
            return means
        return means | self._judge(self._task, state, map(self._placed, self._kept()), self._key)

    def draw(self, step: int, state: State, writer: Writer) -> None:
        """Writes the task's sheet of pictures."""
        if self._task.grid is None:
            return
        img_BHWC = self._task.grid(state, self._placed(self._kept()[0]), self._key)
        if img_BHWC is not None:
            writer.pictures(step, np.asarray(jax.device_get(img_BHWC)))
