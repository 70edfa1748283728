"""What keeps a run alive or ends it well, each part by itself; test_survival_runs.py does it to real runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_tokenizer_step import PLAYS, shapes_batch
from test_tokenizer_step import toy_run as tokenizer_run
from toys import CODES, toy_batch

from muse.config import DataConfig
from muse.data import pipeline
from muse.data.examples import BadExample, Source
from muse.errors import InputWarning, UserError
from muse.models.vqgan import to_float
from muse.train import hosts, masked, tokenizer, watchdog
from muse.train.guards import UNREAD, NotFiniteError, Unread, UnreadLog, check_finite
from muse.train.row_weights import normalise, unread_rows
from muse.train.signals import StopSignal, Terminated
from muse.train.workdir import disk_errors

DATA = DataConfig(kind='folder', path='unused')


class Numbers(Source):
    """Twelve records, some of which cannot be read."""

    def __init__(self, bad=()):
        self._bad = bad

    def __len__(self):
        return 12

    def example(self, record, rng):
        if record in self._bad:
            raise BadExample(f'record {record}', 'it is torn')
        return {'tok': np.full(3, record), 'chance': rng.integers(1000)}


def batches(monkeypatch, bad, number=6, **options):
    monkeypatch.setattr(pipeline, 'open_source', lambda data: Numbers(bad))
    loader = pipeline.make_loader(DATA, batch_size=4, seed=5, **options)
    return [next(loader) for _ in range(number)]


def test_an_unreadable_record_keeps_its_place(monkeypatch):
    whole = batches(monkeypatch, ())
    with pytest.warns(InputWarning, match='record [78]: it is torn; the next record takes its place, with weight 0'):
        torn = batches(monkeypatch, (7, 8))
    hit = 0
    for good, found in zip(whole, torn, strict=True):
        np.testing.assert_array_equal(good['index'], found['index'])
        wanted = good['tok'][:, 0]
        np.testing.assert_array_equal(found['weight'], ~np.isin(wanted, (7, 8)))
        np.testing.assert_array_equal(found['tok'][:, 0], np.where(np.isin(wanted, (7, 8)), 9, wanted))
        np.testing.assert_array_equal(good['chance'], found['chance'])
        said = [f'record {record}: it is torn' if record in (7, 8) else '' for record in wanted]
        assert found['bad'].tolist() == said
        hit += np.isin(wanted, (7, 8)).sum()
    assert hit == 4, 'two epochs of twelve records'
    with pytest.warns(InputWarning):
        again = batches(monkeypatch, (7, 8), 3, start_step=3, rows=[1, 3])
    for rows, all_rows in zip(again, torn[3:], strict=True):
        np.testing.assert_array_equal(rows['tok'], all_rows['tok'][[1, 3]])
        np.testing.assert_array_equal(rows['weight'], all_rows['weight'][[1, 3]])
    names = pipeline.source_names(DATA, torn[3]['index'].tolist(), 5)
    assert names == [f'record {record}' for record in whole[3]['tok'][:, 0]]


class Table(nnx.Module):
    """The smallest model of tokens: logits by token, and of its neighbour."""

    def __init__(self, rngs):
        self.table_VV = nnx.Param(jax.random.normal(rngs.params(), (CODES + 1, CODES)))

    def __call__(self, canvas_BT):
        return self.table_VV[...][canvas_BT] + self.table_VV[...][jnp.roll(canvas_BT, 1, axis=1)]

    def stacks(self):
        return {}


def test_rows_of_weight_0_count_for_nothing():
    rows = toy_batch(0, 8)
    graphdef, params = nnx.split(Table(nnx.Rngs(params=0)), nnx.Param)

    def predict(model, batch):
        return model(jnp.where(batch['mask'], CODES, batch['tok']))

    mask = np.random.default_rng(0).random((8, 16)) < 0.5
    weight = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)
    kept = np.flatnonzero(weight)

    @jax.jit
    def gradients(batch):
        return masked.gradients(predict, graphdef, params, normalise(batch), 0.1, 1)

    full = {**rows, 'mask': mask}
    wanted, metrics = gradients({name: x[kept] for name, x in full.items()})
    found, weighed = gradients({**full, 'weight': weight})
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)
    for name in ('loss', 'accuracy'):
        np.testing.assert_allclose(weighed[name], metrics[name], rtol=1e-6)
    np.testing.assert_allclose(
        weighed['loss_mask'].total_K.sum() / weighed['loss_mask'].rows_K.sum(), metrics['loss'], rtol=1e-6
    )
    same, plain = gradients({**full, 'weight': np.ones(8, np.float32)}), gradients(full)
    jax.tree.map(np.testing.assert_array_equal, same, plain)


def test_weights_have_a_mean_of_one():
    batch = {'weight': jnp.array([1.0, 0.0, 1.0, 0.0, 1.0])}
    np.testing.assert_allclose(normalise(batch)['weight'], np.array([5, 0, 5, 0, 5]) / 3, rtol=1e-6)
    assert int(unread_rows(batch)) == 2
    np.testing.assert_array_equal(normalise({'weight': jnp.zeros(4)})['weight'], np.zeros(4))
    assert normalise({'tok': 1}) == {'tok': 1}


def test_too_many_unreadable_records_end_the_run():
    unread = Unread(100, 0.01)
    assert unread.count([{'loss': 1.0, UNREAD: 0}] * 3) == {}
    values = [{'loss': 1.0, UNREAD: 4}, {'loss': 1.0, UNREAD: 6}]
    assert unread.count(values) == {UNREAD: 10.0}, 'ten are always allowed'
    assert values == [{'loss': 1.0}] * 2
    with pytest.raises(UserError, match=r'^11 of 600 records read could not be used, over data.max_unread = 0.01'):
        unread.count([{UNREAD: 1}])
    many = Unread(1000, 0.01)
    assert many.count([{UNREAD: 10} for _ in range(5)]) == {UNREAD: 50.0}


def test_unreadable_records_are_named_once_each(tmp_path):
    log = UnreadLog(tmp_path, 3, 0)
    rows = {'index': np.arange(4) + 40, 'bad': np.array(['', 'a.png: it is empty', '', ''], object)}
    for step in (1, 2):
        log.note(step, {**rows, 'weight': np.array([1, 0, 1, 1], np.float32)})
    log.note(3, {**rows, 'weight': np.ones(4, np.float32)})
    file = tmp_path / 'unread' / '3.jsonl'
    line = {'step': 1, 'index': 41, 'reason': 'a.png: it is empty'}
    assert [json.loads(text) for text in file.read_text().splitlines()] == [line, {**line, 'step': 2}]
    UnreadLog(tmp_path, 3, 1)  # resumed after step 1
    assert len(file.read_text().splitlines()) == 1


def test_a_loss_that_is_not_finite_names_its_window():
    check_finite([1, 2], [{'loss': 1.0}, {'loss': 2.0}])
    with pytest.raises(NotFiniteError, match=r'at step 8 \(steps 7 to 9') as caught:
        check_finite([7, 8, 9], [{'loss': 1.0}, {'loss': np.inf}, {'loss': np.nan}])
    assert caught.value.first == 8 and caught.value.steps == (7, 9)
    fine = {'loss': 1.0, 'param_norm': 1.0}
    with pytest.raises(NotFiniteError, match=r'weights are not finite after step 7 \(steps 6 to 8') as caught:
        check_finite([6, 7, 8], [fine, {**fine, 'param_norm': np.nan}, {'loss': np.nan, 'param_norm': np.nan}])
    assert caught.value.first == 7, 'the step whose gradient was wrong, not the one that showed it'


def test_sigterm_is_noted_and_the_handler_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.came
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came
    assert signal.getsignal(signal.SIGTERM) == before
    assert Terminated(7).code == 143 and 'after step 7, which is saved' in str(Terminated(7))


def test_the_watchdog_ends_a_run_that_stands_still(monkeypatch, capfd):
    ended = threading.Event()
    codes: list[int] = []

    def leave(code):
        codes.append(code)
        dog.__exit__()  # ends the thread, where os._exit would end all
        ended.set()

    monkeypatch.setattr(watchdog.os, '_exit', leave)
    with watchdog.Watchdog(0.5 / 60) as dog:
        for step in range(20):
            dog.beat(step)
            assert not ended.wait(0.05), 'it moves'
        assert ended.wait(20)
    assert codes == [75]
    error = capfd.readouterr().err
    assert error.startswith('error: nothing has moved for 0.00833333 minutes after step 19 (process 0 of 1)')
    assert 'test_the_watchdog_ends_a_run_that_stands_still' in error, 'where each thread stands'


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_one_line(number):
    says = r"^'/w/metrics.jsonl' cannot be written \(.*\): make room"
    with pytest.raises(UserError, match=says) as caught, disk_errors(Path('/w')):
        raise OSError(number, os.strerror(number), '/w/metrics.jsonl')
    assert '\n' not in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_errors(Path('/w')):
        raise FileNotFoundError(errno.ENOENT, 'no such file')


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'JAX_NUM_PROCESSES': '2'}, 'JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be set too'),
        ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}, 'JAX_COORDINATOR_ADDRESS must be set too'),
        ({'JAX_PROCESS_ID': 'one'}, "JAX_PROCESS_ID is 'one': give a whole number"),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, 'from 0 to 1'),
    ],
)
def test_half_a_description_of_the_job_is_refused(monkeypatch, variables, message):
    for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.join()


@pytest.mark.slow
@pytest.mark.parametrize('lecam', [0.0, 0.1])
def test_pictures_of_weight_0_count_for_nothing(lecam):
    loss = {**PLAYS, 'adversarial_start_step': 0, 'lecam': lecam, 'adversarial_adaptive': True}
    run = tokenizer_run(loss)
    state, net = tokenizer.init_state(run, jax.random.key(0)), tokenizer.load_net(run.loss, run.model, None)
    nets, img_BHWC = tokenizer.make_nets(run), to_float(jnp.asarray(shapes_batch(0)['img']))
    weight_B = jnp.array([1, 0, 1, 1, 0, 1, 1, 0], jnp.float32)
    kept = np.flatnonzero(weight_B)

    @jax.jit
    def gradients(img_BHWC, weight_B):
        weight_B = normalise({'weight': weight_B})['weight']
        return tokenizer.gradients(run, nets, state, net, img_BHWC, jnp.array(True), weight_B)[0]

    wanted, found = gradients(img_BHWC[kept], jnp.ones(5)), gradients(img_BHWC, weight_B)
    for part in ('tokenizer', 'critic', 'metrics'):
        for mine, theirs in zip(*map(jax.tree.leaves, (getattr(found, part), getattr(wanted, part))), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_the_loops_own_work_is_under_two_milliseconds_a_step():
    root = Path(__file__).parents[2]
    folders = (root, root / 'tests', root / 'tests' / 'train')
    flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'PYTHONPATH': ':'.join(map(str, folders))}
    # In a process of its own: annotations are enforced in this one, and that takes longer than the loop.
    command = [sys.executable, str(root / 'tests' / 'train' / 'overhead.py')]
    done = subprocess.run(command, env=os.environ | flags, cwd=root, capture_output=True, text=True)
    print(done.stdout.splitlines()[-1:], done.stderr)
    assert float(done.stdout.splitlines()[-1].split()[0]) < 2
