"""WebDataset tars: every example is the one that lies there; what is damaged is named."""

import io
import json
import os
import pickle
import tarfile
import time

import numpy as np
import pytest
from photos import colour, members, picture, write_tar, write_tars

from muse.config import DataConfig
from muse.data import webdataset
from muse.data.pipeline import make_loader, read_spans
from muse.data.sources import open_source
from muse.errors import InputWarning, UserError


def source_of(folder, **changes):
    webdataset._open_folder.cache_clear()  # as another run
    return open_source(DataConfig(kind='webdataset', path=str(folder), image_size=8, **changes))


def one_pass(folder, **changes):
    data = DataConfig(kind='webdataset', path=str(folder), image_size=8, **changes)
    batches = make_loader(data, batch_size=5, seed=0, repeat=False)
    return [(img, caption) for batch in batches for img, caption in zip(batch['img'], batch['caption'], strict=True)]


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_example_in_the_order_of_the_tars(tmp_path, workers):
    write_tars(tmp_path)
    found = one_pass(tmp_path, workers=workers)
    assert [caption for _, caption in found] == [f'picture {i}, “yes”' for i in range(12)]
    assert all((img == colour(i)).all() for i, (img, _) in enumerate(found))


def test_the_index_is_kept_and_follows_the_tars(tmp_path, monkeypatch):
    write_tars(tmp_path)
    scanned, scan = [], webdataset._scan
    monkeypatch.setattr(webdataset, '_scan', lambda tar: scanned.append(tar.name) or scan(tar))
    first = source_of(tmp_path)
    assert scanned == ['00000.tar', '00001.tar', '00002.tar'] and (tmp_path / webdataset.INDEX_FILE).exists()
    again = source_of(tmp_path)
    assert len(scanned) == 3 and (again._rows == first._rows).all() and (again._keys == first._keys).all()
    write_tar(tmp_path / '00001.tar', members(77))
    os.remove(tmp_path / '00000.tar')
    changed = source_of(tmp_path)
    assert scanned[3:] == ['00001.tar'] and len(changed) == 5
    assert changed.example(0, np.random.default_rng(0))['caption'] == 'picture 77, “yes”'
    assert (changed.example(4, np.random.default_rng(0))['img'] == colour(11)).all()
    (tmp_path / webdataset.INDEX_FILE).write_bytes(b'PK damaged')
    assert len(source_of(tmp_path)) == 5 and len(scanned) == 6


def test_a_source_travels_to_workers(tmp_path):
    write_tars(tmp_path)
    travelled = pickle.loads(pickle.dumps(source_of(tmp_path)))
    assert (travelled.example(7, np.random.default_rng(0))['img'] == colour(7)).all()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    write_tars(tmp_path)
    monkeypatch.setattr(webdataset, 'INDEX_FILE', 'no/such/folder.npz')
    assert len(source_of(tmp_path)) == 12


def test_long_names_folders_and_other_members(tmp_path):
    name = 'a' * 120 + '/ü.b/' + 'c' * 90  # longer than a plain tar header holds; dots in folders are no endings
    files = {f'{name}.JPEG': picture(3, 'jpg'), f'{name}.txt': b'long', './x.cls': b'1', 'x.seg.png': b'no picture'}
    write_tar(tmp_path / 'a.tar', files)
    source = source_of(tmp_path)
    example = source.example(0, np.random.default_rng(0))
    assert len(source) == 1 and example['caption'] == 'long' and np.abs(example['img'] - np.array(colour(3))).max() < 6


def test_captions_come_from_txt_then_json_then_not_at_all(tmp_path):
    plain = members(0)
    del plain['000000000.txt']
    write_tar(tmp_path / 'a.tar', plain | {'x.png': picture(1), 'x.txt': b''})
    assert [caption for _, caption in one_pass(tmp_path)] == ['picture 0, “yes”', '']
    with pytest.raises(UserError, match=r"no 'alt', only caption, key, status, width: set data.caption_key"):
        source_of(tmp_path, caption_key='alt')
    assert [caption for _, caption in one_pass(tmp_path, caption_key='')] == ['', '']
    write_tar(tmp_path / 'a.tar', {'x.png': picture(1), 'y.png': picture(2)})
    with pytest.raises(UserError, match='none of the 2 pictures .* has a KEY.txt or KEY.json'):
        source_of(tmp_path)
    assert len(source_of(tmp_path, caption_key='')) == 2


@pytest.fixture
def damaged(tmp_path):
    """Five good examples and one of each thing that can be wrong with one."""
    files: dict[str, bytes] = {}
    for i in range(5):
        files |= members(i)
    files |= {'bare.png': picture(9), 'lost.txt': b'no picture', 'empty.png': b'', 'empty.txt': b'x'}
    files |= {'cut.png': picture(9)[:40], 'cut.txt': b'x', 'tiny.png': picture(9, size=(5, 4)), 'tiny.txt': b'x'}
    files |= {'odd.png': picture(9), 'odd.json': b'{not json', '000000000.webp': picture(9, 'webp')}
    write_tar(tmp_path / '00000.tar', files)
    return tmp_path


def test_bad_members_are_counted_named_and_skipped(damaged):
    with pytest.warns(InputWarning, match='5 members are unusable and were skipped: ') as caught:
        source = source_of(damaged)
    assert '\n' not in str(caught[0].message) and 'second picture' in str(caught[0].message)
    assert sorted(source.skipped()) == [
        ('00000.tar/000000000.webp', 'a second picture of the same key'),
        ('00000.tar/bare', 'it has no .txt or .json beside it'),
        ('00000.tar/empty', 'it has no picture'),
        ('00000.tar/empty.png', 'it is empty'),
        ('00000.tar/lost', 'it has no picture'),
    ]
    assert len(source) == 8


@pytest.mark.filterwarnings('ignore:.*members are unusable')
def test_unreadable_pictures_give_their_place_or_are_marked(damaged):
    data = DataConfig(kind='webdataset', path=str(damaged), image_size=8, min_side=8)
    with pytest.warns(InputWarning, match='the next record takes its place') as caught:
        found = list(make_loader(data, batch_size=8, seed=0, repeat=False))
    assert len(found) == 1 and found[0]['caption'].tolist()[5:] == ['picture 0, “yes”'] * 3
    named = {str(w.message).split(':')[0] for w in caught if 'takes its place' in str(w.message)}
    assert named == {'00000.tar/cut', '00000.tar/odd', '00000.tar/tiny'}
    (batch,) = read_spans(data, [(0, 8)], seed=0, encode_text=lambda text: (np.zeros(2), len(text) % 3), repeat=False)
    assert batch['index'].tolist() == [0, 1, 2, 3, 4] and batch['img'].shape == (5, 8, 8, 3) and len(batch['len']) == 5
    reasons = dict(batch['bad'].tolist())
    assert reasons['00000.tar/cut'] == 'it is no picture file, or cut off in its first bytes'
    assert reasons['00000.tar/tiny'] == '5x4 is under 8 pixels on its shorter side'
    assert reasons['00000.tar/odd'] == 'its .json is not readable'


@pytest.mark.parametrize('keep', [1000, 2000, 512 * 7, 512 * 7 + 100])
def test_a_truncated_tar_is_named(tmp_path, keep):
    whole = write_tar(tmp_path / '00000.tar', members(0) | members(1))
    write_tar(tmp_path / '00001.tar', members(2))
    whole.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00000.tar' is truncated .*download it again") as caught:
        source_of(tmp_path)
    assert '\n' not in str(caught.value) and not (tmp_path / webdataset.INDEX_FILE).exists()


@pytest.mark.parametrize(
    'files, message',
    [
        ({}, 'holds no .tar files'),
        ({'a.tar.gz': b'x'}, 'unpack a.tar.gz'),
        ({'a.tar': b'no tar at all' * 100}, 'truncated or no tar'),
        ({'a.tar': b''}, 'truncated or no tar'),
    ],
)
def test_unusable_folders_stop_with_one_line(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path)
    assert '\n' not in str(caught.value)


def test_tars_without_pictures_and_wrong_settings(tmp_path):
    write_tar(tmp_path / 'a.tar', {'x.txt': b'text', 'x.json': json.dumps({}).encode()})
    with pytest.raises(UserError, match=r'hold no pictures \(jpg, jpeg, png, webp\)'):
        source_of(tmp_path)
    with pytest.raises(UserError, match='is not a folder'):
        source_of(tmp_path / 'a.tar')
    with pytest.raises(UserError, match="kind 'webdataset' has no splits"):
        source_of(tmp_path, split='test')
    with pytest.raises(UserError, match='min_side is -1'):
        source_of(tmp_path, min_side=-1)


@pytest.mark.slow
def test_the_index_of_many_examples_is_small_and_quickly_read(tmp_path):
    """200,000 examples: under 80 bytes each, and from the file kept beside the tars within a second of CPU time."""
    one = io.BytesIO()
    with tarfile.open(fileobj=one, mode='w') as tar:
        for i in range(20_000):
            for name in ('png', 'txt'):
                member = tarfile.TarInfo(f'{i:09d}.{name}')
                member.size = 1
                tar.addfile(member, io.BytesIO(b'x'))
    (tmp_path / 'one').write_bytes(one.getvalue())
    for number in range(10):
        (tmp_path / f'{number:05d}.tar').symlink_to(tmp_path / 'one')
    assert len(source_of(tmp_path)) == 200_000
    began = time.process_time()
    source = source_of(tmp_path)
    assert time.process_time() - began < 1 and len(source) == 200_000
    assert source._rows.nbytes + source._keys.nbytes < 200_000 * 80
