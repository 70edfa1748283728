"""Pictures of any size through a tokenizer in the memory of one tile (§2.2: the tokenizer is fully convolutional).

A tile alone is not quite the same cut of the whole picture: its group norms see other statistics, and its edge pads
with zeros. So tiles overlap. Of a token's candidates the one furthest inside its tile is taken, which makes one grid of
ids; pixels fade linearly from one tile into the next. One program of the tile's fixed shape does everything; beside it
only the uint8 picture, its ids and one float32 row of tiles are in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from muse.config import PublicVQConfig, VQConfig
from muse.errors import UserError, warn
from muse.models.vqgan import to_float
from muse.release.format import graphdef_and_template

_NEVER = 0.25  # share of an overlap, at each tile's edge, that is used of neither: zero padding reaches there


@dataclass(frozen=True)
class TiledTokenizer:
    """A tokenizer and the size of its tiles. `encode` and `decode` take at most a tile, with a batch axis of 1."""

    encode: Callable[[jax.Array], jax.Array]  # uint8 [1, H, W, 3] → ids int32 [1, h, w]
    decode: Callable[[jax.Array], jax.Array | np.ndarray]  # ids → float32 [1, H, W, 3] in 0..255
    factor: int  # pixels a token
    codebook_size: int
    tile: int  # tokens along a side
    overlap: int  # least tokens that neighbours share


def tiled_tokenizer(
    config: VQConfig | PublicVQConfig, params: nnx.State, *, tile: int = 512, overlap: int = 128
) -> TiledTokenizer:
    """Prepares a tokenizer for pictures of any size.

    Args:
        config: the tokenizer's.
        params: its weights.
        tile: side of a tile in pixels; memory grows with its square.
        overlap: least pixels that neighbouring tiles share: more is slower and hides their borders better.

    Raises:
        UserError: sizes that are not whole tokens, or an overlap that is negative or over half a tile.
    """
    factor = config.factor
    if tile < factor or tile % factor or overlap % factor or not 0 <= overlap <= tile // 2:
        raise UserError(
            f'tiles of {tile} pixels that share {overlap}: give multiples of {factor}, the overlap at most half a tile'
        )
    graphdef = graphdef_and_template('tokenizer', config)[0]

    return TiledTokenizer(
        lambda img_1HWC: _encode(params, img_1HWC, graph=graphdef),
        lambda ids_1hw: _decode(params, ids_1hw, graph=graphdef),
        factor,
        config.codebook_size,
        tile // factor,
        overlap // factor,
    )


@functools.partial(jax.jit, static_argnames='graph')
def _encode(params: nnx.State, img_1HWC: jax.Array, *, graph: nnx.GraphDef) -> jax.Array:
    return nnx.merge(graph, params).encode(to_float(img_1HWC))


@functools.partial(jax.jit, static_argnames='graph')
def _decode(params: nnx.State, ids_1hw: jax.Array, *, graph: nnx.GraphDef) -> jax.Array:
    return (jnp.clip(nnx.merge(graph, params).decode(ids_1hw), -1, 1) + 1) * 127.5


def encode_tiled(tokenizer: TiledTokenizer, img_HWC: UInt8[np.ndarray, 'H W 3']) -> Int[np.ndarray, 'h w']:
    """Ids of a picture of any size, int32 [ceil(H / factor), ceil(W / factor)].

    Sides that are not multiples of the factor are padded by their last pixels, with a warning. A picture of at most a
    tile gives exactly what the tokenizer itself gives.
    """
    height, width = img_HWC.shape[:2]
    img_HWC = _padded(img_HWC, tokenizer.factor)
    rows, columns = (side // tokenizer.factor for side in img_HWC.shape[:2])
    if (rows * tokenizer.factor, columns * tokenizer.factor) != (height, width):
        warn(
            f'a picture of {height}x{width} pixels is padded to {img_HWC.shape[0]}x{img_HWC.shape[1]}, '
            f'multiples of {tokenizer.factor}'
        )
    ids_hw = np.zeros((rows, columns), np.int32)
    for top, owned_rows in _owned(rows, tokenizer):
        for left, owned_columns in _owned(columns, tokenizer):
            box = (_pixels(top, rows, tokenizer), _pixels(left, columns, tokenizer))
            found_hw = np.asarray(tokenizer.encode(jnp.asarray(img_HWC[box][None])))[0]
            ids_hw[owned_rows, owned_columns] = found_hw[_inside(owned_rows, top), _inside(owned_columns, left)]
    return ids_hw


def decode_tiled(tokenizer: TiledTokenizer, ids_hw: Int[np.ndarray, 'h w']) -> UInt8[np.ndarray, 'H W 3']:
    """The picture of a grid of ids of any size, uint8 [h * factor, w * factor, 3].

    Raises:
        UserError: an empty grid, or an id that is not in the codebook.
    """
    ids_hw = np.asarray(ids_hw)
    if ids_hw.ndim != 2 or not ids_hw.size or ids_hw.min() < 0 or ids_hw.max() >= tokenizer.codebook_size:
        raise UserError(
            f'ids of shape {list(ids_hw.shape)}: give rows and columns of 0 to {tokenizer.codebook_size - 1}'
        )
    rows, columns = ids_hw.shape
    factor, tile_rows, tile_columns = tokenizer.factor, min(rows, tokenizer.tile), min(columns, tokenizer.tile)
    made_HWC = np.zeros((rows * factor, columns * factor, 3), np.uint8)
    tops, lefts = starts(rows, tokenizer), starts(columns, tokenizer)
    row_weights, column_weights = fades(rows, tokenizer), fades(columns, tokenizer)
    band_HWC, band_top = np.zeros((tile_rows * factor, columns * factor, 3), np.float32), 0
    for top, row_weight in zip(tops, row_weights, strict=True):
        done = (top - band_top) * factor  # no later tile reaches these rows
        made_HWC[band_top * factor : top * factor] = np.rint(band_HWC[:done])
        band_HWC, band_top = np.concatenate([band_HWC[done:], np.zeros_like(band_HWC[:done])]), top
        for left, column_weight in zip(lefts, column_weights, strict=True):
            tile_hw = ids_hw[top : top + tile_rows, left : left + tile_columns]
            pixels_HWC = np.asarray(tokenizer.decode(jnp.asarray(tile_hw[None], jnp.int32)))[0]
            band_HWC[:, left * factor : (left + tile_columns) * factor] += (
                pixels_HWC * row_weight[:, None, None] * column_weight[:, None]
            )
    made_HWC[band_top * factor :] = np.rint(band_HWC)
    return made_HWC


def reconstruct(tokenizer: TiledTokenizer, img_HWC: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'H W 3']:
    """A picture of any size, encoded and decoded; padding is cropped away again (with a warning, as `encode_tiled`)."""
    height, width = img_HWC.shape[:2]
    return decode_tiled(tokenizer, encode_tiled(tokenizer, img_HWC))[:height, :width]


def starts(tokens: int, tokenizer: TiledTokenizer) -> list[int]:
    """First token of each tile along a side of `tokens`: evenly spread, at least `overlap` shared."""
    tile = min(tokens, tokenizer.tile)
    strides = -(-(tokens - tile) // (tokenizer.tile - tokenizer.overlap))
    return [round(k * (tokens - tile) / max(strides, 1)) for k in range(strides + 1)]


def fades(tokens: int, tokenizer: TiledTokenizer) -> Float[np.ndarray, 'tiles pixels']:
    """Weight of each pixel of each tile along a side; those of all tiles over a pixel add up to 1."""
    begins, tile = starts(tokens, tokenizer), min(tokens, tokenizer.tile)
    size, total = tile * tokenizer.factor, tokens * tokenizer.factor
    depth = np.arange(size) + 0.5
    shared = max(tokenizer.overlap * tokenizer.factor, 1)
    weights = np.zeros((len(begins), size), np.float32)
    for k in range(len(begins)):
        rise = (depth / shared - _NEVER) / (1 - 2 * _NEVER) if k else np.inf
        fall = (depth[::-1] / shared - _NEVER) / (1 - 2 * _NEVER) if k < len(begins) - 1 else np.inf
        weights[k] = np.clip(np.minimum(rise, fall), 0, 1)
    sums = np.zeros(total, np.float32)
    for begin, weight in zip(begins, weights, strict=True):
        sums[begin * tokenizer.factor :][:size] += weight
    return np.stack([w / sums[begin * tokenizer.factor :][:size] for begin, w in zip(begins, weights, strict=True)])


def _owned(tokens: int, tokenizer: TiledTokenizer) -> list[tuple[int, slice]]:
    """Each tile's first token, and the tokens that are taken from it: up to the middle of what it shares."""
    begins, tile = starts(tokens, tokenizer), min(tokens, tokenizer.tile)
    cuts = [0, *((b + a + tile) // 2 for a, b in zip(begins, begins[1:], strict=False)), tokens]
    return [(begin, slice(cuts[k], cuts[k + 1])) for k, begin in enumerate(begins)]


def _pixels(begin: int, tokens: int, tokenizer: TiledTokenizer) -> slice:
    return slice(begin * tokenizer.factor, (begin + min(tokens, tokenizer.tile)) * tokenizer.factor)


def _inside(owned: slice, begin: int) -> slice:
    return slice(owned.start - begin, owned.stop - begin)


def _padded(img_HWC: np.ndarray, factor: int) -> np.ndarray:
    missing = [(0, -side % factor) for side in img_HWC.shape[:2]]
    return np.pad(img_HWC, [*missing, (0, 0)], mode='edge') if any(after for _, after in missing) else img_HWC
