"""What each storage keeps and loses."""

import numpy as np
import pytest

from muse.errors import UserError
from muse.release.storage import content_hash, pack, unpack

RNG = np.random.default_rng(0)


def test_int8_error_is_half_a_step_of_each_channel_and_layer():
    kernel = RNG.normal(size=(3, 40, 16)).astype(np.float32)
    kernel *= 10.0 ** RNG.uniform(-4, 2, size=(3, 1, 16)).astype(np.float32)  # channels of very different size
    packed = pack({'k': kernel}, frozenset({'k'}), 'int8')
    assert packed['k'].dtype == np.int8 and packed['k.scale'].shape == (3, 1, 16)
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert (np.abs(unpack(packed, 'k') - kernel) <= 0.5001 * step).all()
    assert (np.abs(packed['k']).max(axis=1) == 127).all()


def test_int8_of_a_zero_channel_is_zero():
    kernel = RNG.normal(size=(64, 32)).astype(np.float32)
    kernel[:, 5] = 0
    restored = unpack(pack({'k': kernel}, frozenset(), 'int8'), 'k')
    assert (restored[:, 5] == 0).all() and np.isfinite(restored).all()


@pytest.mark.parametrize('storage', ['float32', 'bfloat16', 'int8'])
def test_small_tensors_norms_and_stacked_vectors_stay_exact(storage):
    tensors = {
        'small': RNG.normal(size=(31, 33)).astype(np.float32),
        'bias': RNG.normal(size=4096).astype(np.float32),
        'final_norm.scale': RNG.normal(size=(64, 64)).astype(np.float32),
        'blocks.bias': RNG.normal(size=(8, 512)).astype(np.float32),
    }
    packed = pack(tensors, frozenset({'blocks.bias'}), storage)
    for name, tensor in tensors.items():
        assert packed[name].dtype == np.float32
        np.testing.assert_array_equal(unpack(packed, name), tensor)


def test_bfloat16_keeps_eight_bits():
    kernel = RNG.normal(size=(64, 64)).astype(np.float32)
    packed = pack({'k': kernel}, frozenset(), 'bfloat16')
    assert packed['k'].itemsize == 2
    np.testing.assert_allclose(unpack(packed, 'k'), kernel, rtol=2**-8)


def test_hash_sees_every_bit_name_and_shape_but_no_order():
    a, b = RNG.normal(size=(4, 6)).astype(np.float32), RNG.normal(size=3).astype(np.float32)
    whole = content_hash({'a': a, 'b': b})
    assert whole == content_hash({'b': b.copy(), 'a': a.copy()})
    touched = a.copy()
    touched[0, 0] = np.nextafter(touched[0, 0], np.float32(9))
    others = [
        {'a': touched, 'b': b},
        {'a': a, 'c': b},
        {'a': a.T.reshape(6, 4), 'b': b},
        {'a': a.reshape(6, 4), 'b': b},
    ]
    assert len({whole, *map(content_hash, others)}) == 5


def test_nan_is_refused_by_name():
    with pytest.raises(UserError, match="'blocks.k' holds NaN"):
        pack({'blocks.k': np.full((2, 2), np.nan, np.float32)}, frozenset(), 'int8')


def test_unknown_storage_names_the_nearest():
    with pytest.raises(UserError, match="'int9' does not exist; did you mean 'int8'"):
        pack({}, frozenset(), 'int9')  # pyright: ignore[reportArgumentType]
