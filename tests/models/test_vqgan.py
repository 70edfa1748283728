"""The tokenizer's shapes, its seams, and its paper-size configuration."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx

from muse.config import VQConfig
from muse.errors import UserError
from muse.models.vqgan import VQGAN, to_float, to_uint8

CONFIG = VQConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, codebook_size=50, code_dim=6)


def pictures(number=2, height=16, width=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (number, height, width, 3)), jnp.float32)


def make(**changes) -> VQGAN:
    return filled(lambda: VQGAN(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(params=0)))


class Jitted:
    """A tokenizer whose methods are compiled as a whole, which is faster than op by op."""

    def __init__(self, **changes):
        self.module = make(**changes)
        self.config = self.module.config
        self.call = jax.jit(lambda img: self.module(img))
        self.latents = jax.jit(lambda img: self.module.latents(img))
        self.encode = jax.jit(lambda img: self.module.encode(img))
        self.decode = jax.jit(lambda ids: self.module.decode(ids))
        self.codes = self.module.codes


@pytest.fixture(scope='module', params=[pytest.param(False, marks=pytest.mark.slow), True], ids=['euclidean', 'sphere'])
def model(request):
    return Jitted(l2_normalize=request.param)


def test_pixels_round_trip():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    floats = to_float(levels)
    assert float(floats.min()) == -1.0 and float(floats.max()) == 1.0
    np.testing.assert_array_equal(to_uint8(floats), levels)
    np.testing.assert_array_equal(to_uint8(jnp.full((1, 1, 1, 3), 7.0)), np.full((1, 1, 1, 3), 255))


def test_call_is_encode_then_decode(model):
    result = model.call(pictures())
    assert result.ids_Bhw.shape == (2, 4, 4) and result.ids_Bhw.dtype == jnp.int32
    np.testing.assert_array_equal(result.ids_Bhw, model.encode(pictures()))
    np.testing.assert_array_equal(result.latents_BhwC, model.latents(pictures()))
    np.testing.assert_allclose(result.img_BHWC, model.decode(result.ids_Bhw), atol=2e-5)
    np.testing.assert_allclose(result.quantised_BhwC, model.codes()[result.ids_Bhw], atol=1e-6)
    distances = np.square(result.latents_BhwC[..., None, :] - model.codes()).sum(-1)
    np.testing.assert_array_equal(result.ids_Bhw, distances.argmin(-1))


def test_unit_length_only_when_asked(model):
    norms = jnp.linalg.norm(jnp.concatenate([model.codes(), model.latents(pictures()).reshape(-1, 6)]), axis=-1)
    assert bool(jnp.allclose(norms, 1, atol=1e-5)) == model.config.l2_normalize


def test_decode_takes_soft_one_hots(model):
    ids = model.encode(pictures())
    one_hot = jax.nn.one_hot(ids, 50)
    np.testing.assert_allclose(model.decode(one_hot), model.decode(ids), atol=1e-5)
    grads = jax.jit(jax.grad(lambda w: jnp.sum(model.decode(w) ** 2)))(one_hot)
    assert grads.shape == (2, 4, 4, 50) and float(jnp.abs(grads).max()) > 0


def test_gradient_reaches_encoder_through_the_codes(model):
    graphdef, params = nnx.split(model.module, nnx.Param)
    grads = jax.jit(jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(pictures()).img_BHWC ** 2)))(params)
    assert float(jnp.abs(grads['encoder']['conv_in']['kernel'][...]).max()) > 0
    assert float(jnp.abs(grads['codebook'][...]).max()) == 0  # the codebook has a loss of its own


@pytest.mark.parametrize('size', [(8, 24), pytest.param((32, 20), marks=pytest.mark.slow)])
def test_fully_convolutional(model, size):
    ids = model.encode(pictures(1, *size))
    assert ids.shape == (1, size[0] // 4, size[1] // 4)
    assert model.decode(ids).shape == (1, *size, 3)


def test_sides_that_do_not_divide(model):
    with pytest.raises(UserError, match='16x18 pixels does not divide into tokens of 4x4'):
        model.encode(pictures(1, 16, 18))


def test_rows_do_not_depend_on_the_batch(model):
    both = model.call(pictures())
    for row in range(2):
        alone = model.call(pictures()[row : row + 1])
        np.testing.assert_allclose(alone.img_BHWC[0], both.img_BHWC[row], atol=1e-5)
        np.testing.assert_array_equal(alone.ids_Bhw[0], both.ids_Bhw[row])


def test_bf16_is_close_and_finite():
    # Latents of a wide code space stay near; the decoder is compared on the same codes.
    exact, coarse = Jitted(), Jitted(dtype='bfloat16')
    z, z16 = exact.latents(pictures()), coarse.latents(pictures())
    assert z16.dtype == jnp.float32
    assert float(jnp.linalg.norm(z - z16) / jnp.linalg.norm(z)) < 0.05
    ids = exact.encode(pictures())
    img, img16 = exact.decode(ids), coarse.decode(ids)
    assert img16.dtype == jnp.float32 and bool(jnp.isfinite(img16).all())
    assert float(jnp.linalg.norm(img - img16) / jnp.linalg.norm(img)) < 0.05


def test_bf16_convolves_in_bf16_alone():
    model = make(dtype='bfloat16')
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params):
        return jnp.mean(nnx.merge(graphdef, params)(pictures()).img_BHWC ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    made = [line.split(' = ')[0] for line in text.splitlines() if 'conv_general_dilated' in line]
    assert len(made) > 20 and all('bf16' in line for line in made)


def size(config: VQConfig) -> dict[str, int]:
    """Parameters in millions of encoder and decoder; nothing is allocated."""
    model = nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(params=0)))
    parts = {'encoder': model.encoder, 'decoder': model.decoder}
    return {k: sum(x.size for x in jax.tree.leaves(nnx.state(v, nnx.Param))) / 1e6 for k, v in parts.items()}


@pytest.mark.slow
def test_paper_sizes():
    """Table 5's tokenizer, and the larger decoder of appendix A.2 over the same encoder."""
    table5 = size(VQConfig())
    larger = size(VQConfig(channel_mult=(1, 1, 2, 4), decoder_channels=256, decoder_num_res_blocks=4))
    assert table5['encoder'] == pytest.approx(25.1, abs=0.1) and table5['decoder'] == pytest.approx(30.6, abs=0.1)
    assert larger['encoder'] == pytest.approx(22.1, abs=0.1) and larger['decoder'] == pytest.approx(197.7, abs=0.1)


def test_every_parameter_names_its_axes():
    params = nnx.split(make(), nnx.Param)[1]
    for path, variable in nnx.to_flat_state(params):
        assert len(variable.get_metadata()['axes']) == variable.ndim, path
