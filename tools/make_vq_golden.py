"""Makes the goldens of tests/release/test_public_vq.py: what PyTorch's VQGANs make of random weights, and torch files.

    python tools/make_vq_golden.py --out=tests/golden/public_vq

Needs torch, diffusers and taming-transformers-rom1504, which nothing else here does: run it in an environment of its
own. The weights are not stored: tests/public_weights.py makes them from their names, here and in the test.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers import VQModel  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

from public_weights import picture, weights  # pyright: ignore[reportMissingImports]

DOWN, UP = 'DownEncoderBlock2D', 'UpDecoderBlock2D'
DIFFUSERS = {
    'amused': dict(
        block_out_channels=[32, 64, 64], down_block_types=[DOWN] * 3, up_block_types=[UP] * 3, layers_per_block=2,
        latent_channels=8, num_vq_embeddings=64, mid_block_add_attention=False, lookup_from_codebook=True,
    ),
    'attention': dict(
        block_out_channels=[32, 64], down_block_types=[DOWN, f'Attn{DOWN}'], up_block_types=[f'Attn{UP}', UP],
        layers_per_block=1, latent_channels=6, vq_embed_dim=4, num_vq_embeddings=32, norm_num_groups=16,
    ),
    'movq': dict(
        block_out_channels=[32, 64], down_block_types=[DOWN, f'Attn{DOWN}'], up_block_types=[f'Attn{UP}', UP],
        layers_per_block=1, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=32, norm_type='spatial',
    ),
}  # fmt: skip
TAMING = dict(
    ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[16], in_channels=3, resolution=32,
    z_channels=6, double_z=False, dropout=0.0,
)  # fmt: skip


class Taming(torch.nn.Module):
    """taming's VQModel without its trainer: its encoder and decoder, and the names of what stands between them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(**TAMING), Decoder(**TAMING)
        self.quantize = torch.nn.Module()
        self.quantize.embedding = torch.nn.Embedding(32, 4)
        self.quant_conv, self.post_quant_conv = torch.nn.Conv2d(6, 4, 1), torch.nn.Conv2d(4, 6, 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(codes))


def run(model: torch.nn.Module, decode) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Names and shapes of the weights; latents, ids and decoded pictures of a model with weights by name."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights(shapes).items()})
    model = model.eval().double()  # the reference itself is exact
    pixels = torch.from_numpy(picture()).double().permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(pixels))
        codebook = model.quantize.embedding.weight
        flat = latents.permute(0, 2, 3, 1)
        ids = torch.cdist(flat.reshape(-1, flat.shape[-1]), codebook).argmin(-1).reshape(flat.shape[:3])
        made = decode(codebook[ids].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    found = {'latents': flat.float().numpy(), 'ids': ids.numpy().astype(np.int32), 'made': made.float().numpy()}
    return shapes, {name: np.ascontiguousarray(array) for name, array in found.items()}


def odd_tensors() -> dict:
    """A training checkpoint: types, views, shared storages and a parameter, beside what only a trainer needs."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict(
        turned=base.T, part=base[1:3, ::2], half=base.half() / 7, brain=base.bfloat16() / 7, whole=base,
        parameter=torch.nn.Parameter(base[0] * 2), scalar=torch.tensor(5), empty=torch.zeros(0, 3),
    )  # fmt: skip
    return {'epoch': 3, 'state_dict': state, 'optimizer_states': [{'state': {0: {'step': 7, 'exp_avg': base + 1}}}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write into')
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    about, tensors = {}, {}
    for name, settings in DIFFUSERS.items():
        model = VQModel(**settings)
        shapes, arrays = run(model, lambda codes, model=model: model.decode(codes, force_not_quantize=False).sample)
        about[name] = {'settings': {'_class_name': 'VQModel', **model.config}, 'shapes': shapes}
        tensors |= {f'{name}.{key}': array for key, array in arrays.items()}
    model = Taming()
    shapes, arrays = run(model, model.decode)
    about['taming'] = {'settings': {}, 'shapes': shapes}
    tensors |= {f'taming.{key}': array for key, array in arrays.items()}
    (out / 'models.json').write_text(json.dumps(about) + '\n')
    save_file(tensors, out / 'made.safetensors')
    torch.save(odd_tensors(), out / 'new.pt')
    torch.save(odd_tensors(), out / 'old.pt', _use_new_zipfile_serialization=False)
    for path in sorted(out.iterdir()):
        print(f'{path}: {path.stat().st_size} bytes')


if __name__ == '__main__':
    main()
