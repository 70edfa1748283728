"""Measures of reconstructions against their definitions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from filled import filled
from flax import nnx

from muse.config import VQConfig
from muse.errors import UserError
from muse.evals import reconstruction
from muse.evals.features import random_features
from muse.models.perceptual import random_net
from muse.models.vqgan import VQGAN
from muse.tiling import tiled_tokenizer


def pictures(seed=0, number=3, size=24):
    return np.random.default_rng(seed).uniform(-1, 1, (number, size, size, 3)).astype(np.float32)


def test_psnr():
    a = jnp.asarray(0.5 * pictures())
    np.testing.assert_allclose(reconstruction.psnr(a, a + 0.02), 20 * np.log10(2 / 0.02), rtol=1e-4)
    np.testing.assert_allclose(reconstruction.psnr(a, a), 100)
    np.testing.assert_allclose(reconstruction.psnr(jnp.ones_like(a), jnp.full_like(a, 5.0)), 100)  # clipped


def test_ssim_against_its_definition():
    a, b = pictures(1, 1, 13), pictures(2, 1, 13)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window)[..., None] / window.sum() ** 2
    values = []
    for y in range(3):
        for x in range(3):
            p, q = a[0, y : y + 11, x : x + 11], b[0, y : y + 11, x : x + 11]
            mp, mq = (window * p).sum((0, 1)), (window * q).sum((0, 1))
            vp, vq = (window * (p - mp) ** 2).sum((0, 1)), (window * (q - mq) ** 2).sum((0, 1))
            cov = (window * (p - mp) * (q - mq)).sum((0, 1))
            c1, c2 = 0.02**2, 0.06**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    np.testing.assert_allclose(reconstruction.ssim(jnp.asarray(a), jnp.asarray(b)), [np.mean(values)], atol=1e-4)
    np.testing.assert_allclose(reconstruction.ssim(jnp.asarray(a), jnp.asarray(a)), [1], atol=1e-5)


def test_frechet_distance_against_the_matrix_root():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (60, 6)), rng.normal(0.5, 2, (40, 6)) @ rng.normal(size=(6, 6))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert reconstruction.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_with_itself_and_shifted():
    a = np.random.default_rng(4).normal(size=(10, 50))  # fewer pictures than features
    assert reconstruction.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert reconstruction.frechet_distance(a, a + 2) == pytest.approx(4 * 50)
    with pytest.raises(UserError, match='at least 2'):
        reconstruction.frechet_distance(a[:1], a)


def test_evaluate_tokenizer_is_a_mean_over_pictures_whatever_the_batches():
    config = VQConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, codebook_size=16, code_dim=4)
    params = nnx.split(filled(lambda: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
    img = np.random.default_rng(5).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    judges = {'lpips_random': random_net()}
    whole, parts = (
        reconstruction.evaluate_tokenizer(config, params, batches, judges=judges, feature_net=feature_net)
        for batches, feature_net in (([img], None), ([img[:2], img[2:]], random_features()))
    )
    assert whole['pictures'] == 4 and parts.keys() - whole.keys() == {'frechet_lite0'}
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-3), name
    made = np.asarray(reconstruction.reconstruct(config, params)(img)[0])
    mse = np.square(made.astype(float) - img).mean((1, 2, 3))
    assert whole['psnr'] == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), rel=1e-4)
    assert 0 < whole['codebook_usage'] <= 1 <= whole['perplexity'] <= 16
    assert whole['lpips_random'] > 0 and parts['frechet_lite0'] > 0


def test_evaluate_whole_agrees_with_evaluate_tokenizer_where_the_picture_is_one_piece():
    config = VQConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, codebook_size=16, code_dim=4)
    params = nnx.split(filled(lambda: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
    img = np.random.default_rng(6).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    judges = {'lpips_random': random_net()}
    tokenizer = tiled_tokenizer(config, params, tile=16, overlap=4)
    batched = reconstruction.evaluate_tokenizer(config, params, [img], judges=judges)
    whole = reconstruction.evaluate_whole(tokenizer, img, judges=judges, piece=16)
    assert whole.keys() == batched.keys()
    for name, value in batched.items():
        assert whole[name] == pytest.approx(value, rel=1e-2), name  # rounding before or after the pixels' blend
    with pytest.raises(UserError, match='16x16 is smaller than a piece of 20'):
        reconstruction.evaluate_whole(tokenizer, img, judges=judges, piece=20)


def test_pieces_cover_a_picture():
    for side in range(7, 60):
        begins = reconstruction._spread(side, 7)
        assert begins[0] == 0 and begins[-1] == side - 7 and len(begins) == -(-side // 7)
        assert all(0 < b - a <= 7 for a, b in zip(begins, begins[1:], strict=False))


def test_no_pictures():
    config = VQConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, codebook_size=16, code_dim=4)
    params = nnx.State({})
    with pytest.raises(UserError, match='no pictures'):
        reconstruction.evaluate_tokenizer(config, params, [], judges={})
