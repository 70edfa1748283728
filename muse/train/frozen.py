"""The frozen nets behind the base: the tokenizer (§2.2) and the text encoder (§2.1), loaded, checked and applied."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key, UInt8

from muse import drawing
from muse.config import BaseRun, DecodeConfig, SuperresRun
from muse.data.precomputed import Meta, read_meta
from muse.errors import UserError
from muse.mesh import replicated, shardings
from muse.models.t5 import native
from muse.models.vqgan import to_float
from muse.release.format import Part, graphdef_and_template, load_part, shipped
from muse.release.text_encoder import load_text_encoder
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

    def lost(self, caption: str) -> str:
        """What of a caption is cut off; '' where it fits."""
        return _tokenizer(self.vocabulary).lost(caption, self.length)


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
    if name == 'text_encoder':
        config = native(part.config)
    elif mesh.devices.flat[0].platform == 'cpu':  # which only imitates bfloat16, many times more slowly
        config = dataclasses.replace(part.config, dtype='float32')
    else:
        config = part.config
    graphdef, _ = graphdef_and_template(name, config)
    params = jax.device_put(part.params, shardings(part.params, mesh))
    return Net(graphdef=graphdef, params=params, config=config, hash=part.ids_hash)


@dataclass(frozen=True, kw_only=True)
class Text:
    """The frozen text encoder of a run; `encoder` and `encode` are None when all data are precomputed."""

    encoder: Net | None
    hash: str
    encode: CaptionEncoder | None

    def states(self, batch: Batch) -> Float[Array, 'B S D']:
        """Text states of a batch of text ids."""
        assert self.encoder is not None
        return encode_captions(self.encoder.graphdef, self.encoder.params, batch['ids'], batch['len'])


def load_text(run: BaseRun | SuperresRun, mesh: Mesh, hashes: set[str]) -> Text:
    """Loads the text encoder where a source needs it, and checks that all sources have the same.

    Args:
        run: names the sources and the encoder's folder.
        mesh: where its weights go.
        hashes: of the encoders that made the precomputed sources.
    """
    encoder, encode, hashes = None, None, set(hashes)
    if any(data.kind != 'precomputed' for data in (run.data, run.eval_data)):
        encoder, encode = _load_encoder(run, mesh)
        hashes.add(encoder.hash)
    if len(hashes) > 1:
        raise UserError('data and eval_data were made with two text encoders: run tools/precompute.py again')
    return Text(encoder=encoder, hash=hashes.pop(), encode=encode)


def _load_encoder(run: BaseRun | SuperresRun, mesh: Mesh) -> tuple[Net, CaptionEncoder]:
    folder = run.text_encoder or str(shipped())
    loaded = load_text_encoder(folder, mesh=mesh)
    part = loaded.part
    if part.config.width != run.model.text_width:
        raise UserError(
            f"the text encoder '{folder}' is {part.config.width} wide, model.text_width is {run.model.text_width}: "
            f'set it to {part.config.width}'
        )
    return place(part, 'text_encoder', mesh), CaptionEncoder(str(loaded.vocabulary), run.model.text_length)


def encode_sheet(run: BaseRun | SuperresRun, text: Text, mesh: Mesh) -> Batch | None:
    """The text of `run.prompts` as a batch of {'txt', 'len'}; None where there are none.

    An encoder that the data have no need of is loaded for this alone, and let go.

    Raises:
        UserError: it is missing, or not the one that made the data.
    """
    if not run.prompts:
        return None
    encoder, encode = (text.encoder, text.encode) if text.encoder and text.encode else _load_encoder(run, mesh)
    if encoder.hash != text.hash:
        raise UserError(
            f"prompts: the data were made with text encoder {text.hash[:12]}, '{run.text_encoder or shipped()}' is "
            f'{encoder.hash[:12]}: set text_encoder to the folder that was precomputed with'
        )
    ids, lengths = zip(*map(encode, run.prompts), strict=True)
    ids_BS, len_B = np.stack(ids), np.array(lengths, np.int32)
    txt_BSD = encode_captions(encoder.graphdef, encoder.params, ids_BS, len_B)
    return jax.device_put({'txt': txt_BSD, 'len': len_B}, replicated(mesh))


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a base run needs of its frozen nets."""

    tokenizer: Net
    text: Text
    decode: DecodeConfig
    grid: tuple[int, int]

    @property
    def tokenizer_hash(self) -> str:
        return self.tokenizer.hash

    @property
    def text_encoder_hash(self) -> str:
        return self.text.hash

    def encode(self, batch: Batch, sharding: NamedSharding | None = None) -> Batch:
        """{'img', 'ids', 'len'} → {'tok', 'txt', 'len'}; a batch that holds tokens already passes."""
        if 'tok' in batch:
            return {name: batch[name] for name in ('tok', 'txt', 'len')}
        tok_BT = encode_pictures(self.tokenizer.graphdef, self.tokenizer.params, batch['img'])
        txt_BSD = self.text.states(batch)
        if sharding is not None:
            tok_BT, txt_BSD = jax.device_put((tok_BT, txt_BSD), sharding)
        return {'tok': tok_BT, 'txt': txt_BSD, 'len': batch['len']}

    def draw(self, graphdef: Any, params: nnx.State, batch: Batch, key: Key[Array, ''], pictures: int) -> Array:
        """Pictures for the first captions of a batch, uint8 `[N, H, W, 3]`, replicated over the mesh."""
        txt_BSD, len_B = batch['txt'][:pictures], batch['len'][:pictures]
        rows, tokens = len(len_B), self.grid[0] * self.grid[1]
        tok_BT = drawing.fill_base(
            params,
            jnp.zeros((rows, tokens), jnp.int32),
            jnp.zeros((rows, tokens), bool),
            drawing.sheet_batch(self.decode, txt_BSD, len_B, jax.random.randint(key, (), 0, 2**31 - 1)),
            graph=graphdef,
            grid=self.grid,
            program=drawing.program_of(self.decode),
        )[-1]
        return self.pixels(tok_BT)

    def pixels(self, tok_BT: Int[Array, 'B T']) -> UInt8[Array, 'B H W 3']:
        """Tokens as pictures."""
        ids_Bhw = tok_BT.reshape(-1, *self.grid)
        return drawing.decode_pixels(self.tokenizer.params, ids_Bhw, graph=self.tokenizer.graphdef)


def check_codes(folder: str, tokenizer: Part, key: str, codes: int) -> None:
    """Raises UserError when a tokenizer's codebook is not of the size that the model's setting `key` says."""
    if tokenizer.config.codebook_size != codes:
        raise UserError(
            f"the tokenizer '{folder}' has {tokenizer.config.codebook_size} codes, model.{key} is {codes}: "
            f'set it to {tokenizer.config.codebook_size}'
        )


def check_sizes(run: BaseRun | SuperresRun, tokenizer: Part) -> None:
    """Raises UserError when the sources' pictures do not make the model's grid, or their texts not its length."""
    model = run.model
    for name, data in (('data', run.data), ('eval_data', run.eval_data)):
        side = data.image_size // tokenizer.config.factor
        if data.kind != 'precomputed' and model.grid != (side, side):
            raise UserError(
                f'model.grid is {model.grid}, {name}.image_size {data.image_size} makes {side}x{side} tokens: '
                f'set model.grid to ({side}, {side})'
            )
        if data.text_length != model.text_length:
            raise UserError(
                f'{name}.text_length is {data.text_length}, model.text_length {model.text_length}: make them equal'
            )


def check_precomputed(run: BaseRun | SuperresRun, name: str, path: str, folder: str, tokenizer: Part) -> Meta:
    """Checks that the precomputed tokens under `path` are `tokenizer`'s (of `folder`) and fit the model.

    Raises:
        UserError: no such tokens, made with another tokenizer, or of another shape.
    """
    meta, model = read_meta(Path(path)), run.model
    if meta.tokenizer_hash != tokenizer.ids_hash:
        raise UserError(
            f"{name}: '{path}' was made with tokenizer {meta.tokenizer_hash[:12]}, '{folder}' is "
            f'{tokenizer.ids_hash[:12]}: run tools/precompute.py again'
        )
    found = {'grid': tuple(meta.grid), 'text_width': meta.text_width}
    for key, wanted in (('grid', model.grid), ('text_width', model.text_width)):
        if found[key] != wanted:
            raise UserError(f"{name}: '{path}' has {key} {found[key]}, model.{key} is {wanted}: make them equal")
    return meta


def load_frozen(run: BaseRun, mesh: Mesh) -> Frozen:
    """Loads and checks the frozen nets of a base run.

    Raises:
        UserError: a missing part, tokens of another tokenizer, or a shape that does not fit the model.
    """
    tokenizer = load_part(run.tokenizer, 'tokenizer')
    check_codes(run.tokenizer, tokenizer, 'codebook_size', run.model.codebook_size)
    check_sizes(run, tokenizer)
    named = (('data', run.data), ('eval_data', run.eval_data))
    metas = [check_precomputed(run, n, d.path, run.tokenizer, tokenizer) for n, d in named if d.kind == 'precomputed']
    return Frozen(
        tokenizer=place(tokenizer, 'tokenizer', mesh),
        text=load_text(run, mesh, {meta.text_encoder_hash for meta in metas}),
        decode=run.decode,
        grid=run.model.grid,
    )
