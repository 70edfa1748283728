"""SIGTERM, which a scheduler sends before it takes a machine away: the run saves after the current step, and ends.

What one host wants (to end, to save because time has passed) all hosts must do after the same step. A wish therefore
travels as a number beside the rows of a batch; the step returns the largest one as a metric, and every host reads it
when that step is done. This asks for no message of its own and no wait that the loop does not have anyway.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from muse.mesh import shard_batch
from muse.train.feed import local_rows
from muse.train.task import Batch, Metrics

EXIT_CODE = 143  # as of a process that SIGTERM ended at once: schedulers take it for a preemption, not for a success
NOTHING, SAVE, STOP = 0, 1, 2  # wishes; the larger one wins
WISH = 'wish'


class Terminated(SystemExit):
    """The run was asked to end, and what it has reached is saved. Ends the process with `EXIT_CODE`."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f'SIGTERM: stopped after step {self.step}, which is saved: run the same command to go on'


class StopSignal:
    """Catches SIGTERM; used with `with`. `came` says whether it has come to this host."""

    def __init__(self):
        self.came, self._before = False, None

    def __enter__(self) -> StopSignal:
        # Signals belong to the main thread: a run started in another (a notebook's) goes without.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.came = True


class Wishes:
    """Wishes of all hosts. One process alone has its way at once; several hear of each other's a step later."""

    def __init__(self, mesh: Mesh, batch_size: int):
        self._mesh, self._several = mesh, jax.process_count() > 1
        self._rows = len(local_rows(mesh, batch_size))
        self._latest: Array | None = None
        self._done: Array | None = None

    def add(self, wish: int, batch: Batch) -> Batch:
        """Adds this host's wish to a batch that is about to be trained on."""
        if not self._several:
            return batch
        return {**batch, **shard_batch(self._mesh, {WISH: np.full(self._rows, wish, np.int32)})}

    def take(self, metrics: Metrics) -> Metrics:
        """Takes the wishes out of the metrics of the step just started."""
        self._done, self._latest = self._latest, metrics.get(WISH)
        return {name: value for name, value in metrics.items() if name != WISH}

    def agreed(self, mine: int) -> int:
        """What all hosts do now: the strongest wish of the last step that is done, or that of a process alone."""
        if not self._several:
            return mine
        return NOTHING if self._done is None else int(self._done)


def split_wish(batch: Batch) -> tuple[Batch, Metrics]:
    """The batch without wishes, and the metric that tells every host the strongest of them."""
    if WISH not in batch:
        return batch, {}
    return {name: value for name, value in batch.items() if name != WISH}, {WISH: jnp.max(batch[WISH])}
