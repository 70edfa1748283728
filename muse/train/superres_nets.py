"""The frozen nets under the super-res (§2.4): two tokenizers of the same picture and the text encoder.

The low-res tokens are the base's tokenizer's on the picture scaled down to the base's size; the high-res tokens are
those of a tokenizer of their own on the picture as it is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, UInt8

from muse import drawing
from muse.config import DecodeConfig, SuperresConfig, SuperresRun, VQConfig, read
from muse.errors import UserError
from muse.mesh import replicated
from muse.release.format import Part, graphdef_and_template, load_part, load_superres_tokenizer
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


def low_sheet(run: SuperresRun, nets: SuperresNets, texts: Batch | None, mesh: Mesh) -> Batch | None:
    """The prompts of the sheets with low-res tokens that `run.base` draws for them, once; None where there are none.

    Args:
        run: names the base's folder.
        nets: those of the run.
        texts: {'txt', 'len'} of the prompts.
        mesh: where the base's weights go for the time of drawing.

    Raises:
        UserError: no base, or one of another tokenizer, text encoder or grid.
    """
    if texts is None:
        return None
    if not run.base:
        raise UserError('prompts of a super-res run need low-res tokens: set base to the folder of a trained base')
    part = load_part(run.base, 'base', mesh=mesh)
    for name, mine in (('tokenizer', nets.low.hash), ('text_encoder', nets.text.hash)):
        if part.extra.get(f'{name}_sha256') != mine:
            raise UserError(f"base: '{run.base}' was trained on another {name} than this run's: give one of the same")
    if part.config.grid != run.model.low_grid:
        raise UserError(f"base: '{run.base}' draws {part.config.grid} tokens, model.low_grid is {run.model.low_grid}")
    decode = read(DecodeConfig, part.extra['decode'])
    canvas_BT = jnp.zeros((len(texts['len']), math.prod(part.config.grid)), jnp.int32)
    low_BT = drawing.fill_base(
        part.params,
        canvas_BT,
        canvas_BT.astype(bool),
        drawing.sheet_batch(decode, texts['txt'], texts['len'], jnp.asarray(run.train.seed, jnp.int32)),
        graph=graphdef_and_template('base', part.config)[0],
        grid=part.config.grid,
        program=drawing.program_of(decode),
    )[-1]
    return {**texts, 'low': jax.device_put(low_BT, replicated(mesh))}


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
