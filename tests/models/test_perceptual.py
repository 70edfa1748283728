"""LPIPS: its sanity on made-up weights and on the real ones' recorded numbers; the critic and its penalty."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx
from safetensors.numpy import save_file

from muse.errors import UserError
from muse.models import discriminator as adversary
from muse.models import perceptual
from muse.models.discriminator import Discriminator
from muse.models.perceptual import Perceptual, lpips


def net(arch) -> Perceptual:
    """A net of the real shape with random weights (channel weights ≥ 0, as LPIPS has)."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in perceptual.shapes(arch).items():
        scale = 1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[:-1]))
        value = rng.normal(0, scale, shape) if not name.startswith('lin') else rng.uniform(0, 0.01, shape)
        weights[name] = jnp.asarray(value, jnp.float32)
    return Perceptual(weights, arch)


def pictures(size=40):
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)), jnp.float32)


def distorted(strength):
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(2, 40, 40, 3)), jnp.float32)
    smooth = jax.image.resize(pictures(5), (2, 40, 40, 3), 'linear')
    return smooth, smooth + strength * noise


@pytest.mark.parametrize('arch', ['vgg', 'alex', 'random'])
def test_a_distance(arch):
    judge = perceptual.random_net() if arch == 'random' else net(arch)
    a, b = distorted(0.3)
    lpips = jax.jit(perceptual.lpips)
    d = lpips(judge, a, b)
    assert d.shape == (2,) and bool((d > 0.001).all())
    np.testing.assert_allclose(lpips(judge, a, a), jnp.zeros(2), atol=1e-6)
    np.testing.assert_allclose(lpips(judge, b, a), d, rtol=1e-5)
    stronger = [float(lpips(judge, *distorted(s)).mean()) for s in (0.05, 0.2, 0.8)]
    assert stronger == sorted(stronger) and stronger[2] > 2 * stronger[0]


def test_random_net_is_always_the_same_and_bounded():
    a, b = distorted(1.0)
    d = lpips(perceptual.random_net(), a, b)
    np.testing.assert_array_equal(lpips(perceptual.random_net(), a, b), d)
    assert bool((d < 2).all())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_is_finite_even_between_flat_pictures(dtype):
    judge = perceptual.random_net().astype(dtype)
    flat = jnp.zeros((1, 16, 16, 3))
    grad = jax.jit(jax.grad(lambda x, other: lpips(judge, x, other).sum()))
    for other in (flat, flat + 0.5, -jnp.ones((1, 16, 16, 3))):
        grads = grad(flat, other)
        assert bool(jnp.isfinite(grads).all())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_passes_the_pools_under_jit(dtype):
    judge = net('alex').astype(dtype)
    a, b = distorted(0.3)
    grads = jax.jit(jax.grad(lambda x: lpips(judge, x, b).sum()))(a)
    assert bool(jnp.isfinite(grads).all()) and float(jnp.abs(grads).max()) > 0
    # A step against the gradient lowers the distance.
    assert float(lpips(judge, a - 0.02 * jnp.sign(grads), b).sum()) < float(lpips(judge, a, b).sum())


def test_bf16_is_close():
    a, b = distorted(0.3)
    lpips = jax.jit(perceptual.lpips)
    d, d16 = lpips(net('alex'), a, b), lpips(net('alex').astype('bfloat16'), a, b)
    assert d16.dtype == jnp.float32
    np.testing.assert_allclose(d16, d, rtol=0.05)


def test_file_round_trip_and_bad_files(tmp_path):
    judge = net('alex')
    save_file({k: np.asarray(v, np.float16) for k, v in judge.weights.items()}, tmp_path / 'alex.safetensors')
    read = perceptual.load_lpips(str(tmp_path), 'alex')
    assert all(v.dtype == jnp.float32 for v in read.weights.values())
    np.testing.assert_allclose(lpips(read, *distorted(0.3)), lpips(judge, *distorted(0.3)), rtol=1e-2)
    with pytest.raises(UserError, match=r'vgg.safetensors.*run tools/fetch_perceptual.py --out='):
        perceptual.load_lpips(str(tmp_path))
    (tmp_path / 'vgg.safetensors').write_bytes((tmp_path / 'alex.safetensors').read_bytes())
    with pytest.raises(UserError, match='does not hold the vgg net'):
        perceptual.load_lpips(str(tmp_path))
    (tmp_path / 'vgg.safetensors').write_bytes(b'cut')
    with pytest.raises(UserError, match='damaged'):
        perceptual.load_lpips(str(tmp_path))


def test_too_small_pictures():
    with pytest.raises(UserError, match='at least 35'):
        perceptual.features(net('alex'), jnp.zeros((1, 32, 64, 3)))


def shapes_picture():
    """A picture that needs no file: a gradient with a disc and bars."""
    y, x = np.mgrid[0:64, 0:64] / 63
    img = np.stack([x, y, 1 - x], axis=-1)
    img[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06] = (0.9, 0.2, 0.1)
    img[8:16:2, 40:60] = 0.1
    return jnp.asarray(2 * img - 1, jnp.float32)[None]


@pytest.mark.skipif(not os.environ.get('MUSE_PERCEPTUAL'), reason='MUSE_PERCEPTUAL names no folder of LPIPS weights')
@pytest.mark.parametrize(('arch', 'expected'), [('vgg', 0.60215), ('alex', 0.32785)])
def test_real_weights_give_the_reference_implementations_distance(arch, expected):
    judge = perceptual.load_lpips(os.environ['MUSE_PERCEPTUAL'], arch)
    a = shapes_picture()
    assert float(lpips(judge, a, a[:, :, ::-1])[0]) == pytest.approx(expected, rel=1e-3)


def critic(dtype='float32'):
    model = filled(lambda: Discriminator(8, dtype, rngs=nnx.Rngs(params=0)))
    return jax.jit(lambda img_BHWC: model(img_BHWC))


def test_critic_judges_patches_of_any_picture():
    assert critic()(jnp.zeros((2, 32, 48, 3))).shape == (2, 4, 6)
    logits = critic('bfloat16')(pictures(32))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, critic()(pictures(32)), atol=0.1)


def test_adversarial_losses():
    zero, sure = jnp.zeros((2, 4, 4)), jnp.full((2, 4, 4), 20.0)
    assert float(adversary.discriminator_loss(zero, zero)) == pytest.approx(2 * np.log(2))
    assert float(adversary.discriminator_loss(sure, -sure)) == pytest.approx(0, abs=1e-6)
    assert float(adversary.generator_loss(-sure)) == pytest.approx(20, rel=1e-4)
    assert float(adversary.generator_loss(sure)) == pytest.approx(0, abs=1e-6)


def test_r1_of_a_linear_critic():
    """Logits that are w·(their own patch): the penalty is ½|w|²."""
    w = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4, 3)), jnp.float32)

    def score(img):
        patches = img.reshape(2, 10, 4, 10, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        return jnp.einsum('bhwyxc,yxc->bhw', patches, w)

    assert float(adversary.r1_penalty(score, pictures(40))) == pytest.approx(0.5 * float(jnp.sum(w**2)), rel=1e-5)
    assert float(jax.jit(lambda img: adversary.r1_penalty(critic(), img))(pictures(32))) > 0
