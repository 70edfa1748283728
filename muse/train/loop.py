"""The training loop, for any `Task`. Running the same command again goes on from the newest checkpoint.

The order inside is fixed: evaluate → save → next batch → step → log the previous step. Metrics are fetched one step
late, so that the devices always have the next step queued.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Key

from muse.config import BaseRun, DecoderRun, Run, SuperresRun, TrainConfig
from muse.errors import UserError
from muse.mesh import check_batch, make_mesh, replicated, shardings
from muse.train import feed
from muse.train.checkpoint import Checkpoints
from muse.train.emergency import save_emergency
from muse.train.examiner import Examiner
from muse.train.guards import UNREAD, NotFiniteError, Unread, UnreadLog
from muse.train.judge import check_judge
from muse.train.metrics import Writer, check_wandb
from muse.train.profile import Profiler, check_profile, step_trace
from muse.train.ranges import check_attention, check_ranges
from muse.train.rates import rates_of
from muse.train.row_weights import normalise, unread_rows
from muse.train.signals import NOTHING, SAVE, STOP, StopSignal, Terminated, Wishes, split_wish
from muse.train.task import Batch, State, Task
from muse.train.watchdog import Watchdog
from muse.train.window import Window
from muse.train.workdir import check_workdir, claim_workdir, disk_errors


def run(config: Run, workdir: str | Path) -> State:
    """Trains to `config.train.steps`, then exports the averaged weights to `<workdir>/export`.

    Returns:
        The final state.

    Raises:
        UserError: a workdir that cannot be written or belongs to another model, a number out of range, a mesh, batch
            or frozen net that does not fit, a loss that is not finite, too many records that cannot be read, or a disk
            that refuses.
        Terminated: SIGTERM has come, and what was reached is saved.
    """
    workdir, train = Path(workdir), config.train
    check_ranges(config)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, train.batch_size, train.accumulate)
    check_attention(config, mesh.devices.flat[0].platform)
    check_profile(train)
    check_wandb(train.wandb)
    check_judge(train)
    check_workdir(workdir, config)
    init_key, step_key, eval_key = jax.random.split(jax.random.key(train.seed), 3)
    with jax.set_mesh(mesh):
        task = make_task(config, mesh)
        abstract = abstract_state(task.init, init_key, mesh)
    _check_data(config)
    claim_workdir(workdir, config, abstract)
    with (
        disk_errors(workdir),
        jax.set_mesh(mesh),
        _checkpoints(config, workdir) as checkpoints,
        Watchdog(train.stall_minutes) as watchdog,
    ):
        restored = checkpoints.restore(abstract)
        state, start = restored or (_init(task, init_key, abstract), 0)
        writer = Writer(
            workdir,
            start_step=start,
            steps=train.steps,
            batch_size=train.batch_size,
            active=_is_first_host(),
            wandb=train.wandb,
        )
        try:
            if restored:
                writer.line(f'resumed after step {start}')
            if start < train.steps:
                writer.line(_heading(config, abstract, mesh, start))
                with Profiler(workdir, train, writer) as profiler:
                    around = _Around(workdir, checkpoints, writer, profiler, watchdog)
                    state = _train(config, task, mesh, state, start, (step_key, eval_key), around)
            _export(task, state, mesh, workdir / 'export')
            writer.line(f'weights are in {workdir / "export"}')
        except Terminated as end:
            writer.line(str(end))
            if not writer.active:
                print(end, file=sys.stderr)
            raise
        finally:
            writer.close()
    return state


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


def _heading(config: Run, abstract: State, mesh: Mesh, start: int) -> str:
    """What the first line says: the first step is compiled, which may take minutes."""
    size = sum(x.size for x in jax.tree.leaves(abstract['params']))
    shape = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    where = f'{mesh.size} x {mesh.devices.flat[0].device_kind}'
    return (
        f'{config.task} of {size:,} parameters on {where} ({shape}): steps {start + 1:,} to '
        f'{config.train.steps:,} of {config.train.batch_size} examples, the first of which is compiled now'
    )


class _Around(NamedTuple):
    """What lies around the steps of a run."""

    workdir: Path
    checkpoints: Checkpoints
    writer: Writer
    profiler: Profiler
    watchdog: Watchdog


def _train(
    config: Run,
    task: Task,
    mesh: Mesh,
    state: State,
    start: int,
    keys: tuple[Key[Array, ''], Key[Array, '']],
    around: _Around,
) -> State:
    train, (step_key, eval_key), (workdir, checkpoints, writer, profiler, watchdog) = config.train, keys, around
    batches = feed.host_batches(config.data, config, task, mesh, start)
    unread = UnreadLog(workdir, jax.process_index(), start)
    step_fn = jit_step(task.step, state, mesh)
    examiner, wishes = Examiner(config, task, mesh, eval_key), Wishes(mesh, train.batch_size)
    window = Window(writer, rates_of(config, mesh), Unread(train.batch_size, config.data.max_unread))
    try:
        with StopSignal() as stop:

            def wanted() -> int:
                return STOP if stop.came else SAVE if checkpoints.late() else NOTHING

            for step in range(start, train.steps + 1):
                last = step == train.steps
                watchdog.beat(step)
                checkpoints.check()
                wish = wanted()
                agreed = wishes.agreed(wish) if step > start else NOTHING
                # evaluate
                if step > start and agreed != STOP:
                    _examine(step, last, train, state, examiner, window, writer)
                    agreed = wishes.agreed(wish := wanted())  # it may have taken long
                # save
                if step > start and (last or agreed == STOP or checkpoints.due(step, agreed == SAVE)):
                    window.flush(step)  # a checkpoint never holds a step whose loss is not finite or not yet written
                    checkpoints.save(step, state)
                if agreed == STOP:
                    checkpoints.wait()
                    raise Terminated(step)
                if last:
                    break
                profiler.turn(step, state)
                # next batch
                with window.waiting():
                    host_batch = next(batches)
                unread.note(step + 1, host_batch)
                batch = wishes.add(wish, feed.place(host_batch, task, mesh))
                # step
                with step_trace(step + 1):
                    state, metrics = step_fn(state, batch, step_key)
                # log the previous step
                window.add(step + 1, wishes.take(metrics))
                if step > start and _every(train.log_every_steps, step):
                    window.flush(step)
    except NotFiniteError as error:
        raise UserError(f'{error}; {save_emergency(workdir, config, state, error)}') from None
    return state


def _examine(
    step: int, last: bool, train: TrainConfig, state: State, examiner: Examiner, window: Window, writer: Writer
) -> None:
    """Evaluates and draws where it is due."""
    if _due(train.eval_every_steps, step, last):
        window.stop_clock(step)
        window.flush(step, {f'eval_{name}': value for name, value in examiner.evaluate(state).items()})
    if _due(train.grid_every_steps, step, last):
        window.stop_clock(step)
        examiner.draw(step, state, writer)


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
        batch, wish = split_wish(batch)
        state, metrics = step_of(state, normalise(batch), jax.random.fold_in(key, state['step']))
        return state, {**metrics, **wish, UNREAD: unread_rows(batch)}

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
    state = jax.jit(task.init, out_shardings=layout)(key)
    return task.start(state) if task.start else state


def _export(task: Task, state: State, mesh: Mesh, folder: Path) -> None:
    if jax.process_count() > 1:
        state = {**state, 'ema': jax.tree.map(lambda x: _whole(x, mesh), state['ema'])}
    if _is_first_host():
        task.export(state, str(folder))


def _whole(x: Array, mesh: Mesh) -> Any:
    """An array of several hosts in the first one's memory; on the devices there is one whole array at a time."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(x)
    return np.asarray(whole.addressable_data(0)) if _is_first_host() else x


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
