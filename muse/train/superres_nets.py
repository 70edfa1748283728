"""The frozen nets under the super-res (§2.4): two tokenizers of the same picture and the text encoder.

The low-res tokens are the base's tokenizer's on the picture scaled down to the base's size; the high-res tokens are
those of a tokenizer of their own on the picture as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, UInt8

from muse.config import SuperresConfig, SuperresRun, VQConfig
from muse.errors import UserError
from muse.release.format import Part, load_part, load_superres_tokenizer
from muse.train.frozen import Net, Text, check_codes, check_precomputed, check_sizes, encode_pictures, load_text, place
from muse.train.task import Batch


def shrink(img_BHWC: UInt8[Array, 'B H W 3'], ratio: int) -> UInt8[Array, 'B h w 3']:
    """Pictures of 1/ratio of the size: means over squares of ratio × ratio pixels, rounded to nearest, halves up."""
    batch, height, width, channels = img_BHWC.shape
    squares = img_BHWC.astype(jnp.int32).reshape(batch, height // ratio, ratio, width // ratio, ratio, channels)
    return ((squares.sum(axis=(2, 4)) + ratio**2 // 2) // ratio**2).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_shrunk(graphdef: Any, params: nnx.State, img_BHWC: UInt8[Array, 'B H W 3'], ratio: int) -> Int[Array, 'B T']:
    """Token ids of the pictures at 1/ratio of their size, row by row."""
    return encode_pictures(graphdef, params, shrink(img_BHWC, ratio))


def shrink_ratio(model_grid: tuple[int, int], high: VQConfig, low_grid: tuple[int, int], low: VQConfig) -> int:
    """How much smaller the base's picture is than the super-res's: 2 for 512 and 256 pixels.

    Raises:
        UserError: the sizes are no whole multiple of each other.
    """
    sides, low_sides = [n * high.factor for n in model_grid], [n * low.factor for n in low_grid]
    ratios = {divmod(side, low_side) for side, low_side in zip(sides, low_sides, strict=True)}
    if len(ratios) > 1 or next(iter(ratios))[1]:
        raise UserError(
            f'model.grid {model_grid} makes pictures of {sides[1]}x{sides[0]}, model.low_grid {low_grid} of '
            f'{low_sides[1]}x{low_sides[0]}: the first must be a whole multiple of the second'
        )
    return next(iter(ratios))[0]


@dataclass(frozen=True, kw_only=True)
class SuperresNets:
    """What a super-res run needs of its frozen nets."""

    low: Net
    high: Net
    ratio: int
    text: Text

    def encode(self, batch: Batch, sharding: NamedSharding | None = None) -> Batch:
        """{'img', 'ids', 'len'} → {'tok', 'low', 'txt', 'len'}; a batch that holds tokens already passes."""
        if 'tok' in batch:
            return {name: batch[name] for name in ('tok', 'low', 'txt', 'len')}
        encoded = {
            'tok': encode_pictures(self.high.graphdef, self.high.params, batch['img']),
            'low': encode_shrunk(self.low.graphdef, self.low.params, batch['img'], self.ratio),
            'txt': self.text.states(batch),
        }
        return (encoded if sharding is None else jax.device_put(encoded, sharding)) | {'len': batch['len']}


def _check_low(name: str, path: str, run: SuperresRun, found: Any, low: Part) -> None:
    if found.low_tokenizer_hash is None:
        raise UserError(
            f"{name}: '{path}' holds no low-res tokens: run tools/precompute.py with --low_tokenizer={run.tokenizer}"
        )
    if found.low_tokenizer_hash != low.ids_hash:
        raise UserError(
            f"{name}: the low-res tokens of '{path}' were made with tokenizer {found.low_tokenizer_hash[:12]}, "
            f"'{run.tokenizer}' is {low.ids_hash[:12]}: run tools/precompute.py again"
        )
    if tuple(found.low_grid) != run.model.low_grid:
        raise UserError(
            f"{name}: '{path}' has low_grid {tuple(found.low_grid)}, model.low_grid is {run.model.low_grid}: "
            'make them equal'
        )


def load_superres_nets(run: SuperresRun, mesh: Mesh) -> SuperresNets:
    """Loads and checks the frozen nets of a super-res run.

    Raises:
        UserError: a missing part, tokens of other tokenizers, or a shape that does not fit the model.
    """
    model: SuperresConfig = run.model
    low, high = load_part(run.tokenizer, 'tokenizer'), load_superres_tokenizer(run.superres_tokenizer)
    check_codes(run.tokenizer, low, 'low_codebook_size', model.low_codebook_size)
    check_codes(run.superres_tokenizer, high, 'codebook_size', model.codebook_size)
    check_sizes(run, high)
    hashes = set()
    for name, data in (('data', run.data), ('eval_data', run.eval_data)):
        if data.kind == 'precomputed':
            meta = check_precomputed(run, name, data.path, run.superres_tokenizer, high)
            _check_low(name, data.path, run, meta, low)
            hashes.add(meta.text_encoder_hash)
    return SuperresNets(
        low=place(low, 'tokenizer', mesh),
        high=place(high, 'superres_tokenizer', mesh),
        ratio=shrink_ratio(model.grid, high.config, model.low_grid, low.config),
        text=load_text(run, mesh, hashes),
    )
