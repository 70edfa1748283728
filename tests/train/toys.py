"""Small runs on made-up tokens, whose text says which tokens are likely: something to learn in a few steps."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import sentencepiece
from flax import nnx

from muse.config import (
    BaseRun,
    DataConfig,
    MeshConfig,
    OptimConfig,
    SuperresRun,
    T5Config,
    TrainConfig,
    TransformerConfig,
)
from muse.mesh import make_mesh, replicated, shard_batch, shardings
from muse.models.superres import Superres
from muse.models.t5 import T5Encoder
from muse.models.transformer import Transformer
from muse.release.format import save_part
from muse.train import base, superres
from muse.train.task import Batch, State

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


def graphdef_of(run: BaseRun | SuperresRun) -> Any:
    """The graph of the run's model."""
    kind = Superres if isinstance(run, SuperresRun) else Transformer
    return nnx.split(nnx.eval_shape(lambda: kind(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[0]


def train(
    run: BaseRun | SuperresRun, batch_of: Callable[[int], Batch], steps: int, devices: int = 1
) -> tuple[np.ndarray, State]:
    """Losses and final state of a few steps on a mesh of the first `devices` devices."""
    module = superres if isinstance(run, SuperresRun) else base
    mesh, graphdef = make_mesh(run.mesh, jax.devices()[:devices]), graphdef_of(run)
    with jax.set_mesh(mesh):
        key = jax.random.key(0)
        layout = shardings(jax.eval_shape(lambda k: module.init_state(run, k), key), mesh)
        state = jax.jit(lambda k: module.init_state(run, k), out_shardings=layout)(key)

        def step(state, batch, key):
            return module.train_step(run, graphdef, state, batch, jax.random.fold_in(key, state['step']))

        step = jax.jit(step, out_shardings=(layout, replicated(mesh)))
        losses = []
        for i in range(steps):
            state, metrics = step(state, shard_batch(mesh, batch_of(i)), jax.random.key(1))
            losses.append(float(metrics['loss']))
    return np.array(losses), state


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
