"""Short trainings of tokenizers side by side: one pool of pictures, one process a trial, one row of numbers each.

What tools/ablate_tokenizer.py and tools/curve_tokenizer.py share. All trials see the same pictures in the same order:
they are drawn once into an array on disk, while the trials compile. So trials that share a device are not slowed by
making pictures, and differ in their settings alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import runpy
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from muse.config import DataConfig, TokenizerRun, read_run
from muse.errors import UserError, warn

_WAIT_SECONDS, _MOST_SECONDS = 0.5, 1800  # for the pictures to be drawn
_AHEAD = 2  # steps queued on the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One short training and its judgement.

    Attributes:
        name: of the row.
        run: what to train; its data are the pool's.
        crop: side of the squares cut out for training, in pixels; the pictures are judged whole.
    """

    name: str
    run: TokenizerRun
    crop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials share: folders (of pictures, of judges; '' leaves a judge out) and the size of a batch."""

    pool: str
    perceptual: str
    features: str
    eval_batch: int = 16


def numbers(text: str) -> tuple[int, ...]:
    """'1,2,3' → (1, 2, 3), for argparse, which turns the error into a line."""
    found = tuple(map(int, text.split(',')))
    if min(found) < 1:
        raise ValueError(text)
    return found


def read_config(path: str, *, data: str, perceptual: str, image_size: int) -> TokenizerRun:
    """The tokenizer run of a config file, on other data and another side.

    Raises:
        UserError: no such file, or the config of something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"config file '{path}' does not exist: give a file of configs/")
    run = read_run(runpy.run_path(path)['get_config']().to_dict())
    if not isinstance(run, TokenizerRun):
        raise UserError(f"'{path}' trains no tokenizer: give one that does")
    held_out = dataclasses.replace(run.eval_data, path=data, image_size=image_size)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, path=data, image_size=image_size),
        eval_data=held_out,
        loss=dataclasses.replace(run.loss, perceptual_net=perceptual),
    )


def changed(
    run: TokenizerRun,
    *,
    model: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> TokenizerRun:
    """The run with some keys of its groups replaced."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **(model or {})),
        loss=dataclasses.replace(run.loss, **(loss or {})),
        train=dataclasses.replace(run.train, **(train or {})),
    )


def pool_path(folder: str, data: DataConfig) -> Path:
    """Where the pictures of a source, split and side lie."""
    about = repr(dataclasses.replace(data, path=os.path.abspath(data.path), workers=0))
    return Path(folder) / f'{data.split}_{data.image_size}_{zlib.crc32(about.encode()):08x}.npy'


def draw_pool(folder: str, data: DataConfig, number: int, *, seed: int) -> Path:
    """Draws `number` pictures into an array `[N, H, W, 3]` uint8, unless it is there.

    Raises:
        UserError: as `muse.data.pipeline.make_loader`.
    """
    from muse.data.pipeline import make_loader

    path = pool_path(folder, data)
    if path.exists() and np.load(path, mmap_mode='r').shape[0] == number:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, batch = path.with_suffix('.tmp'), min(64, number)
    shape = (number, data.image_size, data.image_size, 3)
    made = np.lib.format.open_memmap(tmp, 'w+', np.uint8, shape)
    loader = make_loader(data, batch_size=batch, seed=seed, repeat=True)
    for start in range(0, number, batch):
        made[start : start + batch] = next(loader)['img'][: number - start]
    made.flush()
    os.replace(tmp, path)
    return path


def _opened(path: Path) -> np.ndarray:
    for _ in range(round(_MOST_SECONDS / _WAIT_SECONDS)):
        if path.exists():
            break
        time.sleep(_WAIT_SECONDS)
    else:
        raise UserError(f"'{path}' was not drawn within {_MOST_SECONDS} s: give a smaller --pool or more --workers")
    return np.load(path, mmap_mode='r')


def _batches(trial: Trial, pictures_NHWC: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The same rows and cuts for every trial of one seed, batch size and crop."""
    for step in range(trial.run.train.steps):
        rng = np.random.default_rng((trial.run.train.seed, step))
        rows = np.sort(rng.choice(len(pictures_NHWC), trial.run.train.batch_size))
        top, left = rng.integers(0, pictures_NHWC.shape[1] - trial.crop + 1, 2)
        yield {'img': pictures_NHWC[rows, top : top + trial.crop, left : left + trial.crop]}


def _train(trial: Trial, setting: Setting) -> tuple[Any, dict[str, float]]:
    """The averaged weights, and what training says of itself. Compiles while the pictures are still being drawn."""
    import jax

    from muse.train.tokenizer import tokenizer_task

    run = trial.run
    task = tokenizer_task(run)
    assert task.prepare is not None
    init_key, step_key = jax.random.split(jax.random.key(run.train.seed))
    state = task.init(init_key)  # op by op: as one program it compiles longer than a short run trains
    shape = (run.train.batch_size, trial.crop, trial.crop, 3)
    example = task.prepare({'img': jax.ShapeDtypeStruct(shape, np.uint8)})

    def step(state: Any, batch: Any, key: Any) -> Any:
        return task.step(state, batch, jax.random.fold_in(key, state['step']))

    begun = time.monotonic()
    compiled = jax.jit(step, donate_argnums=0).lower(state, example, step_key).compile()
    compile_s = time.monotonic() - begun
    pictures_NHWC = _opened(pool_path(setting.pool, run.data))
    begun, history = time.monotonic(), []
    for batch in _batches(trial, pictures_NHWC):
        state, metrics = compiled(state, task.prepare({'img': jax.device_put(batch['img'])}), step_key)
        history.append(metrics)
        if len(history) > _AHEAD:
            history[-_AHEAD - 1]['loss'].block_until_ready()
    last = jax.device_get(history[-20:])
    seconds = time.monotonic() - begun
    if not all(math.isfinite(m['loss']) for m in last):
        raise UserError(f'{trial.name}: the loss is not finite; lower optim.learning_rate')
    made = run.train.steps * run.train.batch_size
    speed = {'compile_s': compile_s, 'train_s': seconds, 'images_per_s': made / seconds}
    names = ('loss', 'l1', 'perceptual', 'disc', 'adversarial')
    return state['ema'], speed | {f'train_{n}': float(np.mean([m[n] for m in last])) for n in names}


@functools.cache
def judges(perceptual_folder: str, features_folder: str) -> tuple[dict[str, Any], Any]:
    """LPIPS nets by metric name, and the feature net of the Fréchet distance or None."""
    from muse.evals import features
    from muse.models import perceptual

    nets = {}
    if perceptual_folder:
        nets = {f'lpips_{arch}': perceptual.load_lpips(perceptual_folder, arch) for arch in ('vgg', 'alex')}
    return nets, features.load_features(features_folder) if features_folder else None


def run_trial(trial: Trial, setting: Setting) -> dict[str, Any]:
    """Trains and judges; a row of numbers."""
    import jax

    from muse.evals.reconstruction import evaluate_tokenizer
    from muse.train.command_line import use_compilation_cache

    use_compilation_cache()
    params, about = _train(trial, setting)
    held_out = _opened(pool_path(setting.pool, trial.run.eval_data))
    nets, feature_net = judges(setting.perceptual, setting.features)
    batches = (held_out[i : i + setting.eval_batch] for i in range(0, len(held_out), setting.eval_batch))
    found = evaluate_tokenizer(trial.run.model, params, batches, judges=nets, feature_net=feature_net)
    model, side = trial.run.model, trial.run.eval_data.image_size
    size = {
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
        'stored_bytes': (side // model.factor) ** 2 * math.log2(model.codebook_size) / 8,
        'seed': trial.run.train.seed,
        'steps': trial.run.train.steps,
        'batch_size': trial.run.train.batch_size,
        'device': jax.devices()[0].device_kind,
    }
    return {'name': trial.name, **found, **size, **about}


def run_trials(
    trials: Sequence[Trial], setting: Setting, *, jobs: int, pool: int, heldout: int, out: Path, deadline: float
) -> list[dict[str, Any]]:
    """Runs trials in processes of their own, `jobs` at a time, and prints and appends each row to `out` as it comes.

    Args:
        trials: what to run, in this order.
        setting: what they share.
        jobs: processes at a time; they share the device.
        pool: pictures to train on.
        heldout: pictures to judge on.
        out: a JSONL file.
        deadline: of `time.monotonic`; what still runs then is ended.

    Returns:
        The rows, in the order of `trials`. A trial that failed or did not finish has none; a warning names it.

    Raises:
        UserError: the data or a judge is missing.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # several processes share the device
    out.parent.mkdir(parents=True, exist_ok=True)
    sources = _sources(trials, pool, heldout)
    _check(sources, setting)
    started = _Started(trials, setting, jobs, deadline)
    rows: dict[int, dict[str, Any]] = {}
    try:
        started.more()
        for data, number, seed in sources:
            draw_pool(setting.pool, data, number, seed=seed)
        while ready := started.finished():
            for i, row in ready:
                if isinstance(row, str):
                    warn(f'{trials[i].name}: {row}')
                    continue
                rows[i] = row
                with out.open('a', encoding='utf-8') as stream:
                    print(json.dumps(row), file=stream)
                print(json.dumps(row), flush=True)
            started.more()
    finally:
        late = started.end()
    if late:
        names = ', '.join(trials[i].name for i in late)
        warn(f'not finished within the time limit: {names}; give more --minutes or fewer --steps')
    return [rows[i] for i in sorted(rows)]


class _Started:
    """Processes of trials, at most `jobs` at a time."""

    def __init__(self, trials: Sequence[Trial], setting: Setting, jobs: int, deadline: float):
        self.waiting, self.setting = list(enumerate(trials)), setting
        self.jobs, self.deadline = jobs, deadline
        self.running: dict[connection.Connection, tuple[int, Any]] = {}

    def more(self) -> None:
        """Starts the next trials while there is room and time."""
        context = multiprocessing.get_context('spawn')
        while self.waiting and len(self.running) < self.jobs and time.monotonic() < self.deadline:
            i, trial = self.waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(sender, trial, self.setting), daemon=True)
            process.start()
            sender.close()
            self.running[receiver] = (i, process)

    def finished(self) -> list[tuple[int, dict[str, Any] | str]]:
        """Waits for trials to end: the number of each with its row, or with what went wrong. Empty when time is up."""
        found: list[tuple[int, dict[str, Any] | str]] = []
        left = max(0.0, self.deadline - time.monotonic())
        for receiver in connection.wait(list(self.running), left) if self.running else []:
            assert isinstance(receiver, connection.Connection)
            i, process = self.running.pop(receiver)
            try:
                row = receiver.recv()
            except EOFError:
                row = 'its process ended without a result; the error is above'
            process.join()
            found.append((i, row))
        return found

    def end(self) -> list[int]:
        """Ends what still runs; returns the numbers of all trials without a result."""
        for _, process in self.running.values():
            process.terminate()
            process.join()
        return sorted([i for i, _ in self.running.values()] + [i for i, _ in self.waiting])


def _end_with_parent() -> None:
    """A killed command must not leave trials behind that hold the device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(sender: connection.Connection, trial: Trial, setting: Setting) -> None:
    """What the process of a trial does: sends its row, or the message of a `UserError`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send(run_trial(trial, setting))
    except UserError as error:
        sender.send(str(error))


def _sources(trials: Sequence[Trial], pool: int, heldout: int) -> list[tuple[DataConfig, int, int]]:
    """Each set of pictures that some trial needs, once: (source, number, seed)."""
    found = {}
    for trial in trials:
        for data, number, seed in ((trial.run.data, pool, 1), (trial.run.eval_data, heldout, 2)):
            found[pool_path('', data)] = (data, number, seed)
    return list(found.values())


def _check(sources: Sequence[tuple[DataConfig, int, int]], setting: Setting) -> None:
    """Raises UserError where a folder lacks what is needed, before any process waits for it."""
    from muse.data.sources import open_source

    for data, _, _ in sources:
        open_source(data)
    for folder, names in ((setting.perceptual, ('vgg', 'alex')), (setting.features, ('efficientnet_lite0',))):
        for name in names:
            if folder and not (Path(folder) / f'{name}.safetensors').is_file():
                raise UserError(f"'{folder}' holds no {name}.safetensors: run the tools/fetch_*.py that makes it")


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps keys to format specs, and a row may lack one."""
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    for row in rows:
        cells = [format(row[key], spec) if key in row else '' for key, spec in columns.items()]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
