"""Metrics between two lines of the log: gathered late, so that the devices never wait for them."""

from __future__ import annotations

import math
import time

import jax
import numpy as np
from jaxtyping import Array

from muse.errors import UserError
from muse.train.metrics import Writer


class Window:
    """Metrics of the steps since the last line; they stay on the devices until a line is written."""

    def __init__(self, writer: Writer, batch_size: int):
        self._writer, self._batch_size = writer, batch_size
        self._waiting: list[tuple[int, dict[str, Array]]] = []
        self._clock: tuple[float, int] | None = None  # when, and after which step; None while stopped
        self._speed: dict[str, float] = {}  # measured before the clock was stopped

    def stop_clock(self, step: int) -> None:
        """Leaves what comes now (an evaluation) out of the measured speed. `step` steps have been started."""
        if self._waiting:
            self._waiting[-1][1]['loss'].block_until_ready()
        self._speed = self._speed or self._measure(step)
        self._clock = None

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps a step's metrics, and waits for the step before it: the devices stay one step ahead, not fifty."""
        if self._waiting:
            self._waiting[-1][1]['loss'].block_until_ready()
        if self._clock is None:
            self._clock = (time.monotonic(), step)
        self._waiting.append((step, metrics))
        self._writer.advance()

    def flush(self, step: int, extra: dict[str, float] | None = None) -> None:
        """Writes one line of means over the waiting steps up to `step`; raises when a loss is not finite."""
        ready = [(s, m) for s, m in self._waiting if s <= step]
        self._waiting = self._waiting[len(ready) :]
        if not ready:
            return
        values = jax.device_get([m for _, m in ready])
        bad = [s for (s, _), v in zip(ready, values, strict=True) if not math.isfinite(v['loss'])]
        if bad:
            raise UserError(
                f'the loss is not finite at step {bad[0]} (steps {ready[0][0]} to {ready[-1][0]} since the last line): '
                'lower optim.learning_rate or raise optim.warmup_steps, and start again from the last checkpoint'
            )
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        if not self._speed and self._clock:
            self._speed, self._clock = self._measure(step), (time.monotonic(), step)
        self._writer.scalars(step, means | self._speed | (extra or {}))
        self._speed = {}

    def _measure(self, step: int) -> dict[str, float]:
        if self._clock is None or step <= self._clock[1]:
            return {}
        seconds = max(time.monotonic() - self._clock[0], 1e-9)
        return {'images_per_s': (step - self._clock[1]) * self._batch_size / seconds}
