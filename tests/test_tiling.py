"""Tiles: exact for what is local, one grid of ids, bounded shapes, and no seam on a real picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from muse import tiling
from muse.config import VQConfig
from muse.data.pictures import open_picture
from muse.errors import InputWarning, UserError
from muse.models.vqgan import VQGAN, to_float, to_uint8
from muse.release.format import load_part, shipped

PICTURE = Path(__file__).parents[1] / 'docs' / 'images' / 'grid.png'


def local(tile: int, overlap: int, seen: set) -> tiling.TiledTokenizer:
    """A tokenizer of factor 2 whose ids are pixels and whose pixels are ids: tiles must change nothing."""

    def encode(img_1HWC):
        seen.add(('encode', img_1HWC.shape))
        return img_1HWC[:, ::2, ::2, 0].astype(jnp.int32)

    def decode(ids_1hw):
        seen.add(('decode', ids_1hw.shape))
        return np.repeat(np.repeat(np.asarray(ids_1hw, np.float32), 2, 1), 2, 2)[..., None] * np.ones(3, np.float32)

    return tiling.TiledTokenizer(encode, decode, 2, 256, tile, overlap)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 45), st.integers(1, 45), st.integers(1, 12), st.data())
def test_what_is_local_comes_back_exactly_whatever_the_tiles(height, width, tile, data):
    seen: set = set()
    tokenizer = local(tile, data.draw(st.integers(0, tile // 2)), seen)
    img = np.random.default_rng(height * 64 + width).integers(0, 256, (height, width, 1), np.uint8).repeat(3, -1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', InputWarning)
        ids, made = tiling.encode_tiled(tokenizer, img), tiling.reconstruct(tokenizer, img)
    np.testing.assert_array_equal(ids, img[::2, ::2, 0])
    np.testing.assert_array_equal(made, img[::2, ::2].repeat(2, 0).repeat(2, 1)[:height, :width])
    # One shape for all tiles of a picture, at most a tile: that is the memory bound.
    (pixels,) = {shape for kind, shape in seen if kind == 'encode'}
    (tokens,) = {shape for kind, shape in seen if kind == 'decode'}
    assert pixels == (1, 2 * tokens[1], 2 * tokens[2], 3) and max(tokens[1:]) <= tile


@given(st.integers(1, 400), st.integers(1, 40), st.data())
def test_tiles_overlap_enough_and_fades_add_up(tokens, tile, data):
    overlap = data.draw(st.integers(0, tile // 2))
    tokenizer = local(tile, overlap, set())
    begins = tiling.starts(tokens, tokenizer)
    assert begins[0] == 0 and begins[-1] + min(tokens, tile) == tokens
    assert all(overlap <= a + tile - b < tile for a, b in zip(begins, begins[1:], strict=False))
    total = np.zeros(2 * tokens)
    for begin, weight in zip(begins, tiling.fades(tokens, tokenizer), strict=True):
        total[2 * begin :][: len(weight)] += weight
        assert (weight >= 0).all()
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.fixture(scope='module')
def shipped_tokenizer():
    return load_part(shipped(), 'tokenizer')


def seam(made_HWC: np.ndarray, whole_HWC: np.ndarray, tokenizer: tiling.TiledTokenizer) -> float:
    """How much more the difference to the undivided picture jumps at borders of tiles than elsewhere: 1 is no seam."""
    difference = made_HWC.astype(float) - whole_HWC
    jumps_W = np.abs(np.diff(difference, axis=1)).mean((0, 2))
    begins = tiling.starts(made_HWC.shape[1] // tokenizer.factor, tokenizer)
    borders = {b * tokenizer.factor - 1 for b in begins[1:]}
    borders |= {(b + tokenizer.tile) * tokenizer.factor - 1 for b in begins[:-1]}
    return jumps_W[sorted(borders)].mean() / jumps_W.mean()


def test_no_seam_on_a_real_picture_with_the_shipped_tokenizer(shipped_tokenizer):
    part, img = shipped_tokenizer, open_picture(PICTURE)[:128, 256:640]
    whole, parted, apart = (
        tiling.tiled_tokenizer(part.config, part.params, tile=tile, overlap=overlap)
        for tile, overlap in ((384, 0), (128, 64), (128, 0))
    )
    ids = tiling.encode_tiled(parted, img)
    undivided = tiling.decode_tiled(whole, ids)
    seams = {t.overlap * t.factor: seam(tiling.decode_tiled(t, ids), undivided, t) for t in (parted, apart)}
    print(seams)
    assert seams[64] < 1.2 and seams[0] > 2  # the measure does see a seam


def test_a_picture_within_a_tile_is_what_the_tokenizer_makes():
    config = VQConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, codebook_size=16, code_dim=4)
    model = filled(lambda: VQGAN(config, rngs=nnx.Rngs(params=0)))
    img = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    ids = jax.jit(lambda x: model.encode(to_float(x)))(img[None])
    tokenizer = tiling.tiled_tokenizer(config, nnx.split(model, nnx.Param)[1], tile=32, overlap=0)
    np.testing.assert_array_equal(tiling.encode_tiled(tokenizer, img), ids[0])
    made = np.asarray(jax.jit(lambda x: to_uint8(model.decode(x)))(ids))[0]
    np.testing.assert_allclose(tiling.reconstruct(tokenizer, img).astype(int), made, atol=1)


def test_padding_is_said_and_cropped_away():
    tokenizer = local(4, 1, set())
    with pytest.warns(InputWarning, match='a picture of 5x8 pixels is padded to 6x8, multiples of 2'):
        assert tiling.reconstruct(tokenizer, np.full((5, 8, 3), 9, np.uint8)).shape == (5, 8, 3)


def test_refusals(shipped_tokenizer):
    part = shipped_tokenizer
    for tile, overlap in ((100, 0), (128, 24), (128, 80), (128, -16), (0, 0)):
        with pytest.raises(UserError, match=f'tiles of {tile} pixels that share {overlap}: give multiples of 16'):
            tiling.tiled_tokenizer(part.config, part.params, tile=tile, overlap=overlap)
    for ids in (np.zeros((0, 3)), np.full((2, 2), 256), np.full((2, 2), -1), np.zeros(3)):
        with pytest.raises(UserError, match='give rows and columns of 0 to 255'):
            tiling.decode_tiled(local(4, 0, set()), ids.astype(int))
