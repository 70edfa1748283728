"""The three quantizers behind one interface: the id is always that of the nearest code, and look-ups are the same."""

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
from muse.models import quantize
from muse.models.quantizers import FSQ, LFQ, make_quantizer
from muse.models.vqgan import VQGAN

TOKENS = 16 * 64 * 64  # 16 pictures of 64x64 tokens
PAPER = {
    'vq': VQConfig(),
    'sphere': VQConfig(code_dim=16, l2_normalize=True),
    'fsq': VQConfig(quantizer='fsq', levels=(8, 8, 8, 4, 4), code_dim=5),
    'lfq': VQConfig(quantizer='lfq', code_dim=13),
}
SMALL = {
    'vq': {},
    'fsq': {'quantizer': 'fsq', 'levels': (5, 4, 3), 'codebook_size': 60, 'code_dim': 3},
    'lfq': {'quantizer': 'lfq', 'codebook_size': 64, 'code_dim': 6},
    'sphere_lfq': {'quantizer': 'lfq', 'codebook_size': 64, 'code_dim': 6, 'l2_normalize': True},
}


def but_slow(names, *fast):
    """Parameters of which only some run with the fast tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('name', ['fsq', 'lfq', 'sphere_lfq'])
def test_ids_are_those_of_the_nearest_code(name):
    quantizer = make_quantizer(VQConfig(**SMALL[name]))
    latents, codes = quantizer.project(normal(0, 500, VQConfig(**SMALL[name]).code_dim)), quantizer.codes(None)
    distance = np.square(np.asarray(latents, np.float64)[:, None] - np.asarray(codes, np.float64)).sum(-1)
    np.testing.assert_array_equal(quantizer.ids(latents, codes), distance.argmin(-1))
    np.testing.assert_array_equal(quantizer.ids(codes, codes), np.arange(len(codes)))
    assert len(np.unique(np.asarray(codes), axis=0)) == len(codes)


def test_fsq_levels_by_hand():
    """Two coordinates of 3 and 2 levels: -1, 0, 1 and -1, 1; halfway goes down; far outside stays inside."""
    quantizer = FSQ((3, 2))
    expected = [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]
    np.testing.assert_array_equal(quantizer.codes(None), expected)
    latents = jnp.array([[-0.5, 0.0], [0.4, 0.2], [9.0, -9.0]])
    np.testing.assert_array_equal(quantizer.ids(latents, quantizer.codes(None)), [0, 4, 2])


def test_lfq_bits_by_hand():
    np.testing.assert_array_equal(LFQ(2, False).codes(None), [[-1, -1], [1, -1], [-1, 1], [1, 1]])
    np.testing.assert_allclose(jnp.linalg.norm(LFQ(5, True).codes(None), axis=-1), 1.0, rtol=1e-6)
    assert int(LFQ(3, False).ids(jnp.array([[0.1, -2.0, 3.0]]), jnp.zeros((8, 3)))[0]) == 0b101


@pytest.mark.parametrize(
    ('sphere', 'max_bytes'),
    [
        (True, 200),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 10**6), (True, 10**6), (False, 200))),
    ],
)
def test_lfq_entropy_is_that_of_all_codes(sphere, max_bytes):
    """The factorised form against the softmax over every code, with its gradient."""
    quantizer = LFQ(6, sphere)
    z, codes = normal(1, 24, 6), quantizer.codes(None)

    def factorised(z):
        return quantize.bits_entropy_loss(quantizer.project(z) / quantizer.size, max_bytes=max_bytes)

    def spelled_out(z):
        return quantize.entropy_loss(quantizer.project(z), codes, temperature=quantizer.size**2)

    np.testing.assert_allclose(factorised(z), spelled_out(z), rtol=1e-4)
    np.testing.assert_allclose(quantizer.entropy(quantizer.project(z), codes), factorised(z), rtol=1e-5)
    expected = jax.grad(spelled_out)(z)
    np.testing.assert_allclose(jax.grad(factorised)(z), expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize('name', but_slow(PAPER, 'vq', 'lfq'))
def test_search_and_entropy_stay_within_256_mib(name):
    """At 64x64 tokens x 8192 codes x batch 16; all distances would be 2 GiB."""
    config = PAPER[name]
    quantizer = make_quantizer(config)
    shapes = [jax.ShapeDtypeStruct((n, config.code_dim), jnp.float32) for n in (TOKENS, config.codebook_size)]

    def search(latents_NC, codebook_VC):
        return quantizer.ids(latents_NC, quantizer.codes(codebook_VC))

    def entropy(z_NC, codebook_VC):
        return quantizer.entropy(quantizer.project(z_NC), quantizer.codes(codebook_VC))

    for call in (search, jax.grad(entropy, argnums=(0, 1))):
        memory = jax.jit(call).lower(*shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 256 * 2**20


@pytest.mark.parametrize('name', but_slow(SMALL, 'vq'))
def test_encode_decode_and_soft_look_ups(name):
    sizes = {'channels': 8, 'channel_mult': (1, 2), 'num_res_blocks': 1, 'codebook_size': 50, 'code_dim': 6}
    config = VQConfig(**(sizes | SMALL[name]))
    graphdef, params = nnx.split(filled(lambda: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    assert ('codebook' in params) == (name == 'vq')
    img = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)

    @jax.jit
    def everything(params, img):
        model = nnx.merge(graphdef, params)
        ids, result = model.encode(img), model(img)
        weights = jax.nn.one_hot(ids, config.codebook_size)
        towards, moved = (jax.grad(f)(x) for f, x in ((_energy(model), weights), (_loss(graphdef, img), params)))
        return ids, result, model.decode(ids), model.decode(weights), model.codes(), towards, moved

    ids, result, hard, soft, codes, towards, moved = everything(params, img)
    np.testing.assert_array_equal(ids, result.ids_Bhw)
    np.testing.assert_allclose(result.quantised_BhwC, codes[ids], atol=1e-6)
    np.testing.assert_allclose(result.img_BHWC, hard, atol=2e-5)
    np.testing.assert_allclose(soft, hard, atol=1e-5)
    assert float(jnp.abs(towards).max()) > 0
    assert float(jnp.abs(moved['encoder']['conv_in']['kernel'][...]).max()) > 0


def _energy(model):
    return lambda weights: jnp.sum(model.decode(weights) ** 2)


def _loss(graphdef, img):
    return lambda params: jnp.mean(nnx.merge(graphdef, params)(img).img_BHWC ** 2)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'levels': (8, 8)}, "only 'fsq' has levels"),
        ({'quantizer': 'lfq', 'code_dim': 12}, r'must be 2\^code_dim'),
        ({'quantizer': 'fsq', 'code_dim': 5}, 'whose product is codebook_size'),
        ({'quantizer': 'fsq', 'code_dim': 5, 'levels': (8, 8, 8, 8, 2, 1)}, 'numbers of 2 or more'),
        ({'quantizer': 'fsq', 'code_dim': 5, 'levels': (8, 8, 8, 4, 4), 'l2_normalize': True}, 'no unit sphere'),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        make_quantizer(dataclasses.replace(VQConfig(), **changes))
