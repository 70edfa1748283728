"""A folder of pictures: what is wrong is named and left out once, at the start."""

import json

import numpy as np
import pytest
from PIL import Image

from muse.config import DataConfig
from muse.data.folder import _index, _index_pictures, index_folder
from muse.data.pipeline import make_loader
from muse.data.splits import unit_hash
from muse.errors import InputWarning, UserError


@pytest.fixture
def folder(tmp_path):
    for name, colour in (('red.png', (255, 0, 0)), ('blue.png', (0, 0, 255))):
        Image.new('RGB', (30, 20), colour).save(tmp_path / name)
    return tmp_path


def write_rows(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / 'captions.jsonl').write_text('\n'.join(lines) + '\n')


def one_pass(folder):
    data = DataConfig(kind='folder', path=str(folder), image_size=8)
    return list(make_loader(data, batch_size=2, seed=0, repeat=False))


RED, BLUE = {'file': 'red.png', 'caption': 'red\u2028paint'}, {'file': 'blue.png', 'caption': 'blue, "paint"'}


def test_jsonl_pairs_the_right_picture_and_caption(folder):
    write_rows(folder, RED, BLUE, RED)
    first, second = one_pass(folder)
    assert first['caption'].tolist() == ['red\u2028paint', 'blue, "paint"']
    assert second['caption'].tolist() == ['red\u2028paint']
    assert (first['img'][0] == (255, 0, 0)).all() and (first['img'][1] == (0, 0, 255)).all()
    assert first['index'].tolist() == [0, 1] and second['index'].tolist() == [2]


def test_csv(folder):
    (folder / 'captions.csv').write_bytes('\ufefffile,caption\r\nblue.png,"blue, ""paint"""\r\nred.png,\r\n'.encode())
    assert [(path.name, caption) for path, caption in index_folder(folder)[0]] == [
        ('blue.png', 'blue, "paint"'),
        ('red.png', ''),
    ]


def test_bad_rows_and_pictures_are_counted_named_and_skipped(folder):
    (folder / 'broken.png').write_bytes((folder / 'red.png').read_bytes()[:50])
    outside = {'file': '../red.png', 'caption': 'x'}
    gone, broken = {'file': 'gone.png', 'caption': 'x'}, {'file': 'broken.png', 'caption': 'x'}
    write_rows(folder, RED, '{not json', {'file': 'red.png'}, gone, outside, broken, BLUE)
    for _ in range(2):  # the second time from what was kept
        with pytest.warns(InputWarning) as caught:
            _index.cache_clear()
            pairs, skipped = index_folder(folder)
        assert [path.name for path, _ in pairs] == ['red.png', 'blue.png'] and len(skipped) == 5
        message = str(caught[0].message)
        assert '5 rows or pictures' in message and '\n' not in message
        assert all(part in message for part in ('line 2', 'line 3', "'gone.png'", 'outside', 'broken.png'))


@pytest.mark.filterwarnings('ignore:.*1 pictures are unreadable and were skipped. sub/broken.png')
def test_pictures_alone(folder):
    """Every one below the folder, in order, without a captions file or whatever it says."""
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'a.png').write_bytes((folder / 'red.png').read_bytes())
    (folder / 'sub' / 'broken.png').write_bytes(b'no picture')
    data = DataConfig(kind='folder', path=str(folder), image_size=8, caption_key='')
    for _ in range(2):
        (batch,) = make_loader(data, batch_size=4, seed=0, repeat=False)
        assert batch['img'][:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0], [255, 0, 0]]
        assert batch['caption'].tolist() == ['', '', ''] and not batch['bad'].any()
        write_rows(folder, RED)
        _index_pictures.cache_clear()
    assert (folder / 'pictures.checked.json').exists()
    for path in folder.rglob('*.png'):
        path.write_bytes(b'')
    with pytest.warns(InputWarning), pytest.raises(UserError, match='holds no readable picture'):
        index_folder(folder, captioned=False)


def test_halves_of_characters_in_a_caption_are_left_out(folder):
    """JSON can hold them, and a record could not be written; the vocabulary does not see them either."""
    write_rows(folder, {'file': 'red.png', 'caption': 'a\ud800 cat \ud83d\ude00'}, BLUE)
    (batch,) = one_pass(folder)
    assert batch['caption'].tolist() == ['a cat \U0001f600', BLUE['caption']]
    assert 0 <= unit_hash('\udcff.png') < 1


@pytest.mark.filterwarnings('ignore:.*were skipped')
@pytest.mark.parametrize('name', ['x' * 300, 'y/' + 'x' * 5000, 'a\0b', '\ud800'])
def test_a_name_that_no_file_can_have_is_a_bad_row(folder, name):
    write_rows(folder, {'file': name, 'caption': 'x'}, RED)
    pairs, ((line, reason),) = index_folder(folder)
    assert len(pairs) == 1 and line == 'line 1' and reason.endswith(' does not exist') and len(reason) < 120


def test_a_repaired_picture_is_looked_at_again(folder):
    good = (folder / 'red.png').read_bytes()
    (folder / 'red.png').write_bytes(good[:50])
    write_rows(folder, RED, BLUE)
    with pytest.warns(InputWarning):
        assert len(index_folder(folder)[0]) == 1
    (folder / 'red.png').write_bytes(good)
    _index.cache_clear()  # in the next run
    assert len(index_folder(folder)[0]) == 2


@pytest.mark.parametrize(
    'files, message',
    [
        ({}, 'neither captions.jsonl nor captions.csv'),
        ({'captions.jsonl': b'', 'captions.csv': b'file,caption\n'}, 'both'),
        ({'captions.csv': b'path,text\nred.png,red\n'}, 'must be file,caption'),
        ({'captions.jsonl': b'\xff\xfe'}, 'not UTF-8'),
        ({'captions.jsonl': b''}, 'no readable picture'),
    ],
)
def test_unusable_folders_stop_with_one_line(folder, files, message):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        index_folder(folder)
    assert '\n' not in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match='is not a folder'):
        index_folder(tmp_path / 'nowhere')


def test_flip_shows_both_sides_and_never_changes_more(folder):
    half = Image.new('RGB', (20, 20), (255, 0, 0))
    half.paste((0, 0, 255), (10, 0, 20, 20))
    half.save(folder / 'half.png')
    write_rows(folder, {'file': 'half.png', 'caption': 'half'})
    data = DataConfig(kind='folder', path=str(folder), image_size=20, random_flip=True)
    batch = next(make_loader(data, batch_size=32, seed=0))
    straight = np.asarray(half)
    flipped = [bool((img == straight[:, ::-1]).all()) for img in batch['img']]
    assert all(flip or (img == straight).all() for flip, img in zip(flipped, batch['img'], strict=True))
    assert 6 < sum(flipped) < 26
