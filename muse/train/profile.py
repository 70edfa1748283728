"""A profile of a few steps, from the config or asked for while the run goes on.

`train.profile_at` names the first step. While a run goes on, a file called `profile` in its workdir asks for one: it is
noticed when a line is logged, and taken away. Traces lie where TensorBoard's profile page (the package xprof) looks for
them; the `.trace.json.gz` among them opens in Perfetto. Only the first host traces, itself and its devices.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from muse.config import TrainConfig
from muse.errors import UserError, warn
from muse.train.metrics import Writer
from muse.train.task import State

REQUEST = 'profile'


def check_profile(train: TrainConfig) -> None:
    """Raises UserError when the steps to trace are out of range."""
    if not 0 <= train.profile_at <= train.steps:
        raise UserError(f'train.profile_at is {train.profile_at}: give a step from 1 to {train.steps}, or 0 for none')
    if train.profile_steps < 1:
        raise UserError(f'train.profile_steps is {train.profile_steps}: give at least 1')


class Profiler:
    """Starts and stops traces; used with `with`, so that a run that ends in one keeps it."""

    def __init__(self, workdir: Path, train: TrainConfig, writer: Writer):
        self._workdir, self._train, self._writer = workdir, train, writer
        self._from: int | None = None  # first step of the trace under way
        self._last = 0  # its last step

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._from is not None:
            self._stop(self._last)

    def turn(self, step: int, state: State) -> None:
        """Between two steps: `step` have been started, and `state` is the newest."""
        if not self._writer.active:
            return
        if self._from is not None:
            if step >= self._last:
                jax.block_until_ready(state['step'])
                self._stop(step)
        elif step + 1 == self._train.profile_at or (step % self._train.log_every_steps == 0 and self._asked()):
            jax.block_until_ready(state['step'])
            self._start(step + 1)

    def _asked(self) -> bool:
        request = self._workdir / REQUEST
        try:
            request.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            warn(f"'{request}' asks for a profile but cannot be removed ({error.strerror}): no profile")
            return False
        return True

    def _start(self, first: int) -> None:
        self._from, self._last = first, min(first + self._train.profile_steps - 1, self._train.steps)
        jax.profiler.start_trace(str(self._workdir / 'tensorboard'))

    def _stop(self, last: int) -> None:
        first, self._from = self._from, None
        jax.profiler.stop_trace()
        folders = (self._workdir / 'tensorboard' / 'plugins' / 'profile').iterdir()
        newest = max(folders, key=lambda folder: folder.stat().st_mtime)
        self._writer.line(f'profile of steps {first} to {last}: {newest}')


def step_trace(step: int) -> contextlib.AbstractContextManager[None]:
    """Around the call of step number `step`: names it in a profile."""
    return jax.profiler.StepTraceAnnotation('train', step_num=step)
