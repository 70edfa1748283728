"""Checkpoints: what is damaged is passed over, a write that fails is told of, and the clock of one host decides."""

from __future__ import annotations

import errno
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from muse.errors import InputWarning, UserError
from muse.train.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def state_after(step: int):
    return {'step': jnp.asarray(step, jnp.int32), 'params': {'kernel': jnp.full((64, 32), step, jnp.float32)}}


def abstract():
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_after(0))


def checkpoints(folder, **options):
    return Checkpoints(folder, **({'keep': 5, 'every_steps': 2, 'every_minutes': 0.0} | options))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp('written')
    with checkpoints(folder) as found:
        for step in (2, 4):
            found.save(step, state_after(step))
    return folder


def data_files(checkpoint):
    return [file for file in (checkpoint / 'state').rglob('*') if file.is_file() and file.parent.name == 'd']


def truncated(checkpoint):
    for file in data_files(checkpoint):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(checkpoint):
    for file in checkpoint.rglob('*'):
        if file.is_file():
            file.write_bytes(b'')


def without_metadata(checkpoint):
    for file in [*checkpoint.rglob('_METADATA'), *checkpoint.rglob('_CHECKPOINT_METADATA')]:
        file.unlink()


def without_manifest(checkpoint):
    for file in checkpoint.rglob('manifest.ocdbt'):
        file.unlink()


def without_state(checkpoint):
    shutil.rmtree(checkpoint / 'state')


def scrambled(checkpoint):
    for file in data_files(checkpoint):
        file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


DAMAGES = (truncated, emptied, without_metadata, without_manifest, without_state, scrambled)


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over(written, tmp_path, damage):
    shutil.copytree(written, tmp_path / 'run')
    damage(tmp_path / 'run' / '4')
    with checkpoints(tmp_path / 'run') as found:
        with pytest.warns(InputWarning, match=r"checkpoint '.*/4' cannot be read"):
            restored = found.restore(abstract())
        assert restored is not None
        state, step = restored
        assert step == 2 and int(state['step']) == 2
        np.testing.assert_array_equal(state['params']['kernel'], np.full((64, 32), 2.0))
        found.save(4, state_after(40))  # its step comes again
    with checkpoints(tmp_path / 'run') as found:
        restored = found.restore(abstract())
        assert restored is not None and int(restored[0]['step']) == 40


def test_a_write_that_was_cut_off_leaves_nothing(written, tmp_path):
    shutil.copytree(written, tmp_path / 'run')
    names = {path.name for path in (tmp_path / 'run').iterdir()}
    (tmp_path / 'run' / '4').rename(tmp_path / 'run' / '6.orbax-checkpoint-tmp')
    with checkpoints(tmp_path / 'run') as found:
        restored = found.restore(abstract())
        assert restored is not None and restored[1] == 2
    assert {path.name for path in (tmp_path / 'run').iterdir()} == names - {'4'}


def test_none_that_can_be_read_is_an_error(written, tmp_path):
    shutil.copytree(written, tmp_path / 'run')
    for step in ('2', '4'):
        emptied(tmp_path / 'run' / step)
    with (
        checkpoints(tmp_path / 'run') as found,
        pytest.warns(InputWarning),
        pytest.raises(UserError, match='none of the checkpoints'),
    ):
        found.restore(abstract())


def test_a_write_that_fails_later_is_told_of_at_the_next_step(tmp_path, monkeypatch):
    found = checkpoints(tmp_path / 'run')
    with (
        pytest.raises(UserError, match=r"/4' could not be written \(.*No space left on device\): the older") as caught,
        found,
    ):
        found.save(2, state_after(2))
        found.wait()
        begun = threading.Event()

        class Failing:
            def result(self):
                begun.wait()
                raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(found._checkpointer, 'save_checkpointables_async', lambda *_, **__: Failing())
        found.save(4, state_after(4))
        found.check()
        begun.set()
        for tell in (found.wait, found.check, lambda: found.save(6, state_after(6))):
            with pytest.raises(UserError, match='could not be written'):
                tell()
    assert '\n' not in str(caught.value)
    with checkpoints(tmp_path / 'run') as found:
        restored = found.restore(abstract())
        assert restored is not None and restored[1] == 2


def test_due_by_steps_and_late_by_the_first_hosts_clock(tmp_path, monkeypatch):
    with checkpoints(tmp_path / 'run', every_minutes=0.0005) as found:
        assert [step for step in range(1, 7) if found.due(step)] == [2, 4, 6]
        assert found.due(3, asked=True)
        found.save(5, state_after(5))
        assert [step for step in range(5, 10) if found.due(step, asked=True)] == [6, 8, 9]
        threading.Event().wait(0.05)
        assert found.late()
        monkeypatch.setattr(jax, 'process_index', lambda: 1)
        assert not found.late()
    with checkpoints(tmp_path / 'run', every_steps=0) as found:
        assert not found.due(2) and not found.late()
