"""Makes the goldens of tests/models/test_t5.py: small random T5 encoders and their states, by Hugging Face's PyTorch.

    python tools/make_t5_golden.py --out=tests/golden

Needs torch and transformers, which nothing else here does: run it in an environment of its own. Weights are random;
they are stored under Hugging Face's names, in float16, which both sides then read back exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from transformers import T5Config, T5EncoderModel  # pyright: ignore[reportMissingImports]

WIDTHS = {'vocab_size': 96, 'd_model': 48, 'd_kv': 16, 'd_ff': 80, 'num_heads': 3, 'num_layers': 3}


def golden(feed_forward: str, seed: int) -> dict[str, np.ndarray]:
    """Weights, ids, lengths and the states of one random encoder."""
    torch.manual_seed(seed)
    model = T5EncoderModel(T5Config(**WIDTHS, feed_forward_proj=feed_forward, initializer_factor=1.0)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if 'norm' in name:  # initialised to ones, under which a forgotten scale would go unseen
                weight.uniform_(0.5, 1.5)
            if 'relative_attention_bias' in name:  # so large that a wrong bucket shows
                weight.normal_()
            weight.copy_(weight.half().float())
    lengths = torch.tensor([100, 37, 1, 72])  # past distance 64, where buckets are widest
    ids = torch.randint(0, WIDTHS['vocab_size'], (len(lengths), int(lengths.max())))
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    tensors = {f'weight.{k}': v.half().numpy() for k, v in model.state_dict().items() if k != 'shared.weight'}
    kept = np.r_[0:8, 30:40, 64:100]  # of the states, enough rows to see any fault, in a small file
    return tensors | {
        'ids': ids.numpy().astype(np.uint8),
        'lengths': lengths.numpy().astype(np.int32),
        'positions': kept.astype(np.int32),
        'states': np.ascontiguousarray(states.numpy()[:, kept]),  # safetensors writes memory order
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write into')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, feed_forward in (('t5_v1_1', 'gated-gelu'), ('t5_v1_0', 'relu')):
        path = args.out / f'{name}.safetensors'
        save_file(golden(feed_forward, seed=7), path)
        print(f'{path}: {path.stat().st_size} bytes')


if __name__ == '__main__':
    main()
