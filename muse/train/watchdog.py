"""Ends a run that no longer moves: a collective that waits for a lost host, a file system that does not answer."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, run it again
_LOOKS = 20  # at the clock, in the time that is waited


class Watchdog:
    """Ends the process with `EXIT_CODE` when `beat` is not called for so long; used with `with`.

    Nothing else can end a thread that waits inside a collective, so there is no tidying up: the next start goes on from
    the newest checkpoint.

    Args:
        minutes: how long without a beat; 0: for ever.
    """

    def __init__(self, minutes: float):
        self._seconds = minutes * 60
        self._last = 0, time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, step: int) -> None:
        """The run moves: `step` steps have been started."""
        self._last = (step, time.monotonic())

    def _watch(self) -> None:
        self._last = (self._last[0], time.monotonic())
        while not self._done.wait(self._seconds / _LOOKS):
            step, when = self._last
            if time.monotonic() - when > self._seconds:
                self._end(step)

    def _end(self, step: int) -> None:
        me = f'process {jax.process_index()} of {jax.process_count()}'
        print(
            f'error: nothing has moved for {self._seconds / 60:g} minutes after step {step} ({me}): another host or a '
            'file system does not answer. Run the same command on all hosts to go on from the newest checkpoint; '
            'train.stall_minutes sets the limit. Where each thread stands:',
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_CODE)
