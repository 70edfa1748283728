"""The perceptual loss of the tokenizer (§2.2, Table 5): LPIPS (Zhang et al. 2018, version 0.1) in JAX.

Two pictures go through a frozen net; at five depths the features are scaled to unit length, and their squared
differences, weighed by channel and averaged over the picture, are summed. VGG16 is the loss, AlexNet a second judge.
Their weights come from tools/fetch_perceptual.py. Without them there is a net of RANDOM convolutions: it sees edges
and colours at four scales but nothing of what people see, serves small recipes and tests, and its distances are not
LPIPS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from muse.config import Dtype
from muse.errors import UserError

Arch = Literal['vgg', 'alex', 'random']
Features = tuple[Array, ...]

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclass(frozen=True)
class _Conv:
    """One 3x3-like convolution with ReLU. `pool`: (window, stride) of a max pool before it; `tap`: judged after it."""

    outputs: int
    size: int = 3
    stride: int = 1
    pool: tuple[int, int] | None = None
    tap: bool = False


def _vgg() -> tuple[_Conv, ...]:
    layers = []
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        pools = [(2, 2) if stage > 0 and i == 0 else None for i in range(depth)]
        layers += [_Conv(width, pool=pool, tap=i == depth - 1) for i, pool in enumerate(pools)]
    return tuple(layers)


ARCHITECTURES: dict[str, tuple[_Conv, ...]] = {
    'vgg': _vgg(),
    'alex': (
        _Conv(64, 11, 4, tap=True),
        _Conv(192, 5, pool=(3, 2), tap=True),
        _Conv(384, pool=(3, 2), tap=True),
        _Conv(256, tap=True),
        _Conv(256, tap=True),
    ),
    'random': tuple(_Conv(width, 3, 2, tap=True) for width in (32, 64, 96, 128)),
}
_SMALLEST = {'vgg': 16, 'alex': 35, 'random': 1}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Perceptual:
    """A frozen net: `weights` holds conv{i}.kernel [h,w,in,out], conv{i}.bias [out] and lin{i} [C] of each depth."""

    weights: dict[str, Array]
    arch: Arch = field(metadata={'static': True})
    dtype: Dtype = field(default='float32', metadata={'static': True})

    def astype(self, dtype: Dtype) -> Perceptual:
        """The same net computing in `dtype`; bfloat16 halves its time in training. Distances stay float32."""
        cast = {k: v if k.startswith('lin') else v.astype(dtype) for k, v in self.weights.items()}
        return replace(self, weights=cast, dtype=dtype)


def shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight of a net."""
    found: dict[str, tuple[int, ...]] = {}
    inputs, depth = 3, 0
    for i, layer in enumerate(ARCHITECTURES[arch]):
        found[f'conv{i}.kernel'] = (layer.size, layer.size, inputs, layer.outputs)
        found[f'conv{i}.bias'] = (layer.outputs,)
        if layer.tap:
            found[f'lin{depth}'] = (layer.outputs,)
            depth += 1
        inputs = layer.outputs
    return found


def random_net() -> Perceptual:
    """The net of random convolutions; always the same one. Its distance is a mean over four depths, at most 2."""
    weights = {}
    for i, (name, shape) in enumerate(shapes('random').items()):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape, jnp.float32)
        if name.endswith('kernel'):
            weights[name] = noise * math.sqrt(2.0 / math.prod(shape[:-1]))
        else:
            weights[name] = jnp.full(shape, 0.25) if name.startswith('lin') else 0.1 * noise
    return Perceptual(weights, 'random')


def load_lpips(folder: str, arch: Literal['vgg', 'alex'] = 'vgg') -> Perceptual:
    """Reads the weights that tools/fetch_perceptual.py wrote into `folder`.

    Raises:
        UserError: the file is missing, damaged, or of another net.
    """
    path = Path(folder) / f'{arch}.safetensors'
    if not path.is_file():
        raise UserError(f"perceptual weights '{path}' do not exist: run tools/fetch_perceptual.py --out={folder}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        raise UserError(f"perceptual weights '{path}' are damaged: run tools/fetch_perceptual.py again") from None
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes(arch):
        raise UserError(f"'{path}' does not hold the {arch} net: run tools/fetch_perceptual.py again")
    return Perceptual({name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}, arch)


def features(net: Perceptual, img_BHWC: Float[Array, 'B H W 3']) -> Features:
    """Features of pictures in [-1, 1] at each judged depth, in the net's dtype.

    Raises:
        UserError: pictures too small for the net.
    """
    if min(img_BHWC.shape[1:3]) < _SMALLEST[net.arch]:
        raise UserError(
            f'pictures of {img_BHWC.shape[1]}x{img_BHWC.shape[2]} are too small for the {net.arch} perceptual net: '
            f'both sides must be at least {_SMALLEST[net.arch]}'
        )
    x_BHWC, taps = ((img_BHWC - _SHIFT) / _SCALE).astype(net.dtype), []
    for i, layer in enumerate(ARCHITECTURES[net.arch]):
        if layer.pool:
            x_BHWC = _max_pool(x_BHWC, *layer.pool)
        # AlexNet's first layer pads 2 where 'same' would be 5.
        pad = (2, 2) if layer.size == 11 else (layer.size // 2, layer.size // 2)
        x_BHWC = jax.lax.conv_general_dilated(
            x_BHWC,
            net.weights[f'conv{i}.kernel'],
            (layer.stride, layer.stride),
            (pad, pad),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        x_BHWC = jax.nn.relu(x_BHWC + net.weights[f'conv{i}.bias'])
        if layer.tap:
            taps.append(x_BHWC)
    return tuple(taps)


def _max_pool(x_BHWC: Array, window: int, stride: int) -> Array:
    lowest = np.array(-np.inf, x_BHWC.dtype)  # concrete also under jit: only so is it known as a max, with a gradient
    return jax.lax.reduce_window(x_BHWC, lowest, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), 'VALID')


def distance(net: Perceptual, features_a: Features, features_b: Features) -> Float[Array, ' B']:
    """LPIPS distance of two batches given their features, float32."""

    def scaled(x_BHWC: Array) -> Array:
        x_BHWC = x_BHWC.astype(jnp.float32)
        # The constant keeps the gradient finite where a whole feature vector is 0.
        return x_BHWC * jax.lax.rsqrt(jnp.sum(jnp.square(x_BHWC), axis=-1, keepdims=True) + 1e-10)

    total_B = jnp.zeros(())
    for depth, (a_BHWC, b_BHWC) in enumerate(zip(features_a, features_b, strict=True)):
        difference = jnp.square(scaled(a_BHWC) - scaled(b_BHWC)) * net.weights[f'lin{depth}']
        total_B = total_B + jnp.mean(jnp.sum(difference, axis=-1), axis=(1, 2))
    return total_B


def lpips(net: Perceptual, a_BHWC: Float[Array, 'B H W 3'], b_BHWC: Float[Array, 'B H W 3']) -> Float[Array, ' B']:
    """LPIPS distance of two batches of pictures in [-1, 1]: 0 for equal pictures, float32."""
    return distance(net, features(net, a_BHWC), features(net, b_BHWC))
