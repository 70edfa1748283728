"""The training loop, for any `Task`. Running the same command again goes on from the newest checkpoint.

The order inside is fixed: evaluate → save → next batch → step → log the previous step. Metrics are fetched one step
late, so that the devices always have the next step queued.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Key

from muse.config import BaseRun, DataConfig, DecoderRun, Run, SuperresRun, TrainConfig
from muse.errors import UserError
from muse.mesh import check_batch, make_mesh, replicated, shard_batch, shardings
from muse.train.checkpoint import Checkpoints
from muse.train.metrics import Writer
from muse.train.task import Batch, State, Task
from muse.train.workdir import check_workdir, claim_workdir

_ARRAYS = ('img', 'ids', 'len', 'tok', 'low', 'txt')  # what of a batch goes to the devices; captions and indices stay


def run(config: Run, workdir: str | Path) -> State:
    """Trains to `config.train.steps`, then exports the averaged weights to `<workdir>/export`.

    Returns:
        The final state.

    Raises:
        UserError: a workdir that cannot be written or belongs to another model, a mesh, batch or frozen net that does
            not fit, or a loss that is not finite.
    """
    workdir, train = Path(workdir), config.train
    mesh = make_mesh(config.mesh)
    check_batch(mesh, train.batch_size, train.accumulate)
    check_train(train)
    check_workdir(workdir, config)
    init_key, step_key, eval_key = jax.random.split(jax.random.key(train.seed), 3)
    with jax.set_mesh(mesh):
        task = make_task(config, mesh)
        abstract = abstract_state(task.init, init_key, mesh)
    _check_data(config)
    claim_workdir(workdir, config, abstract)
    with jax.set_mesh(mesh), _checkpoints(config, workdir) as checkpoints:
        restored = checkpoints.restore(abstract)
        state, start = restored or (_init(task, init_key, abstract), 0)
        writer = Writer(
            workdir, start_step=start, steps=train.steps, batch_size=train.batch_size, active=_is_first_host()
        )
        try:
            if restored:
                writer.line(f'resumed after step {start}')
            if start < train.steps:
                state = _train(config, task, mesh, state, start, (step_key, eval_key), checkpoints, writer)
            _export(task, state, mesh, workdir / 'export')
            writer.line(f'weights are in {workdir / "export"}')
        finally:
            writer.close()
    return state


def check_train(train: TrainConfig) -> None:
    """Raises UserError when a count of the loop is out of range."""
    if train.steps < 1:
        raise UserError(f'train.steps is {train.steps}: give at least 1')
    for name in ('log_every_steps', 'save_every_steps', 'eval_every_steps', 'grid_every_steps', 'keep_checkpoints'):
        low = 1 if name in ('log_every_steps', 'keep_checkpoints') else 0
        if getattr(train, name) < low:
            raise UserError(f'train.{name} is {getattr(train, name)}: give at least {low}')
    if not 0 <= train.ema_decay < 1:
        raise UserError(f'train.ema_decay is {train.ema_decay}: give a number from 0 to below 1')


def _check_data(config: Run) -> None:
    """Opens both sources once, so that a wrong one stops the run before anything is written."""
    from muse.data.sources import open_source

    open_source(config.data)
    if config.train.eval_every_steps or config.train.grid_every_steps:
        open_source(config.eval_data)


def make_task(config: Run, mesh: Mesh) -> Task:
    """The functions of the run's kind of training."""
    if isinstance(config, BaseRun):
        from muse.train.base import base_task

        return base_task(config, mesh)
    if isinstance(config, SuperresRun):
        from muse.train.superres import superres_task

        return superres_task(config, mesh)
    if isinstance(config, DecoderRun):
        from muse.train.decoder import decoder_task

        return decoder_task(config, mesh)
    from muse.train.tokenizer import tokenizer_task

    return tokenizer_task(config, mesh)


def _train(
    config: Run,
    task: Task,
    mesh: Mesh,
    state: State,
    start: int,
    keys: tuple[Key[Array, ''], Key[Array, '']],
    checkpoints: Checkpoints,
    writer: Writer,
) -> State:
    train, (step_key, eval_key) = config.train, keys
    batches = _batches(config.data, config, task, start)
    step_fn = jit_step(task.step, state, mesh)
    examiner = _Examiner(config, task, mesh, eval_key)
    window = _Window(writer, train.batch_size)
    for step in range(start, train.steps + 1):
        last = step == train.steps
        # evaluate
        if step > start and _due(train.eval_every_steps, step, last):
            window.stop_clock(step)
            window.flush(step, {f'eval_{name}': value for name, value in examiner.evaluate(state).items()})
        if step > start and _due(train.grid_every_steps, step, last):
            window.stop_clock(step)
            examiner.draw(step, state, writer)
        # save
        if step > start and (last or checkpoints.due(step)):
            window.flush(step)  # a checkpoint never holds a step whose loss is not finite or not yet written
            checkpoints.save(step, state)
        if last:
            break
        # next batch
        batch = _place(next(batches), task, mesh)
        # step
        state, metrics = step_fn(state, batch, step_key)
        # log the previous step
        window.add(step + 1, metrics)
        if step > start and _every(train.log_every_steps, step):
            window.flush(step)
    return state


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _due(period: int, step: int, last: bool) -> bool:
    """Every `period` steps and at the end; a period of 0 is never."""
    return period > 0 and (last or step % period == 0)


class _Window:
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


class _Examiner:
    """Evaluates and draws on the same held-out batches every time."""

    def __init__(self, config: Run, task: Task, mesh: Mesh, key: Key[Array, '']):
        self._config, self._task, self._mesh, self._key = config, task, mesh, key
        self._evaluate = jax.jit(task.evaluate, out_shardings=replicated(mesh))
        self._batches: list[Batch] | None = None

    def _host_batches(self) -> list[Batch]:
        if self._batches is None:
            batches = _batches(self._config.eval_data, self._config, self._task, 0)
            self._batches = list(itertools.islice(batches, max(self._config.train.eval_batches, 1)))
        return self._batches

    def evaluate(self, state: State) -> dict[str, float]:
        """Means over the held-out batches."""
        found = []
        for i, batch in enumerate(self._host_batches()):
            placed = _place(batch, self._task, self._mesh)
            found.append(self._evaluate(state, placed, jax.random.fold_in(self._key, i)))
        found = jax.device_get(found)
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    def draw(self, step: int, state: State, writer: Writer) -> None:
        """Writes the task's sheet of pictures."""
        if self._task.grid is None:
            return
        img_BHWC = self._task.grid(state, _place(self._host_batches()[0], self._task, self._mesh), self._key)
        if img_BHWC is not None:
            writer.pictures(step, np.asarray(jax.device_get(img_BHWC)))


def jit_step(step_of: Callable[..., Any], state: State, mesh: Mesh) -> Any:
    """The jitted step of a `Task`, (state, batch, key) → (state, metrics): the state is donated and stays where it is.

    Args:
        step_of: `Task.step`.
        state: arrays, or shapes with shardings.
        mesh: where they are.
    """
    layout = jax.tree.map(lambda x: x.sharding, state)

    def step(state: State, batch: Batch, key: Key[Array, '']):
        return step_of(state, batch, jax.random.fold_in(key, state['step']))

    # A batch is placed already; beside its rows it may hold a frozen net, which is replicated.
    layouts_in, layouts_out = (layout, None, None), (layout, replicated(mesh))
    return jax.jit(step, donate_argnums=0, in_shardings=layouts_in, out_shardings=layouts_out)


def _batches(data: DataConfig, config: Run, task: Task, start_step: int) -> Iterator[Batch]:
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


def _place(host_batch: Batch, task: Task, mesh: Mesh) -> Batch:
    batch = shard_batch(mesh, {name: host_batch[name] for name in _ARRAYS if name in host_batch})
    return task.prepare(batch) if task.prepare else batch


def abstract_state(init: Callable[..., State], key: Any, mesh: Mesh | AbstractMesh) -> State:
    """The state that `Task.init` makes, as shapes with shardings; nothing is allocated."""
    shapes = jax.eval_shape(init, key)
    layout = shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def _init(task: Task, key: Key[Array, ''], abstract: State) -> State:
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(task.init, out_shardings=layout)(key)


def _export(task: Task, state: State, mesh: Mesh, folder: Path) -> None:
    if jax.process_count() > 1:  # the writing host needs whole tensors
        state = {**state, 'ema': jax.jit(lambda x: x, out_shardings=replicated(mesh))(state['ema'])}
    if _is_first_host():
        task.export(state, str(folder))


def _is_first_host() -> bool:
    return jax.process_index() == 0


def _checkpoints(config: Run, workdir: Path) -> Checkpoints:
    train = config.train
    return Checkpoints(
        workdir / 'checkpoints',
        keep=train.keep_checkpoints,
        every_steps=train.save_every_steps,
        every_minutes=train.save_every_minutes,
    )
