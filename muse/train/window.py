"""Metrics between two lines of the log: gathered late, so that the devices never wait for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from muse.train.averages import average
from muse.train.guards import Unread, check_finite
from muse.train.metrics import Writer
from muse.train.rates import Rates
from muse.train.task import Metrics


class Window:
    """Metrics of the steps since the last line; they stay on the devices until a line is written."""

    def __init__(self, writer: Writer, rates: Rates, unread: Unread):
        self._writer, self._rates, self._unread = writer, rates, unread
        self._waiting: list[tuple[int, Metrics]] = []
        self._clock: tuple[float, int] | None = None  # when, and after which step; None while stopped
        self._waited, self._blocked = 0.0, 0.0  # seconds since the clock was set: for data, for the devices
        self._speed: dict[str, float] = {}  # measured before the clock was stopped

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def stop_clock(self, step: int) -> None:
        """Leaves what comes now (an evaluation) out of the measured speed. `step` steps have been started."""
        self._wait_for_devices()
        self._speed = self._speed or self._measure(step)
        self._clock = None

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps a step's metrics, and waits for the step before it: the devices stay one step ahead, not fifty."""
        self._wait_for_devices()
        if self._clock is None:
            self._set_clock(step)
        self._waiting.append((step, metrics))
        self._writer.advance()

    def flush(self, step: int, extra: dict[str, float] | None = None) -> None:
        """Writes one line of means over the waiting steps up to `step`; raises as `check_finite` and `Unread.count`."""
        ready = [(s, m) for s, m in self._waiting if s <= step]
        self._waiting = self._waiting[len(ready) :]
        if not ready:
            return
        values = jax.device_get([m for _, m in ready])
        check_finite([s for s, _ in ready], values)
        unread = self._unread.count(values)
        if not self._speed and self._clock:
            self._speed = self._measure(step)
            self._set_clock(step)
        self._writer.scalars(step, average(values) | unread | self._speed | (extra or {}))
        self._speed = {}

    def _wait_for_devices(self) -> None:
        if self._waiting:
            start = time.monotonic()
            self._waiting[-1][1]['loss'].block_until_ready()
            self._blocked += time.monotonic() - start

    def _set_clock(self, step: int) -> None:
        self._clock, self._waited, self._blocked = (time.monotonic(), step), 0.0, 0.0

    def _measure(self, step: int) -> dict[str, float]:
        if self._clock is None or step <= self._clock[1]:
            return {}
        steps, seconds = step - self._clock[1], time.monotonic() - self._clock[0]
        return self._rates.over(steps, seconds, waited=self._waited, blocked=self._blocked)
