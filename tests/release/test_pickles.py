"""The reader of pickled weights: what PyTorch wrote is read, and no code of a file runs."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files

from muse.errors import UserError
from muse.release import pickles
from muse.release.pickles import NUMPY_NAMES, PlainUnpickler, StoredTensor, read_torch

GOLDEN = Path(__file__).parents[1] / 'golden' / 'public_vq'


@pytest.mark.parametrize('name', ['new.pt', 'old.pt'])
def test_what_torch_saved(name):
    loaded = read_torch(GOLDEN / name)
    base, found = np.arange(24, dtype=np.float32).reshape(4, 6), loaded['state_dict']
    expected = {
        'turned': base.T, 'part': base[1:3, ::2], 'half': (base.astype(np.float16) / np.float16(7)),
        'brain': (base / 7).astype(ml_dtypes.bfloat16), 'whole': base, 'parameter': base[0] * 2,
        'scalar': np.int64(5), 'empty': np.zeros((0, 3), np.float32),
    }  # fmt: skip
    assert list(found) == list(expected) and loaded['epoch'] == 3
    for key, value in expected.items():
        read = found[key].read()
        assert read.dtype == value.dtype and read.shape == value.shape == found[key].shape
        np.testing.assert_array_equal(read.astype(np.float64), np.asarray(value, np.float64))
    step = loaded['optimizer_states'][0]['state'][0]
    assert step['step'] == 7 and (step['exp_avg'].read() == base + 1).all()


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('archive/data.pkl', pickled)
    return path


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_file_does_not_run(zipped, protocol, tmp_path):
    """The same bytes given to pickle itself make the file: a real trap."""
    trap = tmp_path / 'trapped'
    pickled = pickle.dumps({'state_dict': Call(os.mkdir, str(trap))}, protocol=protocol)
    path = tmp_path / 'weights.ckpt'
    archive(path, pickled) if zipped else path.write_bytes(pickled)
    with pytest.raises(UserError, match=rf"'{path}': the weights file names '(posix|nt|os)\.mkdir'") as error:
        read_torch(path)
    assert not trap.exists() and '\n' not in str(error.value)
    pickle.loads(pickled)
    assert trap.exists()


def test_arrays_reader_refuses_code_too(tmp_path):
    pickled = pickle.dumps(Call(os.mkdir, str(tmp_path / 'trapped')))
    with pytest.raises(UserError, match='mkdir'):
        PlainUnpickler(io.BytesIO(pickled), NUMPY_NAMES).load()
    assert not (tmp_path / 'trapped').exists()


def test_names_of_training_callbacks_are_inert(tmp_path):
    """Lightning's checkpoints have classes as keys; called, they are refused."""
    key = b'cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n'
    found = read_torch(archive(tmp_path / 'key', b'}' + key + b'I1\ns.'))
    assert found == {'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint': 1}
    for called in (key + b'(tR.', key + b')\x81.', key + b'}b.'):
        with pytest.raises(UserError, match='damaged one'):
            read_torch(archive(tmp_path / 'call', called))


@pytest.mark.parametrize('module', [b'numpy.core.multiarray', b'numpy._core.multiarray'])
def test_numbers_of_numpys_beside_the_weights_are_passed_over(module, tmp_path):
    """As in checkpoints of a training: before numpy 2 the module had another name."""
    content = {'epoch': 3, 'best': np.float64(0.25), 'rates': [np.float32(1e-4), np.int64(7)], 'on': np.bool_(True)}
    pickled = re.sub(rb'cnumpy\._?core\.multiarray\n', b'c' + module + b'\n', pickle.dumps(content, 2))
    assert pickled.count(module) == 1
    found = read_torch(archive(tmp_path / 'a', pickled))
    assert found['epoch'] == 3 and found.keys() == content.keys() and len(found['rates']) == 2
    assert not vars(found['best'])


def test_an_index_that_is_larger_than_any(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, '_MOST_PICKLED', 100)
    assert read_torch(archive(tmp_path / 'a', b'N.' + bytes(98))) is None
    with pytest.raises(UserError, match='names and places of its tensors take 101 bytes'):
        read_torch(archive(tmp_path / 'a', b'N.' + bytes(99)))


def test_a_tensor_cannot_be_forged(tmp_path):
    """Attributes of what is in hand can be set by a pickle: tensors and storages have none."""
    rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n'
    good = torch_files.write_new(tmp_path / 'good', {'w': np.arange(6, dtype=np.float32)})
    pickled = zipfile.ZipFile(good).read('archive/data.pkl')
    assert read_torch(good)['w'].read().tolist() == [0, 1, 2, 3, 4, 5]
    assert pickled.count(b's.') == 1 or pickled.endswith(b's.')
    for wrong in (
        rebuild + b'((I0\nI0\nI0\nttR.',  # another thing in a storage's place
        rebuild + b'((lI0\n(I4\nt(I1\ntI00\nNtR.',
        b'ctorch._utils\n_rebuild_tensor_v2\n}b' + b'(tR.',
    ):
        with pytest.raises(UserError, match='damaged one'):
            read_torch(archive(tmp_path / 'wrong', wrong))
    assert not hasattr(StoredTensor((), (), 0, None), '__dict__')  # pyright: ignore[reportArgumentType]


def test_a_tensor_beyond_its_storage(tmp_path):
    path = torch_files.write_new(tmp_path / 'a', {'w': np.arange(6, dtype=np.float32)}, start=1)
    with pytest.raises(UserError, match='beyond its storage'):
        read_torch(path)


@pytest.mark.parametrize('name', ['new.pt', 'old.pt'])
def test_damaged_files(name, tmp_path):
    whole = (GOLDEN / name).read_bytes()
    for keep in (0, 3, 40, len(whole) // 2, len(whole) - 3):
        (tmp_path / name).write_bytes(whole[:keep])
        with pytest.raises(UserError, match='no PyTorch file, or a damaged one') as error:
            read_torch(tmp_path / name)
        assert '\n' not in str(error.value)


def test_damaged_values_are_found_when_read(tmp_path):
    path = torch_files.write_new(tmp_path / 'a', {'w': np.arange(600, dtype=np.float32)})
    found = read_torch(path)
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(300).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='damaged one'):
        found['w'].read()
