"""The loop: what it writes, resuming to the digit, damaged checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from toys import CODES, toy_batch, toy_run, with_model, with_train

from muse.config import DecodeConfig, VQConfig
from muse.data import pipeline
from muse.errors import InputWarning, UserError
from muse.mesh import make_mesh
from muse.models.vqgan import VQGAN
from muse.release.format import load_part, save_part
from muse.train import base, feed, frozen, loop
from muse.train.signals import Terminated
from muse.train.workdir import check_workdir

pytestmark = pytest.mark.usefixtures('quick_compiles')

TOKENIZER = VQConfig(
    channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=CODES, code_dim=4, dtype='float32'
)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    params = nnx.split(VQGAN(TOKENIZER, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    save_part(folder, 'tokenizer', config=TOKENIZER, params=params, storage='float32')
    return str(folder)


def use_toys(patch):
    """Tokens come from `toys`, a function of the step alone; only the loop is tested here."""

    def batches(data, config, task, mesh, start_step):
        offset = 0 if data is config.data else 1000
        return (toy_batch(offset + i, config.train.batch_size) for i in itertools.count(start_step))

    patch.setattr(feed, 'host_batches', batches)
    patch.setattr(loop, '_check_data', lambda config: None)  # the made-up batches have no source
    patch.setattr(frozen, 'check_precomputed', lambda *_: SimpleNamespace(text_encoder_hash='of the text'))


@pytest.fixture(autouse=True)
def toy_data(monkeypatch):
    use_toys(monkeypatch)


def small(tokenizer, **train):
    settings = {'steps': 6, 'log_every_steps': 1, 'save_every_steps': 2, 'eval_every_steps': 3, 'eval_batches': 1}
    run = toy_run(tokenizer=tokenizer, decode=DecodeConfig(steps=2))
    return with_train(run, **(settings | {'grid_every_steps': 6, 'keep_checkpoints': 5} | train))


def lines(workdir):
    return [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


def numbers(workdir):
    clocked = {'images_per_s', 'tokens_per_s', 'data_wait', 'host_ms'}
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines(workdir)]


@pytest.fixture(scope='module')
def finished(tokenizer, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        use_toys(patch)
        state = loop.run(small(tokenizer), workdir)
    return workdir, state


def test_what_a_run_leaves(finished, tokenizer):
    workdir, state = finished
    written = lines(workdir)
    assert [line['step'] for line in written] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line['loss']) for line in written)
    assert [line['step'] for line in written if 'eval_loss' in line] == [3, 6]
    assert json.loads((workdir / 'config.json').read_text())['model']['layers'] == 2
    about = json.loads((workdir / 'run.json').read_text())
    assert about['parameters'] == sum(x.size for x in jax.tree.leaves(state['params']))
    assert about['packages']['jax'] == jax.__version__
    with Image.open(workdir / 'grids' / '00000006.png') as sheet:
        assert sheet.size == (4 * 16 + 3 * 2, 4 * 16 + 3 * 2)
    assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [2, 4, 6]
    part = load_part(workdir / 'export', 'base')
    assert part.extra['tokenizer_sha256'] == load_part(tokenizer, 'tokenizer').hash
    for mine, theirs in zip(jax.tree.leaves(part.params), jax.tree.leaves(state['ema']), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def resume(finished, tokenizer, tmp_path, gone):
    """Copies the finished run as it was when it was killed after step 5, and goes on."""
    shutil.copytree(finished[0], tmp_path / 'run')
    for step in gone:
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
    return loop.run(small(tokenizer), tmp_path / 'run')


def equal(left, right):
    for mine, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_resume_equals_uninterrupted_to_the_digit(finished, tokenizer, tmp_path):
    state = resume(finished, tokenizer, tmp_path, gone=[6])
    equal(state, finished[1])
    assert numbers(tmp_path / 'run') == numbers(finished[0])
    assert 'resumed after step 4' in (tmp_path / 'run' / 'log.txt').read_text()


# Reads that were under way when the first one failed complain of their closed event loop.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_newest_checkpoint_is_skipped(finished, tokenizer, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints' / '6' / 'state').rglob('*'):
        if file.is_file() and file.parent.name == 'd':
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(InputWarning, match=r"checkpoint '.*/6' cannot be read"):
        state = loop.run(small(tokenizer), tmp_path / 'run')
    equal(state, finished[1])
    assert numbers(tmp_path / 'run') == numbers(finished[0])


def test_running_a_finished_run_again_changes_nothing(finished, tokenizer, tmp_path):
    before = numbers(finished[0])
    shutil.copytree(finished[0], tmp_path / 'run')
    equal(loop.run(small(tokenizer), tmp_path / 'run'), finished[1])
    assert numbers(tmp_path / 'run') == before


def test_another_model_in_the_workdir_is_refused(finished, tokenizer):
    with pytest.raises(UserError, match=r'model\.width = 32, the config says 64'):
        loop.run(with_model(small(tokenizer), width=64), finished[0])


def test_a_checkpoint_of_another_config_names_its_tensors(finished, tokenizer, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'run')
    (tmp_path / 'run' / 'config.json').unlink()
    with pytest.raises(UserError, match=r'is of another config: .*mlp/down/kernel is \(2, 64, 32\) float32'):
        loop.run(with_model(small(tokenizer), mlp_dim=128), tmp_path / 'run')


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, tmp_path, monkeypatch):
    real = base.train_step

    def broken(run, graphdef, state, batch, key):
        new, metrics = real(run, graphdef, state, batch, key)
        loss = jax.numpy.where(state['step'] == 2, jax.numpy.nan, metrics['loss'])
        return new, {**metrics, 'loss': loss}

    monkeypatch.setattr(base, 'train_step', broken)
    monkeypatch.setattr(pipeline, 'source_names', lambda data, indices, seed: [f'row {i}' for i in indices])
    with pytest.raises(UserError, match=r'not finite at step 3 \(steps 1 to 4 since.*after step 4 .*emergency'):
        loop.run(small(tokenizer, log_every_steps=50, save_every_steps=4, eval_every_steps=0), tmp_path / 'run')
    assert not any((tmp_path / 'run' / 'checkpoints').iterdir()), 'no checkpoint holds the broken state'
    note = json.loads((tmp_path / 'run' / 'emergency' / '4.json').read_text())
    assert note['first_bad_step'] == 3 and note['window'] == [1, 4]
    assert note['examples'][0] == {'index': 32, 'name': 'row 32'} and len(note['examples']) == 16
    assert (tmp_path / 'run' / 'emergency' / '4' / 'state').is_dir()


def test_a_gradient_that_is_not_finite_leaves_no_checkpoint_of_its_step(tokenizer, tmp_path, monkeypatch):
    real = base.masked.update

    def broken(run, predict, graphdef, state, batch):
        new, metrics = real(run, predict, graphdef, state, batch)
        broken = jax.numpy.where(state['step'] == 1, jax.numpy.nan, 1.0)
        params = jax.tree.map(lambda x: x * broken, new['params'])
        return {**new, 'params': params}, {**metrics, 'param_norm': metrics['param_norm'] * broken}

    monkeypatch.setattr(base.masked, 'update', broken)
    monkeypatch.setattr(pipeline, 'source_names', lambda data, indices, seed: [f'row {i}' for i in indices])
    with pytest.raises(UserError, match=r'the weights are not finite after step 2 \(steps 1 to 2 since'):
        loop.run(small(tokenizer, log_every_steps=50, save_every_steps=2, eval_every_steps=0), tmp_path / 'run')
    assert not any((tmp_path / 'run' / 'checkpoints').iterdir()), 'its loss was finite, its weights are not'
    note = json.loads((tmp_path / 'run' / 'emergency' / '2.json').read_text())
    assert note['first_bad_step'] == 2 and note['examples'][0] == {'index': 16, 'name': 'row 16'}


def test_sigterm_during_an_evaluation_is_obeyed_before_another_step(tokenizer, tmp_path, monkeypatch):
    def evaluate(self, state):
        os.kill(os.getpid(), signal.SIGTERM)
        return {'loss': 1.0}

    monkeypatch.setattr(loop.Examiner, 'evaluate', evaluate)
    with pytest.raises(Terminated, match='after step 3, which is saved'):
        loop.run(small(tokenizer, save_every_steps=0, grid_every_steps=0), tmp_path / 'run')
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['3']


def test_other_batches_than_those_of_the_run_are_warned_of(finished, tokenizer, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'run')
    with pytest.warns(InputWarning, match=r'holds a run with train.batch_size = 16, it goes on with 8: its batches'):
        check_workdir(tmp_path / 'run', with_train(small(tokenizer), batch_size=8, log_every_steps=7))
    with pytest.warns(InputWarning, match=r"data.path = '.*', it goes on with 'elsewhere'"):
        run = small(tokenizer)
        check_workdir(tmp_path / 'run', dataclasses.replace(run, data=dataclasses.replace(run.data, path='elsewhere')))
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')  # nothing to go on from
    check_workdir(tmp_path / 'run', with_train(small(tokenizer), batch_size=8))


@pytest.mark.parametrize('workdir', ['gs://bucket/run', 's3://bucket/run'])
def test_a_workdir_that_is_an_address_is_refused(tokenizer, tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"workdir '{workdir[:3]}.*bucket/run' is an address: mount"):
        loop.run(small(tokenizer), workdir)
    assert not any(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(tokenizer, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='is a file'):
        loop.run(small(tokenizer), tmp_path / 'file')


def test_a_batch_that_does_not_split_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r'train.batch_size 12 is no multiple of 8'):
        loop.run(small(tokenizer, batch_size=12), tmp_path / 'run')


def test_tokens_of_another_codebook_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r'has 32 codes, model.codebook_size is 64'):
        run = with_model(small(tokenizer), codebook_size=64)
        frozen.load_frozen(run, make_mesh(run.mesh))
