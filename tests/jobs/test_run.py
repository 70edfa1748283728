"""Jobs stopped anywhere and started again: what is there stays, what is missing comes, the files are the same."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from fake_job import Numbers, contents, pack
from PIL import Image

from muse.errors import InputWarning, UserError
from muse.jobs import stores
from muse.jobs.rows import Reject
from muse.jobs.run import open_store, run, write_rejects
from muse.jobs.stores import Place

FORMS = ('folder', 'webdataset')
ROOT = Path(__file__).parents[2]


def do(out, form='folder', plan=None, process=0, count=1, **options):
    plan = plan or Numbers(10, 4)
    store = open_store(str(out), form, ['.gif'], process, count)
    return plan, run(plan, store, plan.draw, pack, process=process, count=count, **options)


@pytest.fixture(scope='module', params=FORMS)
def whole(request, tmp_path_factory):
    """(form, the files of a job that nobody stopped)"""
    out = tmp_path_factory.mktemp('whole')
    _, outcome = do(out, request.param)
    assert (outcome.drawn, outcome.kept, outcome.complete) == (10, 0, True)
    return request.param, contents(out)


def test_what_is_written(whole):
    form, files = whole
    lines = [json.loads(line) for line in files['manifest.jsonl'].splitlines()]
    assert [line['prompt'] for line in lines] == [f'number {n}' for n in range(10)]
    if form == 'folder':
        assert len(files) == 31 and files['0003_x.gif'] == b'moving'
        picture, about = files[lines[3]['file']], files['0003_x.json']
    else:
        assert sorted(files) == ['00000.tar', '00001.tar', '00002.tar', 'manifest.jsonl']
        with tarfile.open(fileobj=io.BytesIO(files[lines[3]['shard']])) as tar:
            assert len(tar.getmembers()) == 16 and all(member.mtime == 0 for member in tar)
            picture, about, text = (tar.extractfile(f'0003_x.{end}').read() for end in ('png', 'json', 'txt'))  # pyright: ignore[reportOptionalMemberAccess]
        assert text == b'number 3'
    written = {'prompt': 'number 3', 'seed': 0, 'muse_version': '0'}
    assert json.loads(about) == written
    assert Image.open(io.BytesIO(picture)).text == {**written, 'seed': '0'}  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_is_drawn_twice(whole, tmp_path):
    form, files = whole
    do(tmp_path, form)
    plan, outcome = do(tmp_path, form)
    assert plan.drawn == [] and (outcome.drawn, outcome.kept) == (0, 10)
    plan, outcome = do(tmp_path, form, overwrite=True)
    assert plan.drawn == list(range(10)) and contents(tmp_path) == files


class Stopped(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


@pytest.mark.parametrize('point', range(0, 24, 3))
def test_stopped_at_any_write_and_restarted(whole, tmp_path, monkeypatch, point):
    """The process ends before the n-th rename, its half-written file still there."""
    form, files = whole
    replace, left = stores.os.replace, iter(range(point))

    def stop(*paths):
        if next(left, None) is None:
            raise Stopped
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(stores.os, 'replace', stop)
        patch.setattr(Path, 'unlink', lambda *_, **__: None)
        if form == 'folder' or point < 4:
            with pytest.raises(Stopped):
                do(tmp_path, form)
            assert any(name.endswith('.tmp') for name in contents(tmp_path))
    plan, _ = do(tmp_path, form)
    assert contents(tmp_path) == files
    assert all(n // 4 * 4 in plan.drawn for n in plan.drawn)  # whole units


def test_one_lost_file_brings_its_unit_back_and_touches_no_other(whole, tmp_path):
    form, files = whole
    do(tmp_path, form)
    lost = '0005_x.gif' if form == 'folder' else '00001.tar'
    (tmp_path / lost).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    plan, outcome = do(tmp_path, form)
    assert plan.drawn == [4, 5, 6, 7] and outcome.drawn == (1 if form == 'folder' else 4)
    assert contents(tmp_path) == files
    written = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times.get(path.name)}
    assert written - {'0005_x.json', '0005_x.png', 'manifest.jsonl'} == {lost}


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_processes_together_write_what_one_does(whole, tmp_path, order):
    form, files = whole
    for place, process in enumerate(order):
        _, outcome = do(tmp_path, form, process=process, count=3)
        assert outcome.complete == (place == 2)  # whoever comes last writes the manifest
        assert ('manifest.jsonl' in contents(tmp_path)) == (place == 2)
    assert contents(tmp_path) == files


def test_what_another_job_left_is_not_overwritten(whole, tmp_path):
    form, files = whole
    do(tmp_path, form)
    with pytest.raises(UserError, match='was drawn otherwise .seed was 0, now 1.*--overwrite'):
        do(tmp_path, form, Numbers(10, 4, seed=1))
    assert contents(tmp_path) == files
    do(tmp_path, form, Numbers(10, 4, seed=1), overwrite=True)
    assert contents(tmp_path) != files


def test_a_kill_amid_overwriting_leaves_no_old_picture_that_looks_new(tmp_path, monkeypatch):
    """The new .json beside the old picture would be taken for a finished one."""
    out = tmp_path / 'out'
    do(out)
    (out / '0000_x.npz').write_bytes(b'of the first job')
    replace, left = stores.os.replace, iter(range(1))

    def stop(*paths):
        if next(left, None) is None:
            raise Stopped
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stores.os, 'replace', stop)
        do(out, plan=Numbers(1, 4, seed=1), overwrite=True)
    do(out, plan=Numbers(1, 4, seed=1))
    do(tmp_path / 'whole', plan=Numbers(1, 4, seed=1))
    whole, found = contents(tmp_path / 'whole'), contents(out)
    assert {name: found.get(name) for name in whole} == {**whole, 'manifest.jsonl': found['manifest.jsonl']}
    assert '0000_x.npz' not in found


def test_nothing_is_begun_where_another_job_is_in_the_way(tmp_path):
    begun = []
    do(tmp_path, begin=lambda: begun.append(1))
    with pytest.raises(UserError, match='drawn otherwise'):
        do(tmp_path, plan=Numbers(10, 4, seed=1), begin=lambda: begun.append(2))
    assert begun == [1]


def test_strange_files_in_the_way(tmp_path):
    (tmp_path / '0002_x.png').write_bytes(b'mine')
    with pytest.raises(UserError, match='0002_x.png. is there already and not of this job'):
        do(tmp_path)
    (tmp_path / '0002_x.json').write_bytes(b'mine too')
    with pytest.raises(UserError, match='0002_x.json. is there already and not of this job'):
        do(tmp_path)
    (tmp_path / '00001.tar').write_bytes(b'no tar')
    with pytest.raises(UserError, match='00001.tar. is not of this job'):
        do(tmp_path, 'webdataset')
    assert (tmp_path / '0002_x.png').read_bytes() == b'mine'


def test_the_manifest_keeps_what_other_jobs_left_in_the_folder(tmp_path):
    first, second = Numbers(3, 2), Numbers(3, 2, seed=1)
    for plan, prefix in ((first, 'a'), (second, 'b')):
        made = plan.items
        plan.items = lambda unit, made=made, prefix=prefix: [
            dataclasses.replace(item, stem=prefix + item.stem) for item in made(unit)
        ]
    for plan in (first, second, second, first):
        do(tmp_path, plan=plan)
    files = [json.loads(line)['file'] for line in (tmp_path / 'manifest.jsonl').read_text().splitlines()]
    assert files == [f'b000{n}_x.png' for n in range(3)] + [f'a000{n}_x.png' for n in range(3)]
    (tmp_path / 'b0001_x.png').unlink()
    do(tmp_path, plan=first)
    assert len((tmp_path / 'manifest.jsonl').read_text().splitlines()) == 5
    (tmp_path / 'manifest.jsonl').write_text('[]\n')
    with pytest.raises(UserError, match='line 1 is no line of a manifest'):
        do(tmp_path, plan=first)


def test_a_shorter_shard_of_the_same_pictures_is_another_job(tmp_path):
    do(tmp_path, 'webdataset', Numbers(10, 5))
    with pytest.raises(UserError, match='not of this job'):
        do(tmp_path, 'webdataset', Numbers(10, 4))


def test_overwriting_by_a_smaller_job_leaves_no_shard_of_the_larger_one(tmp_path):
    """Else training, which reads all tars of a folder, would read pictures that the manifest does not name."""
    out, smaller = tmp_path / 'out', Numbers(7, 4, seed=1)
    do(out, 'webdataset', Numbers(10, 4))
    (out / '00003.tar').write_bytes(b'mine')  # no tar
    shutil.copy(out / '00002.tar', out / '2.tar')  # a name that no job gives
    foreign(out / '00004.tar')
    (out / '00005.tar').mkdir()
    shutil.copy(out / '00002.tar', out / '00006.tar')
    with tarfile.open(out / '00006.tar', 'a') as tar:  # someone's own picture among those of a job
        tar.addfile(tarfile.TarInfo('photo.png'))
    kept = {name: (out / name).read_bytes() for name in ('00003.tar', '2.tar', '00004.tar', '00006.tar')}
    with pytest.warns(InputWarning) as caught:
        do(out, 'webdataset', smaller, overwrite=True)
    said = [str(warning.message) for warning in caught]
    assert said[0].startswith('removed') and said[0].endswith("00002.tar'")
    assert "00003.tar' and 3 more stays" in said[1] and len(said) == 2
    (out / '00005.tar').rmdir()
    do(tmp_path / 'whole', 'webdataset', smaller)
    assert contents(out) == contents(tmp_path / 'whole') | kept


def foreign(path: Path) -> None:
    """A tar of pictures as others write them."""
    with tarfile.open(path, 'w') as tar:
        for name in ('a.png', 'a.json', 'a.txt'):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b'{}'))


def test_shards_stay_without_overwriting_and_while_the_job_is_not_whole(tmp_path):
    """More pictures of the same job were drawn before: nothing is in the way, and nothing is taken away."""
    do(tmp_path, 'webdataset', Numbers(12, 4))
    do(tmp_path, 'webdataset', Numbers(4, 4))
    assert (tmp_path / '00002.tar').exists()
    files = [json.loads(line)['file'] for line in (tmp_path / 'manifest.jsonl').read_text().splitlines()]
    assert sorted(files) == [f'{n:04d}_x.png' for n in range(12)]
    smaller = Numbers(8, 4, seed=1)
    do(tmp_path, 'webdataset', smaller, process=0, count=2, overwrite=True)
    assert (tmp_path / '00002.tar').exists()
    with pytest.warns(InputWarning, match='^removed .*00002.tar'):
        do(tmp_path, 'webdataset', smaller, process=1, count=2, overwrite=True)
    assert len((tmp_path / 'manifest.jsonl').read_text().splitlines()) == 8


def test_a_manifest_names_no_pictures_that_their_shard_has_lost(tmp_path):
    do(tmp_path, 'webdataset', Numbers(8, 4))
    do(tmp_path, 'webdataset', Numbers(6, 3, seed=1), overwrite=True)
    files = [json.loads(line)['file'] for line in (tmp_path / 'manifest.jsonl').read_text().splitlines()]
    assert files == [f'{n:04d}_x.png' for n in range(6)]


@pytest.mark.parametrize('form', FORMS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, form):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(stores.os, 'replace', full)
    with pytest.raises(UserError, match='No space left on device'):
        do(tmp_path, form)
    assert contents(tmp_path) == {}


def test_sweeping_removes_only_ones_own(tmp_path):
    for name in ('.a.png.muse-0.tmp', '.a.png.muse-1.tmp', '.a.png.muse-2.tmp', '.other.tmp', '.x.muse-y.tmp'):
        (tmp_path / name).touch()
    Place(tmp_path, 0, 2).sweep()
    assert sorted(contents(tmp_path)) == ['.a.png.muse-1.tmp', '.other.tmp', '.x.muse-y.tmp']


def test_rejects_file_comes_and_goes(tmp_path):
    place = Place(tmp_path)
    path = write_rejects(place, [Reject(3, 'why', 'caf\udce9')])
    assert json.loads(path.read_text())['line'] == 3
    write_rejects(place, [])
    assert not path.exists()


def kill_and_restart(out: Path, form: str, rng: random.Random, kills: int, pictures: int) -> None:
    command = [sys.executable, str(ROOT / 'tests/jobs/fake_job.py'), str(out), form, str(pictures), '4', '0.002']
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, env={'PYTHONPATH': str(ROOT)})
        seen, deadline = len(contents_or_none(out)), time.monotonic() + 600
        while process.poll() is None and len(contents_or_none(out)) == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, env={'PYTHONPATH': str(ROOT)}, check=True, timeout=600)


def contents_or_none(out: Path) -> list[str]:
    return [path.name for path in out.iterdir()] if out.exists() else []


@pytest.mark.parametrize('form', FORMS)
def test_real_kills(tmp_path, form):
    do(tmp_path / 'whole', form, Numbers(120, 4))
    kill_and_restart(tmp_path / 'killed', form, random.Random(form), kills=3, pictures=120)
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_real_kills_many_times(tmp_path, form):
    do(tmp_path / 'whole', form, Numbers(1500, 4))
    kill_and_restart(tmp_path / 'killed', form, random.Random(1), kills=30, pictures=1500)
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')
