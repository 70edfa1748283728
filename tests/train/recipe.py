"""The whole recipe in small, from nothing: tokenizer, precomputation, a base for each seed. Prints what it reached.

Run by test_learning.py as a process of its own, where all cores work as one device.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from muse.config import (
    BaseRun,
    DataConfig,
    MaskedLossConfig,
    MeshConfig,
    OptimConfig,
    TokenizerRun,
    TrainConfig,
    TransformerConfig,
    VQConfig,
    VQLossConfig,
)
from muse.data.pipeline import make_loader
from muse.masking import mask_ratio, masked_ce, random_mask
from muse.mesh import make_mesh
from muse.models.transformer import Transformer
from muse.release.format import load_part
from muse.train import loop
from muse.train.base import predict
from muse.train.precompute import load_nets, precompute

sys.path.insert(0, str(Path(__file__).parent))
from toys import save_toy_text_encoder  # noqa: E402

CODES, SIDE, TEXT_WIDTH, TEXT_LENGTH = 64, 4, 32, 31
SCENES = DataConfig(kind='scenes', image_size=32, max_objects=1, text_length=TEXT_LENGTH)
QUIET = {'log_every_steps': 50, 'save_every_steps': 0, 'save_every_minutes': 0.0, 'eval_every_steps': 0}
QUIET |= {'eval_batches': 1, 'grid_every_steps': 0}


def prepare(folder):
    """A trained tokenizer, a random text encoder, and the tokens and text states that they make."""
    heldout = dataclasses.replace(SCENES, split='heldout_labels')
    run = TokenizerRun(
        model=VQConfig(
            channels=8, channel_mult=(1, 2, 2, 4), num_res_blocks=1, codebook_size=CODES, code_dim=8, l2_normalize=True
        ),
        loss=VQLossConfig(perceptual=0.0, adversarial=0.0, revive_after_steps=10),
        train=TrainConfig(steps=150, batch_size=16, ema_decay=0.95, **QUIET),
        data=SCENES,
        eval_data=heldout,
        optim=OptimConfig(learning_rate=4e-3, b2=0.99, warmup_steps=20),
    )
    loop.run(run, folder / 'tokenizer')
    captions = next(make_loader(SCENES, batch_size=512, seed=9))['caption']
    (folder / 'text').mkdir()
    save_toy_text_encoder(folder / 'text', list(captions), TEXT_WIDTH)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    nets = load_nets(str(folder / 'tokenizer' / 'export'), str(folder / 'text'), TEXT_LENGTH, mesh)
    with jax.set_mesh(mesh):
        for split, num in (('train', 3000), ('heldout_pairs', 0)):
            data = dataclasses.replace(SCENES, split=split)
            settings = {'num': num, 'shards': 1, 'batch_size': 50, 'seed': 1, 'progress': lambda *_: None}
            precompute(data, nets, folder / 'tokens', **settings)


def base_run(folder, seed):
    data = DataConfig(kind='precomputed', path=str(folder / 'tokens'), image_size=32, text_length=TEXT_LENGTH)
    return BaseRun(
        model=TransformerConfig(
            codebook_size=CODES,
            grid=(SIDE, SIDE),
            width=64,
            mlp_dim=256,
            heads=2,
            layers=2,
            text_width=TEXT_WIDTH,
            text_length=TEXT_LENGTH,
            remat='none',
        ),
        loss=MaskedLossConfig(label_smoothing=0.0, text_dropout=0.0),
        train=TrainConfig(steps=700, batch_size=64, seed=seed, ema_decay=0.98, **QUIET),
        data=data,
        eval_data=dataclasses.replace(data, split='heldout_pairs'),
        tokenizer=str(folder / 'tokenizer' / 'export'),
        optim=OptimConfig(learning_rate=6e-3, b2=0.98, warmup_steps=50),
    )


def score(part, rows, draws=4, shifts=(5, 9, 13, 17)):
    """Masked nats of each held-out picture under its caption `[N]`, and under those of others `[shifts, N]`.

    Both see the same masks. The rows are in the order of their labels: far rows are other subjects.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(part.config, rngs=nnx.Rngs(params=0))), nnx.Param)[0]

    @jax.jit
    def nats(params, tok, txt, length, key):
        ratio_key, mask_key = jax.random.split(key)
        mask = random_mask(mask_key, mask_ratio(ratio_key, len(tok)), tok.shape[1])
        return masked_ce(predict(nnx.merge(graphdef, params), tok, mask, txt, length), tok, mask)

    def mean(shift):
        txt, length = np.roll(rows['txt'], shift, axis=0), np.roll(rows['len'], shift)
        return np.mean([nats(part.params, rows['tok'], txt, length, jax.random.key(i)) for i in range(draws)], axis=0)

    return mean(0), np.stack([mean(shift) for shift in shifts])


def entropy(tok):
    share = np.bincount(tok.reshape(-1), minlength=CODES) / tok.size
    return -np.sum(share[share > 0] * np.log(share[share > 0]))


def main(folder, seeds):
    prepare(folder)
    heldout = base_run(folder, 0).eval_data
    rows = next(make_loader(heldout, batch_size=64, seed=0, repeat=False))
    for seed in seeds:
        loop.run(base_run(folder, seed), folder / f'base{seed}')
        right, shuffled = score(load_part(folder / f'base{seed}' / 'export', 'base'), rows)
        numbers = {'unigram': entropy(rows['tok']), 'right': right.mean(), 'shuffled': shuffled.mean()}
        numbers |= {'wins': np.mean(right < shuffled), 'pictures': len(right)}
        print('RESULT', json.dumps({name: float(value) for name, value in numbers.items()}), flush=True)


if __name__ == '__main__':
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
