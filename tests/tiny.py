"""A tiny release with random weights, made in code: 16-pixel pictures of 4 × 4 tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from muse.config import DecodeConfig, SuperresConfig, T5Config, TransformerConfig, VQConfig, to_dict
from muse.release.format import VOCABULARY, graphdef_and_template, load_part, save_part
from muse.release.storage import Storage

if TYPE_CHECKING:
    import pytest

    from muse.pipeline import Muse, Row

VQ = VQConfig(channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, codebook_size=64, code_dim=8)
T5 = T5Config(
    vocab_size=320, width=32, mlp_dim=64, head_dim=16, heads=2, layers=2, relative_max_distance=16, max_length=24
)
BASE = TransformerConfig(
    codebook_size=64, grid=(4, 4), width=32, mlp_dim=64, heads=2, layers=2, text_width=32, text_length=24
)
SUPERRES = SuperresConfig(
    codebook_size=64,
    grid=(8, 8),
    low_codebook_size=64,
    low_grid=(4, 4),
    block=4,
    width=32,
    mlp_dim=64,
    heads=2,
    layers=2,
    low_layers=1,
    text_width=32,
    text_length=24,
)
DECODE = DecodeConfig(steps=4, guidance_scale=1.5, choice_temperature=1.0)


def watch_draws(monkeypatch: pytest.MonkeyPatch, model: Muse) -> list[Row]:
    """The first row of each batch that the model draws from here on."""
    seen, draw = [], model.cascade.draw

    def spy(rows, *rest):
        seen.append(rows[0])
        return draw(rows, *rest)

    monkeypatch.setattr(model.cascade, 'draw', spy)
    return seen


def random_params(part: str, config: Any, seed: int = 0) -> nnx.State:
    """Random parameters: fan-in normal kernels, ones for scales. From NumPy, which spares compiling the real ones.

    Those of base and super-res are made louder, so that text and neighbours change the tokens drawn.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        if 'norm' in name and 'scale' in name:
            return jnp.ones(shape.shape)
        gain = 30.0 if 'head' in name and part in ('base', 'superres') else 3.0 if 'cross_attention' in name else 1.0
        fan_in = np.prod(shape.shape[-3:-1]) if len(shape.shape) == 4 else shape.shape[max(0, len(shape.shape) - 2)]
        return jnp.asarray(rng.normal(size=shape.shape) * gain / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, graphdef_and_template(part, config)[1])


def vocabulary() -> bytes:
    """A sentencepiece model of a few hundred pieces with T5's ids for padding, end and unknown."""
    words = 'a red green blue apple dog dogs cat sun the moon star noto style left right of on white two three'.split()
    lines = [f'{a} {b} {c}' for a in words for b in words for c in words[:6]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=T5.vocab_size,
        model_type='unigram',
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_release(folder: Path, storage: Storage = 'float32') -> Path:
    """Writes the whole release and returns its folder."""
    tokenizer = save_part(folder, 'tokenizer', config=VQ, params=random_params('tokenizer', VQ), storage=storage)
    text_params = random_params('text_encoder', T5, seed=1)
    text_encoder = save_part(folder, 'text_encoder', config=T5, params=text_params, storage=storage)
    names = {'tokenizer_sha256': tokenizer, 'text_encoder_sha256': text_encoder, 'decode': to_dict(DECODE)}
    save_part(folder, 'base', config=BASE, params=random_params('base', BASE, seed=2), storage=storage, extra=names)
    (folder / VOCABULARY).write_bytes(vocabulary())
    return folder


def write_cascade(folder: Path) -> Path:
    """A whole release with a super-res: 4 × 4 low-res tokens, 8 × 8 high-res ones, pictures of 32 pixels."""
    write_release(folder)
    hashes = {f'{part}_sha256': load_part(folder, part).hash for part in ('tokenizer', 'text_encoder')}
    params = random_params('tokenizer', VQ, seed=3)
    hashes['superres_tokenizer_sha256'] = save_part(
        folder, 'superres_tokenizer', config=VQ, params=params, storage='float32'
    )
    extra = {**hashes, 'decode': to_dict(DecodeConfig(steps=3, guidance_scale=1.0, choice_temperature=1.0))}
    params = random_params('superres', SUPERRES, seed=4)
    save_part(folder, 'superres', config=SUPERRES, params=params, storage='float32', extra=extra)
    return folder
