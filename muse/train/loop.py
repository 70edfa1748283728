"""The training loop, for any `Task`. Running the same command again goes on from the newest checkpoint.

The order inside is fixed: evaluate → save → next batch → step → log the previous step. Metrics are fetched one step
late, so that the devices always have the next step queued.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Key

from muse.config import BaseRun, DecoderRun, Run, SuperresRun, TrainConfig
from muse.errors import UserError
from muse.mesh import check_batch, make_mesh, replicated, shardings
from muse.train import feed
from muse.train.checkpoint import Checkpoints
from muse.train.examiner import Examiner
from muse.train.metrics import Writer
from muse.train.task import Batch, State, Task
from muse.train.window import Window
from muse.train.workdir import check_workdir, claim_workdir


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
    batches = feed.host_batches(config.data, config, task, start)
    step_fn = jit_step(task.step, state, mesh)
    examiner = Examiner(config, task, mesh, eval_key)
    window = Window(writer, train.batch_size)
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
        batch = feed.place(next(batches), task, mesh)
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
