"""What each storage keeps and loses."""

import numpy as np
import pytest

from muse.errors import UserError
from muse.release.storage import kinds, pack_tensor, unpack
from muse.release.stored import InMemory, stored_hash

RNG = np.random.default_rng(0)


def hashed(tensors):
    return stored_hash({name: InMemory(values) for name, values in tensors.items()})


@pytest.mark.parametrize('storage', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('layer_axes', [0, 1])
@pytest.mark.parametrize('shape', [(3, 40, 16), (8, 256), (2048,), (3, 3), (2, 3, 5, 64)])
def test_what_a_tensor_becomes_is_known_beforehand(shape, layer_axes, storage):
    packed = pack_tensor('k', RNG.normal(size=shape).astype(np.float32), layer_axes, storage)
    assert {name: (x.dtype, x.shape) for name, x in packed.items()} == kinds('k', shape, layer_axes, storage)


def test_int8_error_is_half_a_step_of_each_channel_and_layer():
    kernel = RNG.normal(size=(3, 40, 16)).astype(np.float32)
    kernel *= 10.0 ** RNG.uniform(-4, 2, size=(3, 1, 16)).astype(np.float32)  # channels of very different size
    packed = pack_tensor('k', kernel, 1, 'int8')
    assert packed['k'].dtype == np.int8 and packed['k.scale'].shape == (3, 1, 16)
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert (np.abs(unpack(packed, 'k') - kernel) <= 0.5001 * step).all()
    assert (np.abs(packed['k']).max(axis=1) == 127).all()


def test_int8_of_a_zero_channel_is_zero():
    kernel = RNG.normal(size=(64, 32)).astype(np.float32)
    kernel[:, 5] = 0
    restored = unpack(pack_tensor('k', kernel, 0, 'int8'), 'k')
    assert (restored[:, 5] == 0).all() and np.isfinite(restored).all()


@pytest.mark.parametrize('storage', ['float32', 'bfloat16', 'int8'])
def test_small_tensors_norms_and_stacked_vectors_stay_exact(storage):
    tensors = {
        'small': RNG.normal(size=(31, 33)).astype(np.float32),
        'bias': RNG.normal(size=4096).astype(np.float32),
        'final_norm.scale': RNG.normal(size=(64, 64)).astype(np.float32),
        'blocks.bias': RNG.normal(size=(8, 512)).astype(np.float32),
    }
    for name, tensor in tensors.items():
        packed = pack_tensor(name, tensor, int(name == 'blocks.bias'), storage)
        assert packed[name].dtype == np.float32
        np.testing.assert_array_equal(unpack(packed, name), tensor)


def test_bfloat16_keeps_eight_bits():
    kernel = RNG.normal(size=(64, 64)).astype(np.float32)
    packed = pack_tensor('k', kernel, 0, 'bfloat16')
    assert packed['k'].itemsize == 2
    np.testing.assert_allclose(unpack(packed, 'k'), kernel, rtol=2**-8)


def test_hash_sees_every_bit_name_and_shape_but_no_order():
    a, b = RNG.normal(size=(4, 6)).astype(np.float32), RNG.normal(size=3).astype(np.float32)
    whole = hashed({'a': a, 'b': b})
    assert whole == hashed({'b': b.copy(), 'a': a.copy()})
    touched = a.copy()
    touched[0, 0] = np.nextafter(touched[0, 0], np.float32(9))
    others = [
        {'a': touched, 'b': b},
        {'a': a, 'c': b},
        {'a': a.T.reshape(6, 4), 'b': b},
        {'a': a.reshape(6, 4), 'b': b},
    ]
    assert len({whole, *map(hashed, others)}) == 5


def test_nan_is_refused_by_name():
    with pytest.raises(UserError, match="'blocks.k' holds NaN"):
        pack_tensor('blocks.k', np.full((2, 2), np.nan, np.float32), 0, 'int8')


def test_unknown_storage_names_the_nearest():
    with pytest.raises(UserError, match="'int9' does not exist; did you mean 'int8'"):
        kinds('k', (2, 2), 0, 'int9')  # pyright: ignore[reportArgumentType]
