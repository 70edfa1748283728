"""Parquet files: pictures in a column or lying beside; what was not downloaded is counted and named."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import colour, members, picture, write_tar

from muse.config import DataConfig
from muse.data import parquet
from muse.data.pipeline import make_loader, read_spans
from muse.data.sources import open_source
from muse.errors import InputWarning, UserError


def source_of(folder, **changes):
    parquet._open_folder.cache_clear()  # as another run
    parquet._read_group.cache_clear()
    return open_source(DataConfig(kind='parquet', path=str(folder), image_size=8, **changes))


def img2dataset_rows(numbers, failed=()) -> dict[str, list]:
    """The columns that img2dataset writes for examples, of which some were not downloaded."""
    failed = [i in failed for i in numbers]
    return {
        'url': [f'https://example.org/{i}' for i in numbers],
        'caption': [f'picture {i}, “yes”' for i in numbers],
        'key': [f'{i:09d}' for i in numbers],
        'status': ['failed_to_download' if bad else 'success' for bad in failed],
        'error_message': ['HTTP Error 404:\nNot Found' if bad else None for bad in failed],
        'width': [None if bad else 20 for bad in failed],
    }


def write(file, columns, rows_a_group=2):
    pq.write_table(pa.table(columns), file, row_group_size=rows_a_group)


def write_columns(folder, failed=()):
    for file in range(3):
        numbers = range(5 * file, 5 * file + 5)
        pictures = [None if i in failed else picture(i) for i in numbers]
        write(folder / f'{file:05d}.parquet', img2dataset_rows(numbers, failed) | {'jpg': pictures})


def one_pass(folder, **changes):
    data = DataConfig(kind='parquet', path=str(folder), image_size=8, **changes)
    batches = make_loader(data, batch_size=4, seed=0, repeat=False)
    return [(img, caption) for batch in batches for img, caption in zip(batch['img'], batch['caption'], strict=True)]


def assert_are(found, numbers):
    assert [caption for _, caption in found] == [f'picture {i}, “yes”' for i in numbers]
    assert all((img == colour(i)).all() for (img, _), i in zip(found, numbers, strict=True))


def test_pictures_in_a_column(tmp_path):
    write_columns(tmp_path)
    assert_are(one_pass(tmp_path), range(15))
    source = pickle.loads(pickle.dumps(source_of(tmp_path)))
    for record in np.random.default_rng(0).permutation(15):
        assert (source.example(int(record), np.random.default_rng(0))['img'] == colour(record)).all()


def test_what_was_not_downloaded_is_counted_and_named(tmp_path):
    failed = (0, 6, 7, 14)
    write_columns(tmp_path, failed)
    with pytest.warns(InputWarning, match='4 of 15 rows were not downloaded') as caught:
        source = source_of(tmp_path)
    assert '\n' not in str(caught[0].message)
    assert list(source.skipped()) == [
        (f'{i // 5:05d}.parquet/{i:09d}', 'not downloaded (HTTP Error 404: Not Found)') for i in failed
    ]
    with pytest.warns(InputWarning):
        assert_are(one_pass(tmp_path), [i for i in range(15) if i not in failed])


def test_files_that_lie_beside(tmp_path):
    for file in range(2):
        numbers = range(3 * file, 3 * file + 3)
        write(tmp_path / f'{file:05d}.parquet', img2dataset_rows(numbers))
        (tmp_path / f'{file:05d}').mkdir()
        for i in numbers:
            for name, data in members(i, 'webp').items():
                (tmp_path / f'{file:05d}' / name).write_bytes(data)
    assert_are(one_pass(tmp_path), range(6))
    (tmp_path / '00001' / '000000004.webp').unlink()
    data = DataConfig(kind='parquet', path=str(tmp_path), image_size=8)
    (batch,) = read_spans(data, [(0, 6)], seed=0, encode_text=lambda text: (np.zeros(1), 1), repeat=False)
    ((name, reason),) = batch['bad'].tolist()
    assert name == '00001.parquet/000000004' and 'No such file' in reason and len(batch['index']) == 5


def test_columns_of_other_names_and_structs(tmp_path):
    pictures = [{'bytes': picture(i), 'path': f'{i}.png'} for i in range(4)] + [{'bytes': None, 'path': 'gone'}]
    texts = ['a', None, 'c', '', 'e']
    write(tmp_path / 'x.parquet', {'image': pictures, 'text': texts})
    data = DataConfig(kind='parquet', path=str(tmp_path), image_size=8)
    (batch,) = read_spans(data, [(0, 5)], seed=0, encode_text=lambda text: (np.zeros(1), 1), repeat=False)
    assert batch['caption'].tolist() == ['a', '', 'c', ''] and (batch['img'][2] == colour(2)).all()
    assert batch['bad'].tolist() == [('x.parquet/group 2 row 0', "its column 'image' holds no file's bytes")]
    write(tmp_path / 'x.parquet', {'photo': [p['bytes'] for p in pictures[:4]], 'alt': ['a', 'b', 'c', 'd']})
    source = source_of(tmp_path, image_key='photo', caption_key='alt')
    assert source.example(3, np.random.default_rng(0))['caption'] == 'd'
    with pytest.raises(UserError, match="no column 'caption', only photo, alt: set data.caption_key"):
        source_of(tmp_path, image_key='photo')
    assert source_of(tmp_path, image_key='photo', caption_key='').example(0, np.random.default_rng(0))['caption'] == ''


def refused(folder, message, **changes):
    with pytest.raises(UserError, match=message) as caught:
        source_of(folder, **changes)
    assert '\n' not in str(caught.value)


def test_unusable_folders_stop_with_one_line(tmp_path):
    refused(tmp_path, 'holds no .parquet files')
    refused(tmp_path / 'nowhere', 'is not a folder')
    refused(tmp_path, "kind 'parquet' has no splits", split='test')
    write(tmp_path / '00000.parquet', img2dataset_rows(range(3)))
    refused(tmp_path, r"neither in a column 'image' or jpg.*there are url, caption.* nor beside as 00000/KEY")
    write_tar(tmp_path / '00000.tar', members(0))
    refused(tmp_path, "they lie in .tar files: set data.kind to 'webdataset'")
    write(tmp_path / '00001.parquet', {'jpg': [picture(0)]})
    refused(tmp_path, r"00001.parquet' has the columns jpg, '.*00000.parquet' url, caption")
    (tmp_path / '00001.parquet').write_bytes((tmp_path / '00000.parquet').read_bytes()[:-20])
    refused(tmp_path, '00001.parquet. is truncated or no parquet file')
    (tmp_path / '00001.parquet').unlink()
    write(tmp_path / '00000.parquet', img2dataset_rows(range(3), failed=range(3)))
    refused(tmp_path, 'none of 3 rows was downloaded')


def test_without_pyarrow(tmp_path, monkeypatch):
    write_columns(tmp_path)
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
    refused(tmp_path, 'needs pyarrow, which is not installed: pip install pyarrow')
