"""What a line of the log is made of: averages, rates, the waits of the loop, and where the numbers go."""

from __future__ import annotations

import io
import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_run, with_train

from muse.config import DataConfig, DecoderRun, MeshConfig, SuperresConfig, SuperresRun, VQConfig, VQLossConfig
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.train import window as window_module
from muse.train.averages import Buckets, average
from muse.train.flops import decoder_flops, encoder_flops, peak_flops, step_flops
from muse.train.guards import Unread
from muse.train.masked import by_mask_ratio
from muse.train.metrics import Writer, check_wandb
from muse.train.rates import Rates, rates_of, tokens_per_image
from muse.train.window import Window


def test_buckets_are_means_over_all_rows_of_the_window():
    """Against the rows themselves, taken apart with NumPy."""
    rng = np.random.default_rng(0)
    shares, losses, weights, found = [], [], [], []
    for rows in (3, 7, 5):
        mask = rng.random((rows, 16)) < rng.choice([0.1, 0.5, 0.9], (rows, 1))
        mask[0] = True  # a ratio of 1 belongs to the last bucket
        loss, weight = rng.random(rows).astype(np.float32), rng.choice([0.0, 1.25], rows).astype(np.float32)
        sums = by_mask_ratio(jnp.asarray(mask), jnp.asarray(weight), loss=jnp.asarray(loss))
        found.append({'loss': loss.mean(), **sums})
        shares.append(mask.mean(axis=1)), losses.append(loss), weights.append(weight)
    share, loss, weight = (np.concatenate(x) for x in (shares, losses, weights))
    means = average(found)
    assert means['loss'] == pytest.approx(np.mean([f['loss'] for f in found]))
    seen = 0
    for low in range(0, 100, 20):
        inside = (share >= low / 100) & ((share < (low + 20) / 100) | (low == 80))
        name = f'loss_mask_{low}_{low + 20}'
        if weight[inside].sum():
            assert means[name] == pytest.approx(np.average(loss[inside], weights=weight[inside]), rel=1e-5)
            seen += 1
        else:
            assert name not in means, 'an empty bucket leaves no number, least of all a NaN'
    assert 2 <= seen < 5 and len(means) == 1 + seen


def test_average_of_micro_batches_is_that_of_the_whole():
    whole = Buckets(np.array([2.0, 6.0]), np.array([1.0, 3.0]))
    halves = Buckets(whole.total_K / 2, whole.rows_K / 2)  # as muse.train.micro_batches takes means
    assert average([{'x': whole}]) == average([{'x': halves}]) == {'x_0_50': 2.0, 'x_50_100': 2.0}


def test_rates():
    rates = Rates(batch_size=8, tokens_per_image=16, step_flops=2e12, peak_flops=1e13)
    found = rates.over(10, 4.0, waited=1.0, blocked=2.5)
    assert found['images_per_s'] == 20 and found['tokens_per_s'] == 320
    assert found['mfu'] == pytest.approx(10 * 2e12 / 4.0 / 1e13)
    assert found['data_wait'] == 0.25 and found['host_ms'] == pytest.approx(50)
    assert 'hbm_peak_gib' not in found, 'a CPU does not say'
    assert 'mfu' not in Rates(batch_size=8, tokens_per_image=16, step_flops=2e12, peak_flops=None).over(
        1, 1.0, waited=0.0, blocked=0.0
    )


def test_rates_of_a_run():
    run = toy_run()
    rates = rates_of(run, make_mesh(MeshConfig()))
    assert (rates.batch_size, rates.tokens_per_image, rates.peak_flops) == (16, 16, None)
    assert rates.step_flops == step_flops(run)
    superres = SuperresRun(
        model=SuperresConfig(), train=run.train, data=run.data, eval_data=run.data, tokenizer='', superres_tokenizer=''
    )
    assert tokens_per_image(superres) == 4096


def test_operations_of_a_decoder_run():
    run, model, loss = toy_run(), VQConfig(), VQLossConfig(perceptual=0.0, adversarial=0.0)
    decoder = DecoderRun(
        model=model, train=run.train, data=DataConfig(), eval_data=DataConfig(), tokenizer='', loss=loss
    )
    pixels = 16 * 256 * 256
    assert step_flops(decoder) == encoder_flops(model, pixels) + 3 * decoder_flops(model, pixels)
    assert tokens_per_image(decoder) == 256


def test_peaks_of_names_that_hold_each_other():
    assert peak_flops('NVIDIA H100 PCIe') == 756e12 and peak_flops('NVIDIA L40S') == 362e12
    assert peak_flops('NVIDIA L4') == 121e12 and peak_flops('TPU v5 lite') == 197e12


class Clock:
    """A clock that only the test moves."""

    now = 0.0

    def monotonic(self):
        return self.now


class Loss:
    """A loss that the devices need some seconds for."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def block_until_ready(self):
        self.clock.now += self.seconds

    def __array__(self, dtype=None, copy=None):
        return np.array(1.0)


class Lines(Writer):
    """The part of a writer that a window needs."""

    def __init__(self):
        self.found = []

    def advance(self):
        pass

    def scalars(self, step, values):
        self.found.append((step, values))


@pytest.fixture
def clocked(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(window_module, 'time', clock)
    monkeypatch.setattr(window_module.jax, 'device_get', lambda tree: [{'loss': 1.0} for _ in tree])
    lines = Lines()
    rates = Rates(batch_size=10, tokens_per_image=4, step_flops=1.0, peak_flops=None)
    return clock, lines, Window(lines, rates, Unread(10, 0.5))


def test_the_window_tells_the_waits_apart(clocked):
    clock, lines, window = clocked
    for step in range(1, 4):
        with window.waiting():
            clock.now += 0.25  # for data
        clock.now += 0.05  # the host's own
        window.add(step, {'loss': Loss(clock, 0.7)})
    window.flush(2)
    ((step, values),) = lines.found
    # The clock starts when step 1 has been started: two steps follow, each waiting for the one before.
    assert step == 2 and values['images_per_s'] == pytest.approx(10 / 2.0)
    assert values['data_wait'] == pytest.approx(0.25) and values['host_ms'] == pytest.approx(100)


def test_an_evaluation_does_not_count(clocked):
    clock, lines, window = clocked
    for step in (1, 2):
        with window.waiting():
            clock.now += 0.5
        window.add(step, {'loss': Loss(clock, 0.5)})
    window.stop_clock(2)
    clock.now += 1000  # the evaluation
    window.flush(2, {'eval_loss': 3.0})
    assert lines.found[0][1]['images_per_s'] == pytest.approx(10 / 1.5) and lines.found[0][1]['eval_loss'] == 3.0
    for step in (3, 4, 5):
        with window.waiting():
            clock.now += 0.5
        window.add(step, {'loss': Loss(clock, 0.5)})
    window.flush(4)
    values = lines.found[1][1]
    assert values['images_per_s'] == pytest.approx(10 / 2.0) and values['data_wait'] == pytest.approx(0.5)


def writer(tmp_path, **settings):
    return Writer(tmp_path, **({'start_step': 0, 'steps': 4, 'batch_size': 2, 'active': True} | settings))


def test_plain_lines_hold_what_a_person_reads_and_the_file_all(tmp_path, capsys):
    out = writer(tmp_path)
    out.scalars(1, {'loss': 2.5, 'loss_mask_0_20': 1.5, 'images_per_s': 3.0})
    out.close()
    shown = capsys.readouterr().out
    assert shown == 'step 1/4 loss=2.5 images_per_s=3 eta=2s\n'
    assert (tmp_path / 'log.txt').read_text() == 'step 1/4 loss=2.5 images_per_s=3\n'
    line = json.loads((tmp_path / 'metrics.jsonl').read_text())
    assert line == {'step': 1, 'loss': 2.5, 'loss_mask_0_20': 1.5, 'images_per_s': 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def set_terminal(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setattr(os, 'get_terminal_size', lambda number=1: os.terminal_size((columns, 40)))
    return terminal


def test_a_terminal_of_no_width_gets_lines(tmp_path, capsys, monkeypatch):
    terminal = set_terminal(monkeypatch, 0)
    out = writer(tmp_path)
    out.advance()
    out.scalars(1, {'loss': 2.5})
    out.close()
    assert terminal.getvalue() == '' and capsys.readouterr().out == 'step 1/4 loss=2.5\n'


def test_a_terminal_gets_a_bar_and_what_evaluations_say(tmp_path, capsys, monkeypatch):
    terminal = set_terminal(monkeypatch, 80)
    out = writer(tmp_path)
    out.advance()
    out.scalars(1, {'loss': 2.5, 'images_per_s': 3.0})
    out.scalars(2, {'loss': 2.25, 'eval_loss': 3.0, 'eval_loss_mask_0_20': 1.0})
    out.line('half of it')
    out.close()
    assert 'step 2/4 eval_loss=3\n' in terminal.getvalue() and 'step 1/4' not in terminal.getvalue()
    assert '1/4' in terminal.getvalue() and 'loss 2.5000, 3.0 images/s' in terminal.getvalue()
    assert 'half of it' in terminal.getvalue() and 'step 1/4' in (tmp_path / 'log.txt').read_text()
    assert capsys.readouterr().out == ''


class FakeWandb(types.ModuleType):
    """Remembers what it is told."""

    Error = RuntimeError

    def __init__(self):
        super().__init__('wandb')
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return types.SimpleNamespace(define_metric=lambda *_, **__: None, log=self.logged.append, finish=self.finish)

    def finish(self):
        self.finished += 1

    def Image(self, picture):  # noqa: N802
        return picture.size


def test_wandb_gets_the_same_numbers_under_one_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    (tmp_path / 'config.json').write_text('{"task": "base"}')
    for step in (1, 2):
        out = writer(tmp_path, wandb='muse', start_step=step - 1)
        out.scalars(step, {'loss': 2.5})
        out.pictures(step, np.zeros((1, 4, 6, 3), np.uint8))
        out.close()
    assert fake.logged == [
        {'step': 1, 'loss': 2.5},
        {'step': 1, 'grid': (6, 4)},
        {'step': 2, 'loss': 2.5},
        {'step': 2, 'grid': (6, 4)},
    ]
    assert fake.finished == 2 and fake.started[0]['id'] == fake.started[1]['id']
    assert fake.started[0]['project'] == 'muse' and fake.started[0]['config'] == {'task': 'base'}


def test_wandb_is_not_touched_unasked_and_missed_in_one_line(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    writer(tmp_path).close()
    assert not fake.started
    monkeypatch.setattr('muse.train.metrics.find_spec', lambda name: None)
    check_wandb('')
    with pytest.raises(UserError, match=r"train\.wandb is 'muse', but wandb is not installed: pip install wandb"):
        check_wandb(with_train(toy_run(), wandb='muse').train.wandb)
