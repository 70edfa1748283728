"""What the loop itself costs a step: the main thread's CPU time around a net that computes next to nothing.

    JAX_PLATFORMS=cpu PYTHONPATH=.:tests:tests/train python tests/train/overhead.py

prints milliseconds a step, on as many devices as there are (XLA_FLAGS=--xla_force_host_platform_device_count=8).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from toys import toy_batch, toy_run, with_train

from muse.train import base, feed, loop
from muse.train.task import Task

FIRST, STEPS = 20, 200  # steps before and in the measurement


def idle_task(run: Any) -> Task:
    """A base of the toy's size whose step hands its arrays on: as many arrays as the real one, and no work."""

    def step(state, batch, key):
        del key
        metrics = {name: jnp.mean(batch['len'], dtype=jnp.float32) for name in ('loss', 'accuracy', 'a', 'b', 'c', 'd')}
        return {**state, 'step': state['step'] + 1}, metrics

    return Task(
        init=lambda key: base.init_state(run, key),
        step=step,
        evaluate=lambda state, batch, key: {},
        export=lambda state, folder: None,
        prepare=lambda batch: batch,
    )


def milliseconds(folder: Path) -> float:
    """CPU time of the main thread a step, over all devices."""
    run = with_train(
        toy_run(), steps=FIRST + STEPS, log_every_steps=50, save_every_steps=0, eval_every_steps=0, grid_every_steps=0
    )
    batch, marks = toy_batch(0, run.train.batch_size), []

    def batches(*_):
        for _ in itertools.count():
            marks.append(time.thread_time())
            yield batch

    feed.host_batches = batches
    loop.make_task = lambda config, mesh: idle_task(config)
    loop._check_data = lambda config: None
    loop.run(run, folder)
    return 1e3 * (marks[-1] - marks[FIRST]) / (len(marks) - 1 - FIRST)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as made:
        found = milliseconds(Path(made))
    print(f'{found:.2f} ms of Python a step, {jax.device_count()} devices')
