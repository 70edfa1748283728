"""The frozen nets behind the base: the tokenizer (§2.2) and the text encoder (§2.1), loaded, checked and applied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key, UInt8

from muse.config import BaseRun, DataConfig, DecodeConfig
from muse.errors import UserError
from muse.mesh import shardings
from muse.models.vqgan import to_float
from muse.pipeline import draw
from muse.release.format import VOCABULARY, Part, graphdef_and_template, load_part, shipped
from muse.text.tokenizer import Tokenizer
from muse.train.task import Batch


@functools.cache
def _tokenizer(vocabulary: str) -> Tokenizer:
    return Tokenizer(vocabulary)


@dataclass(frozen=True)
class CaptionEncoder:
    """caption → (ids_S int32 zero-padded, length). Small, so that it travels to data workers."""

    vocabulary: str
    length: int

    def __call__(self, caption: str) -> tuple[np.ndarray, int]:
        ids_BS, len_B = _tokenizer(self.vocabulary).batch([caption], self.length)
        return np.asarray(ids_BS[0], np.int32), int(len_B[0])


@functools.partial(jax.jit, static_argnums=0)
def encode_pictures(graphdef: Any, params: nnx.State, img_BHWC: UInt8[Array, 'B H W 3']) -> Int[Array, 'B T']:
    """uint8 pictures → token ids, row by row."""
    ids_Bhw = nnx.merge(graphdef, params).encode(to_float(img_BHWC))
    return ids_Bhw.reshape(ids_Bhw.shape[0], -1)


@functools.partial(jax.jit, static_argnums=0)
def encode_captions(
    graphdef: Any, params: nnx.State, ids_BS: Int[Array, 'B S'], len_B: Int[Array, ' B']
) -> Float[Array, 'B S D']:
    """Text ids → states; those past a row's length are zeroed (nothing reads them)."""
    txt_BSD = nnx.merge(graphdef, params)(ids_BS, len_B)
    return jnp.where(jnp.arange(ids_BS.shape[1])[:, None] < len_B[:, None, None], txt_BSD, 0)


@dataclass(frozen=True, kw_only=True)
class Net:
    """A frozen net: static graph, parameters on the devices, and the hash of its release part."""

    graphdef: Any
    params: nnx.State
    config: Any
    hash: str


def place(part: Part, name: str, mesh: Mesh) -> Net:
    """Puts a part's parameters onto the mesh, split like trained ones."""
    graphdef, _ = graphdef_and_template(name, part.config)
    params = jax.device_put(part.params, shardings(part.params, mesh))
    return Net(graphdef=graphdef, params=params, config=part.config, hash=part.hash)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a base run needs of its frozen nets. `text_encoder` is None when all data are precomputed."""

    tokenizer: Net
    text_encoder: Net | None
    text_encoder_hash: str
    encode_text: Callable[[str], tuple[np.ndarray, int]] | None
    decode: DecodeConfig
    grid: tuple[int, int]

    @property
    def tokenizer_hash(self) -> str:
        return self.tokenizer.hash

    def encode(self, batch: Batch, sharding: NamedSharding | None = None) -> Batch:
        """{'img', 'ids', 'len'} → {'tok', 'txt', 'len'}; a batch that holds tokens already passes."""
        if 'tok' in batch:
            return {name: batch[name] for name in ('tok', 'txt', 'len')}
        assert self.text_encoder is not None
        net, text = self.tokenizer, self.text_encoder
        tok_BT = encode_pictures(net.graphdef, net.params, batch['img'])
        txt_BSD = encode_captions(text.graphdef, text.params, batch['ids'], batch['len'])
        if sharding is not None:
            tok_BT, txt_BSD = jax.device_put((tok_BT, txt_BSD), sharding)
        return {'tok': tok_BT, 'txt': txt_BSD, 'len': batch['len']}

    def draw(self, graphdef: Any, params: nnx.State, batch: Batch, key: Key[Array, ''], pictures: int) -> Array:
        """Pictures for the first captions of a batch, uint8 `[N, H, W, 3]`, replicated over the mesh."""
        net, config = self.tokenizer, self.decode
        txt_BSD, len_B = batch['txt'][:pictures], batch['len'][:pictures]
        canvas_BT = jnp.zeros((txt_BSD.shape[0], self.grid[0] * self.grid[1]), jnp.int32)
        return draw(
            params,
            net.params,
            jnp.stack([txt_BSD, txt_BSD]),
            jnp.stack([len_B, jnp.zeros_like(len_B)]),
            canvas_BT,
            canvas_BT > 0,
            jnp.arange(txt_BSD.shape[0]),
            jax.random.randint(key, (), 0, 2**31 - 1),
            jnp.float32(config.guidance_scale),
            jnp.float32(config.temperature),
            graphs=(graphdef, net.graphdef),
            steps=config.steps,
            defaults=config,
        )


def _check_tokenizer(run: BaseRun, tokenizer: Part) -> None:
    model, config = run.model, tokenizer.config
    if config.codebook_size != model.codebook_size:
        raise UserError(
            f"the tokenizer '{run.tokenizer}' has {config.codebook_size} codes, model.codebook_size is "
            f'{model.codebook_size}: set it to {config.codebook_size}'
        )
    for name, data in (('data', run.data), ('eval_data', run.eval_data)):
        side = data.image_size // config.factor
        if data.kind != 'precomputed' and model.grid != (side, side):
            raise UserError(
                f'model.grid is {model.grid}, {name}.image_size {data.image_size} makes {side}x{side} tokens: '
                f'set model.grid to ({side}, {side})'
            )
        if data.text_length != model.text_length:
            raise UserError(
                f'{name}.text_length is {data.text_length}, model.text_length {model.text_length}: make them equal'
            )


def _check_precomputed(run: BaseRun, name: str, data: DataConfig, tokenizer: Part) -> str:
    """Checks a folder of precomputed tokens; returns the hash of the text encoder that made them."""
    from muse.data.precomputed import read_meta

    meta, model = read_meta(Path(data.path)), run.model
    if meta.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"{name}: '{data.path}' was made with tokenizer {meta.tokenizer_hash[:12]}, '{run.tokenizer}' is "
            f'{tokenizer.hash[:12]}: run tools/precompute.py again'
        )
    found = {'grid': tuple(meta.grid), 'text_width': meta.text_width}
    for key, wanted in (('grid', model.grid), ('text_width', model.text_width)):
        if found[key] != wanted:
            raise UserError(f"{name}: '{data.path}' has {key} {found[key]}, model.{key} is {wanted}: make them equal")
    return meta.text_encoder_hash


def load_frozen(run: BaseRun, mesh: Mesh) -> Frozen:
    """Loads and checks the frozen nets of a base run.

    Raises:
        UserError: a missing part, tokens of another tokenizer, or a shape that does not fit the model.
    """
    tokenizer = load_part(run.tokenizer, 'tokenizer')
    _check_tokenizer(run, tokenizer)
    named = (('data', run.data), ('eval_data', run.eval_data))
    hashes = {_check_precomputed(run, n, d, tokenizer) for n, d in named if d.kind == 'precomputed'}
    text_encoder, encode_text = None, None
    if any(data.kind != 'precomputed' for _, data in named):
        folder = Path(run.text_encoder) if run.text_encoder else shipped()
        part = load_part(folder, 'text_encoder')
        if part.config.width != run.model.text_width:
            raise UserError(
                f"the text encoder '{folder}' is {part.config.width} wide, model.text_width is {run.model.text_width}: "
                f'set it to {part.config.width}'
            )
        text_encoder = place(part, 'text_encoder', mesh)
        encode_text = CaptionEncoder(str(folder / VOCABULARY), run.model.text_length)
        hashes.add(part.hash)
    if len(hashes) > 1:
        raise UserError('data and eval_data were made with two text encoders: run tools/precompute.py again')
    return Frozen(
        tokenizer=place(tokenizer, 'tokenizer', mesh),
        text_encoder=text_encoder,
        text_encoder_hash=hashes.pop(),
        encode_text=encode_text,
        decode=run.decode,
        grid=run.model.grid,
    )
