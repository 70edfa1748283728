"""The loader: the same examples whatever the hosts, the workers and the restarts."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from shell import ENVIRONMENT, ROOT

from muse.config import DataConfig
from muse.data.pipeline import make_loader
from muse.errors import UserError

DATA = DataConfig(kind='scenes', image_size=32, text_length=6)
KEYS = ('index', 'img', 'caption')


def batches(number: int, *, data: DataConfig = DATA, batch_size: int = 8, **options):
    options = {'seed': 3} | options
    return list(itertools.islice(make_loader(data, batch_size=batch_size, **options), number))


def assert_equal(one: dict, two: dict, keys=KEYS):
    for key in keys:
        np.testing.assert_array_equal(one[key], two[key])


def test_shapes_types_and_determinism():
    one, two = batches(3), batches(3)
    for step, (first, second) in enumerate(zip(one, two, strict=True)):
        assert first['img'].shape == (8, 32, 32, 3) and first['img'].dtype == np.uint8
        assert first['index'].dtype == np.int64 and first['index'].tolist() == list(range(8 * step, 8 * step + 8))
        assert all(isinstance(caption, str) and caption for caption in first['caption'])
        assert_equal(first, second)
    assert (batches(1, seed=4)[0]['caption'] != one[0]['caption']).any()


def test_two_hosts_together_see_what_one_sees():
    whole = batches(3)
    parts = ([0, 1, 4, 5], [2, 3, 6, 7])  # as the devices of a torus may lie
    shares = [batches(3, rows=rows) for rows in parts]
    for step in range(3):
        for rows, share in zip(parts, shares, strict=True):
            assert_equal({key: whole[step][key][rows] for key in KEYS}, share[step])


def test_resume_from_a_step_equals_going_on():
    # 158 sample pictures: step 25 lies in the second epoch.
    straight = batches(28)
    assert_equal(straight[25], batches(1, start_step=25)[0])
    for one, two in zip(straight[18:22], batches(4, start_step=18), strict=True):
        assert_equal(one, two)


def test_worker_processes_change_nothing():
    data = DataConfig(kind='scenes', image_size=32, workers=2)
    for one, two in zip(batches(5), batches(5, data=data), strict=True):
        assert_equal(one, two)


TO_THE_END = """
from muse.config import DataConfig
from muse.data.pipeline import make_loader

if __name__ == '__main__':
    data = DataConfig(kind='scenes', split='heldout_pairs', image_size=32, workers=2)
    print(len(list(make_loader(data, batch_size=26, seed=0, repeat=False))))
"""


@pytest.mark.slow
def test_a_process_that_read_to_the_end_leaves_no_shared_memory(tmp_path):
    """Python warns of a leak where the workers' last batch is still held when the process ends."""
    (tmp_path / 'script.py').write_text(TO_THE_END)
    command, path = [sys.executable, str(tmp_path / 'script.py')], {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, env=ENVIRONMENT | path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, '1\n'), done.stderr
    assert 'leaked' not in done.stderr


def test_each_epoch_shows_every_record_once_in_a_new_order():
    data = DataConfig(kind='scenes', split='heldout_pairs', image_size=32)
    held = batches(99, data=data, batch_size=26, repeat=False)
    assert len(held) == 1 and len(held[0]['img']) == 26
    epochs = batches(2, data=data, batch_size=26)
    orders = [epoch['caption'].tolist() for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(held[0]['caption']) and orders[0] != orders[1]


def test_one_pass_keeps_the_short_last_batch():
    data = DataConfig(kind='scenes', split='heldout_pairs', image_size=32)
    sizes = [len(batch['index']) for batch in batches(99, data=data, batch_size=10, repeat=False)]
    assert sizes == [10, 10, 6]


def test_text_is_encoded_beside_its_own_picture():
    def encode(caption: str):
        ids = np.zeros(6, np.int32)
        ids[0] = sum(caption.encode())
        return ids, len(caption) % 7

    batch = batches(2, encode_text=encode)[1]
    assert batch['ids'].shape == (8, 6) and batch['ids'].dtype == batch['len'].dtype == np.int32
    assert batch['ids'][:, 0].tolist() == [sum(caption.encode()) for caption in batch['caption']]
    assert batch['len'].tolist() == [len(caption) % 7 for caption in batch['caption']]


@pytest.mark.parametrize(
    'data, options, message',
    [
        (DATA, {'batch_size': 0}, 'batch_size 0'),
        (DATA, {'rows': [7, 8]}, 'rows from 0'),
        (DataConfig(kind='folder'), {}, 'data.path is empty'),
        (DataConfig(kind='scenes', random_flip=True), {}, 'left and right'),
        (DataConfig(kind='folder', path='x', split='test'), {}, 'no splits but'),
        (DataConfig(kind='tfds', path='x'), {}, 'data.name is empty'),
        (DataConfig(kind='tfds', path='x', name='nothing_like_it'), {}, 'check data.name'),
        (DataConfig(kind='scenes', max_objects=4), {}, 'max_objects'),
    ],
)
def test_wrong_settings_stop_with_one_line(data, options, message):
    with pytest.raises(UserError, match=message) as caught:
        batches(1, data=data, **options)
    assert '\n' not in str(caught.value)
