"""Turns a published VQGAN into the tokenizer part of a release folder, which training and precomputing take.

    python tools/import_tokenizer.py --weights=amused-256/vqvae --out=runs/amused/tokenizer
    python tools/import_tokenizer.py --weights=last.ckpt --out=runs/taming/tokenizer --storage=bfloat16

--weights is a folder of diffusers' VQModel (config.json and safetensors: aMUSEd, Kandinsky, latent diffusion) or one
file of taming-transformers (.ckpt, .pth). PyTorch is not needed, and no code of a weights file runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

from muse.config import Dtype
from muse.jobs.command_line import guarded, parse_only_flags
from muse.release.format import save_part
from muse.release.public_vq import load_public
from muse.release.storage import Storage

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    config, params = load_public(FLAGS.weights, FLAGS.dtype)
    extra = {'imported_from': Path(FLAGS.weights).resolve().name}
    found = save_part(FLAGS.out, 'tokenizer', config=config, params=params, storage=FLAGS.storage, extra=extra)
    print(f'{FLAGS.out}: tokenizer {found[:12]}, {config.factor}x{config.factor} pixels a token')
    print(f"in a config of a base: 'tokenizer': '{FLAGS.out}', 'model': {{'codebook_size': {config.codebook_size}}}")


if __name__ == '__main__':
    flags.DEFINE_string('weights', None, "diffusers folder, or taming's file", required=True)
    flags.DEFINE_string('out', None, 'release folder; other parts in it are kept', required=True)
    flags.DEFINE_enum('storage', 'float32', get_args(Storage), 'type of the stored weights')
    flags.DEFINE_enum('dtype', 'float32', get_args(Dtype), 'type it is computed in')
    app.run(guarded(main), flags_parser=parse_only_flags)
