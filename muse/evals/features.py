"""Features of a pretrained net: EfficientNet-Lite0 (Tan & Le 2019; ImageNet), in JAX.

It serves the Fréchet distance and the search for a generated picture's nearest real one. Weights come from
tools/fetch_features.py, with the batch norms folded into the convolutions. Inference only.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file

from muse.errors import UserError

FILE = 'efficientnet_lite0.safetensors'
SIZE = 224
WIDTH = 1280
CLASSES = 1000
_STEM = 32


class Block(NamedTuple):
    """An inverted bottleneck: widen by `expand`, convolve each channel, narrow to `outputs`."""

    inputs: int
    outputs: int
    expand: int
    size: int
    stride: int


def _blocks() -> tuple[Block, ...]:
    # repeats, kernel, stride, expand, outputs
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    found, inputs = [], _STEM
    for repeats, size, stride, expand, outputs in stages:
        for i in range(repeats):
            found.append(Block(inputs, outputs, expand, size, stride if i == 0 else 1))
            inputs = outputs
    return tuple(found)


BLOCKS = _blocks()


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight. Kernels are [h, w, in, out]; depthwise ones [h, w, 1, channels]."""
    kernels: dict[str, tuple[int, ...]] = {'stem': (3, 3, 3, _STEM)}
    for i, block in enumerate(BLOCKS):
        wide = block.inputs * block.expand
        if block.expand > 1:
            kernels[f'block{i}.expand'] = (1, 1, block.inputs, wide)
        kernels[f'block{i}.depthwise'] = (block.size, block.size, 1, wide)
        kernels[f'block{i}.project'] = (1, 1, wide, block.outputs)
    kernels['head'] = (1, 1, BLOCKS[-1].outputs, WIDTH)
    kernels['classifier'] = (WIDTH, CLASSES)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in kernels.items():
        found |= {f'{name}.kernel': shape, f'{name}.bias': shape[-1:]}
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FeatureNet:
    """The net's weights, float32, named as `shapes` says. Call it, or `features`, on uint8 pictures."""

    weights: dict[str, Array]

    def __call__(self, img_BHWC: UInt8[Array, 'B H W 3']) -> tuple[Float[Array, 'B 1280'], Float[Array, 'B 1000']]:
        return _jitted(self, img_BHWC)


def load_features(folder: str) -> FeatureNet:
    """Reads what tools/fetch_features.py wrote into `folder`.

    Raises:
        UserError: the file is missing, damaged, or of another net.
    """
    path = Path(folder) / FILE
    if not os.path.isfile(path):
        raise UserError(f"feature net '{path}' does not exist: run tools/fetch_features.py --out={folder}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        raise UserError(f"feature net '{path}' is damaged: run tools/fetch_features.py again") from None
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes():
        raise UserError(f"'{path}' does not hold EfficientNet-Lite0: run tools/fetch_features.py again")
    return FeatureNet({name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()})


def random_features(seed: int = 0) -> FeatureNet:
    """The same net with random weights, for tests. Its features mean nothing."""
    rng = np.random.default_rng(seed)
    return FeatureNet(
        {
            name: jnp.asarray(rng.normal(0, math.sqrt(2 / math.prod(shape[:-1])), shape), jnp.float32)
            if name.endswith('kernel')
            else jnp.zeros(shape)
            for name, shape in shapes().items()
        }
    )


def preprocess(img_BHWC: UInt8[Array, 'B H W 3']) -> Float[Array, 'B 224 224 3']:
    """Bicubic to 224 x 224 (antialiased, aspect not kept), then the scale the net was trained with."""
    x_BHWC = img_BHWC.astype(jnp.float32)
    if x_BHWC.shape[1:3] != (SIZE, SIZE):
        shape = (x_BHWC.shape[0], SIZE, SIZE, 3)
        x_BHWC = jnp.clip(jax.image.resize(x_BHWC, shape, 'cubic', precision=jax.lax.Precision.HIGHEST), 0, 255)
    return (x_BHWC - 127.0) / 128.0


def apply(net: FeatureNet, x_BHWC: Float[Array, 'B H W 3']) -> tuple[Float[Array, 'B 1280'], Float[Array, 'B 1000']]:
    """Preprocessed pictures → pooled features and class logits."""

    def conv(name: str, x_BHWC: Array, stride: int = 1) -> Array:
        kernel = net.weights[f'{name}.kernel']
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return y_BHWC + net.weights[f'{name}.bias']

    x_BHWC = jax.nn.relu6(conv('stem', x_BHWC, 2))
    for i, block in enumerate(BLOCKS):
        y_BHWC = jax.nn.relu6(conv(f'block{i}.expand', x_BHWC)) if block.expand > 1 else x_BHWC
        y_BHWC = _depthwise(y_BHWC, net.weights[f'block{i}.depthwise.kernel'], block.stride)
        y_BHWC = conv(f'block{i}.project', jax.nn.relu6(y_BHWC + net.weights[f'block{i}.depthwise.bias']))
        x_BHWC = x_BHWC + y_BHWC if block.stride == 1 and block.inputs == block.outputs else y_BHWC
    pooled_BD = jnp.mean(jax.nn.relu6(conv('head', x_BHWC)), axis=(1, 2))
    return pooled_BD, pooled_BD @ net.weights['classifier.kernel'] + net.weights['classifier.bias']


def _depthwise(
    x_BHWC: Float[Array, 'B H W C'], kernel_hw1C: Float[Array, 'h w 1 C'], stride: int
) -> Float[Array, 'B H2 W2 C']:
    """Each channel convolved alone, 'SAME' padding: a sum of shifted pictures.

    XLA's grouped convolution gives the same, but made the whole net five times slower on a CPU.
    """
    size, out = kernel_hw1C.shape[0], [-(-n // stride) for n in x_BHWC.shape[1:3]]
    missing = [max((m - 1) * stride + size - n, 0) for m, n in zip(out, x_BHWC.shape[1:3], strict=True)]
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
    rows, columns = ((m - 1) * stride + 1 for m in out)
    taps = [
        x_BHWC[:, i : i + rows : stride, j : j + columns : stride] * kernel_hw1C[i, j, 0]
        for i in range(size)
        for j in range(size)
    ]
    return sum(taps[1:], taps[0])


def features(
    net: FeatureNet, img_BHWC: UInt8[Array, 'B H W 3']
) -> tuple[Float[Array, 'B 1280'], Float[Array, 'B 1000']]:
    """uint8 pictures of any size → pooled features (≥ 0) and ImageNet logits, float32."""
    return apply(net, preprocess(img_BHWC))


_jitted = jax.jit(features)
