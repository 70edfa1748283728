"""Real runs in processes of their own: killed, stopped, starved of disk, split over processes; and what comes of it."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import time

import pytest
from survival import close, end, environment, losses, start, start_two, wait_for, write_inputs
from toys import with_model, with_train

from muse.config import BaseRun, read_run
from muse.train import loop

ENDLESS = '--config.train.steps=100000'
OFTEN = '--config.train.save_every_steps=2'
SMALL = ('--config.model.layers=1', '--config.train.save_every_steps=0')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp('inputs'))


def finished(config, workdir, *flags, devices=1, code=''):
    """Runs to the end; its losses."""
    assert end(start(config, workdir, *flags, env=environment(devices), code=code))[0] == 0
    return losses(workdir)


@pytest.fixture(scope='module')
def reference(config, tmp_path_factory):
    """Losses of an uninterrupted run on eight devices."""
    return finished(config, tmp_path_factory.mktemp('reference') / 'run', devices=8)


def test_two_processes_train_as_one_and_one_that_dies_takes_the_other_along(config, tmp_path):
    """The two-process test of every run of the suite; those below go through the rest."""
    both = start_two(config, tmp_path / 'two', *SMALL, '--config.mesh.fsdp=2', devices=1)
    run = read_run(runpy.run_path(str(config))['get_config']().to_dict())
    assert isinstance(run, BaseRun)
    loop.run(with_model(with_train(run, save_every_steps=0), layers=1), tmp_path / 'one')
    whole = losses(tmp_path / 'one')
    wait_for(tmp_path / 'two', 6, both)
    both[1].kill()
    code, _, error = end(both[0])
    assert code == 75 and error.startswith('error: another process of this job has ended')
    end(both[1])
    found = losses(tmp_path / 'two')
    assert close({step: whole[step] for step in found}, found) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    'mesh', [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)], ids=lambda mesh: 'x'.join(map(str, mesh))
)
def test_one_device_equals_eight_and_two_processes(config, tmp_path, reference, mesh):
    flags = [f'--config.mesh.{axis}={size}' for axis, size in zip(('data', 'fsdp', 'tensor'), mesh, strict=True)]
    if mesh == (8, 1, 1):
        assert close(reference, finished(config, tmp_path / 'one')) < 1e-5
    else:
        assert close(reference, finished(config, tmp_path / 'eight', *flags, devices=8)) < 1e-5
    for code, _, error in map(end, start_two(config, tmp_path / 'two', *flags, devices=4)):
        assert code == 0, error
    assert close(reference, losses(tmp_path / 'two')) < 1e-5


KILLS = {
    'in the first step': """
from muse.train.window import Window
def add(self, step, metrics):
    os.kill(os.getpid(), signal.SIGKILL)
Window.add = add
""",
    'while saving': """
from muse.train.checkpoint import Checkpoints
save = Checkpoints.save
def kill_while_saving(self, step, state):
    save(self, step, state)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = kill_while_saving
""",
    'while exporting': """
from pathlib import Path
replace = os.replace
def kill_while_exporting(source, target, **options):
    if '/export/' in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target, **options)
os.replace = kill_while_exporting
Path.replace = lambda self, target: kill_while_exporting(self, target) or Path(target)
""",
    'between two saves': """
from muse.train.window import Window
add = Window.add
def kill_later(self, step, metrics):
    add(self, step, metrics)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Window.add = kill_later
""",
}


@pytest.mark.slow
@pytest.mark.parametrize('moment', KILLS)
def test_killed_at_any_moment_it_goes_on_to_the_bit(config, tmp_path, reference, moment):
    process = start(config, tmp_path / 'run', env=environment(8), code='import os, signal\n' + KILLS[moment])
    assert end(process)[0] == -signal.SIGKILL
    assert finished(config, tmp_path / 'run', devices=8) == reference
    assert (tmp_path / 'run' / 'export' / 'base.safetensors').exists()


@pytest.mark.slow
def test_killed_it_goes_on_with_other_devices_and_processes(config, tmp_path, reference):
    process = start(config, tmp_path / 'run', env=environment(8), code='import os, signal\n' + KILLS['while saving'])
    end(process)
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    assert close(reference, finished(config, tmp_path / 'run')) < 1e-5
    for code, _, error in map(end, start_two(config, tmp_path / 'other', '--config.mesh.fsdp=2', devices=2)):
        assert code == 0, error
    assert close(reference, losses(tmp_path / 'other')) < 1e-5


@pytest.mark.slow
def test_sigterm_saves_and_says_so(config, tmp_path, reference):
    flags = ('--config.train.save_every_steps=0', '--config.train.log_every_steps=1')
    slow = 'import time\nfrom muse.train.window import Window\nadd = Window.add\n'
    slow += 'def later(self, *both):\n    add(self, *both)\n    time.sleep(0.5)\nWindow.add = later'
    process = start(config, tmp_path / 'run', *flags, env=environment(8), code=slow)
    wait_for(tmp_path / 'run', 3, [process])
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process)
    assert code == 143 and time.monotonic() - asked < 30
    (step,) = (int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir())
    assert 3 <= step < 10 and f'SIGTERM: stopped after step {step}, which is saved: run the same command' in out
    assert finished(config, tmp_path / 'run', devices=8) == reference


@pytest.mark.slow
@pytest.mark.parametrize('to', [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(config, tmp_path, to):
    both = start_two(config, tmp_path / 'run', ENDLESS, '--config.train.save_every_steps=0', devices=2)
    wait_for(tmp_path / 'run', 4, both)
    asked = time.monotonic()
    both[to].send_signal(signal.SIGTERM)
    (code, out, _), (other, _, error) = (end(process) for process in both)
    assert code == other == 143 and time.monotonic() - asked < 30
    (step,) = (int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir())
    assert f'SIGTERM: stopped after step {step}, which is saved' in out
    assert f'SIGTERM: stopped after step {step}, which is saved' in error


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP], ids=['killed', 'frozen'])
@pytest.mark.parametrize('which', [0, 1])
def test_a_lost_process_ends_the_others_within_two_minutes(config, tmp_path, which, how):
    both = start_two(config, tmp_path / 'run', ENDLESS, devices=1)
    wait_for(tmp_path / 'run', 5, both)
    lost = time.monotonic()
    both[which].send_signal(how)
    code, _, error = end(both[1 - which])
    both[which].kill()
    end(both[which])
    assert code not in (0, 2, 143) and time.monotonic() - lost < 120
    assert 'another process of this job' in error or 'another task died' in error, error


FAIL_ALONE = """
import os
from muse.errors import UserError
from muse.train.guards import UnreadLog
def note(self, step, batch):
    if step == 5 and os.environ['JAX_PROCESS_ID'] == '1':
        raise UserError('mine alone')
UnreadLog.note = note
"""


@pytest.mark.slow
def test_one_process_that_fails_alone_does_not_keep_the_other_waiting(config, tmp_path):
    both = start_two(config, tmp_path / 'run', ENDLESS, devices=1, code=FAIL_ALONE)
    other, _, mine = end(both[1])
    failed = time.monotonic()
    code, _, error = end(both[0])
    assert time.monotonic() - failed < 120
    assert other == 2 and mine.endswith('error: mine alone\n'), mine
    assert code not in (0, 2, 143) and ('another process' in error or 'another task' in error), error


def limit_files(bytes_: int) -> str:
    """Code that makes files larger than this fail from step 6 on, as a full disk does."""
    return (
        'import resource\nfrom muse.train.window import Window\nadd = Window.add\n'
        'def later(self, step, metrics):\n    add(self, step, metrics)\n'
        f'    if step == 6: resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_}, {resource.RLIM_INFINITY}))\n'
        'Window.add = later'
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoints(config, tmp_path, reference):
    process = start(config, tmp_path / 'run', OFTEN, ENDLESS, env=environment(8), code=limit_files(2048))
    code, _, error = end(process)
    assert code == 2, error
    assert error.count('error: ') == 1 and 'make room' in error and 'File too large' in error, error
    kept = sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir() if path.name.isdecimal())
    assert kept and kept[0] == 2
    assert finished(config, tmp_path / 'run', devices=8) == reference


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason='mounting needs root')
def test_a_disk_that_is_really_full(config, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if os.system(f'mount -t tmpfs -o size=1500k tmpfs {disk} 2>/dev/null'):
        pytest.skip('mounting is not allowed here')
    try:
        keep = '--config.train.keep_checkpoints=100'
        code, _, error = end(start(config, disk / 'run', OFTEN, ENDLESS, keep, env=environment(1)))
        assert code == 2 and error.count('error: ') == 1 and 'No space left on device' in error, error
        newest = max(int(path.name) for path in (disk / 'run' / 'checkpoints').iterdir() if path.name.isdecimal())
        for path in (disk / 'run' / 'checkpoints').iterdir():
            if path.name.isdecimal() and int(path.name) < newest:
                shutil.rmtree(path)
        code, out, error = end(start(config, disk / 'run', f'--config.train.steps={newest + 1}', env=environment(1)))
        assert f'resumed after step {newest}' in out, error
    finally:
        os.system(f'umount {disk}')


NAN = """
import jax.numpy as jnp
from muse.train import base
step = base.train_step
def train_step(run, graphdef, state, batch, key):
    new, metrics = step(run, graphdef, state, batch, key)
    return new, {**metrics, 'loss': jnp.where(state['step'] == 5, jnp.nan, metrics['loss'])}
base.train_step = train_step
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_an_emergency_checkpoint(config, tmp_path, reference):
    code, _, error = end(start(config, tmp_path / 'run', env=environment(8), code=NAN))
    assert code == 2 and 'the loss is not finite at step 6 (steps 6 to 6 since the last line)' in error
    note = json.loads(next((tmp_path / 'run' / 'emergency').glob('*.json')).read_text())
    assert [example['index'] for example in note['examples']] == list(range(80, 96))
    assert all(example['name'].startswith('record ') for example in note['examples'])
    assert (tmp_path / 'run' / 'emergency' / note['holds'].split()[4].strip(',') / 'state').is_dir()
    assert sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()) == ['4']
    assert finished(config, tmp_path / 'run', devices=8) == reference, 'resuming does not look there'


@pytest.fixture
def torn(config, tmp_path):
    """The inputs with two damaged records."""
    shutil.copytree(config.parent, tmp_path / 'inputs')
    (file,) = (tmp_path / 'inputs' / 'tokens').glob('*.array_record')
    data = bytearray(file.read_bytes())
    data[9000:9040] = bytes(255 - byte for byte in data[9000:9040])  # the end of one record, the beginning of another
    file.write_bytes(data)
    copy = tmp_path / 'inputs' / 'config.py'
    copy.write_text(copy.read_text().replace(str(config.parent), str(copy.parent)))
    return copy


@pytest.mark.slow
def test_a_corrupted_record_counts_for_nothing_and_moves_nothing(config, torn, tmp_path, reference):
    process = start(torn, tmp_path / 'run', env=environment(8))
    code, _, error = end(process)
    assert code == 0 and 'cannot be read' in error and 'the next record takes its place, with weight 0' in error
    lines = [json.loads(text) for text in (tmp_path / 'run' / 'unread' / '0.jsonl').read_text().splitlines()]
    metrics = [json.loads(text) for text in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    counted = {line['step']: line['unread_rows'] for line in metrics if 'unread_rows' in line}
    assert counted == {step: sum(line['step'] == step for line in lines) for step in {line['step'] for line in lines}}
    first = min(counted)
    found = losses(tmp_path / 'run')
    assert all(found[step] == reference[step] for step in range(1, first)) and found[first] != reference[first]
    for code, _, error in map(end, start_two(torn, tmp_path / 'two', '--config.mesh.fsdp=2', devices=2)):
        assert code == 0, error
    assert close(found, losses(tmp_path / 'two')) < 1e-5
    names = [file.read_text().splitlines() for file in sorted((tmp_path / 'two' / 'unread').iterdir())]
    assert sorted(sum(names, []), key=lambda text: json.loads(text)['index']) == [json.dumps(line) for line in lines]


@pytest.mark.slow
def test_too_many_corrupted_records_end_the_run(torn, tmp_path):
    code = 'from muse.train import guards\nguards._ALWAYS_ALLOWED = 0'
    process = start(torn, tmp_path / 'run', ENDLESS, '--config.data.max_unread=0.0', env=environment(1), code=code)
    code, _, error = end(process)
    assert code == 2 and 'records read could not be used, over data.max_unread = 0.0' in error.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flag', 'says'),
    [
        ('--config.mesh.fsdp=3', 'mesh data=-1 fsdp=3 tensor=1 does not fit 8 devices: change config.mesh'),
        ('--config.train.batch_size=12', 'train.batch_size 12 is no multiple of 8'),
        ('--config.train.steps=0', 'train.steps is 0: give at least 1'),
        ('--config.train.stall_minutes=-1.0', 'train.stall_minutes is -1.0: give 0 or more'),
        ('--config.data.max_unread=2.0', 'data.max_unread is 2.0: give a share from 0 to 1'),
        ('--config.data.path=/no/such/folder', '/no/such/folder holds no meta.json'),
        ('--workdir=/proc/run', "workdir '/proc/run' cannot be"),
    ],
)
def test_wrong_input_is_one_line(config, tmp_path, flag, says):
    code, out, error = end(start(config, tmp_path / 'run', flag, env=environment(8)))
    assert code == 2 and error.count('\n') == 1 and error.startswith('error: ') and says in error, error
    assert not out and not (tmp_path / 'run').exists()
