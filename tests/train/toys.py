"""Small runs on made-up tokens, whose text says which tokens are likely: something to learn in a few steps."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import sentencepiece
from flax import nnx

from muse.config import BaseRun, DataConfig, MeshConfig, OptimConfig, T5Config, TrainConfig, TransformerConfig
from muse.models.t5 import T5Encoder
from muse.release.format import save_part

CODES, TEXT_WIDTH, TEXT_LENGTH, SIDE = 32, 8, 31, 4


def toy_run(**changes) -> BaseRun:
    """A base run of 2 layers; `changes` replace whole fields of the run."""
    model = TransformerConfig(
        codebook_size=CODES,
        grid=(SIDE, SIDE),
        width=32,
        mlp_dim=64,
        heads=2,
        layers=2,
        text_width=TEXT_WIDTH,
        text_length=TEXT_LENGTH,
        remat='none',
    )
    data = DataConfig(kind='precomputed', path='unused', image_size=16, text_length=TEXT_LENGTH)
    train = TrainConfig(steps=20, batch_size=16, save_every_minutes=0.0)
    fields = {
        'model': model,
        'train': train,
        'data': data,
        'eval_data': dataclasses.replace(data, split='heldout_labels'),
        'tokenizer': 'unused',
        'optim': OptimConfig(learning_rate=1e-2, warmup_steps=2),
        'mesh': MeshConfig(),
    }
    return BaseRun(**(fields | changes))


def toy_batch(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    """Rows of four likely tokens each, named by a one-hot text state; a third of the rows have longer text."""
    rng = np.random.default_rng(step)
    kind = rng.integers(0, TEXT_WIDTH, rows)
    tok = 4 * kind[:, None] + rng.integers(0, 4, (rows, SIDE * SIDE))
    txt = np.zeros((rows, TEXT_LENGTH, TEXT_WIDTH), np.float32)
    txt[np.arange(rows), 0, kind] = 3.0
    return {'tok': tok.astype(np.int32), 'txt': txt, 'len': rng.integers(1, 4, rows).astype(np.int32)}


def with_train(run: BaseRun, **changes) -> BaseRun:
    """The run with some keys of `train` replaced."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def with_model(run: BaseRun, **changes) -> BaseRun:
    """The run with some keys of `model` replaced."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def save_toy_text_encoder(folder, captions: list[str], width: int = TEXT_WIDTH) -> None:
    """A release part 'text_encoder' of random weights, with a vocabulary of the words of `captions`."""
    config = T5Config(vocab_size=400, width=width, mlp_dim=width, head_dim=16, heads=2, layers=1, max_length=31)
    params = nnx.split(T5Encoder(config, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    save_part(folder, 'text_encoder', config=config, params=params, storage='float32')
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=config.vocab_size,
        model_type='bpe',
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / 'spiece.model').write_bytes(model.getvalue())
