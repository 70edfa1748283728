"""How well a tokenizer keeps pictures: PSNR, SSIM, LPIPS, use of the codebook, Fréchet distance of features.

Pictures are floats in [-1, 1] here. The Fréchet distance is taken on EfficientNet-Lite0 features (see
`muse.evals.features`): its numbers are not comparable with published FID, which uses another net.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from muse import tiling
from muse.config import PublicVQConfig, VQConfig
from muse.errors import UserError
from muse.evals.features import FeatureNet
from muse.models import perceptual, quantize
from muse.models.perceptual import Perceptual
from muse.models.vqgan import to_float, to_uint8
from muse.release.format import graphdef_and_template
from muse.tiling import TiledTokenizer

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5


def psnr(a_BHWC: Float[Array, 'B H W 3'], b_BHWC: Float[Array, 'B H W 3']) -> Float[Array, ' B']:
    """Peak signal-to-noise ratio of pictures in [-1, 1] (clipped to it), dB; 100 at most."""
    squared = jnp.square(jnp.clip(a_BHWC, -1, 1) - jnp.clip(b_BHWC, -1, 1))
    return -10.0 * jnp.log10(jnp.maximum(jnp.mean(squared, axis=(1, 2, 3)) / 4.0, 1e-10))


def ssim(a_BHWC: Float[Array, 'B H W 3'], b_BHWC: Float[Array, 'B H W 3']) -> Float[Array, ' B']:
    """Structural similarity (Wang et al. 2004) of each colour channel, averaged: 1 for equal pictures.

    Gaussian window of 11 pixels (sigma 1.5), K1 = 0.01, K2 = 0.03, the window kept inside the picture.
    """
    offsets = jnp.arange(_SSIM_WINDOW) - (_SSIM_WINDOW - 1) / 2
    window = jnp.exp(-jnp.square(offsets) / (2 * _SSIM_SIGMA**2))
    window = window / jnp.sum(window)

    def blur(x_BHWC: Array) -> Array:
        for shape in ((_SSIM_WINDOW, 1, 1, 1), (1, _SSIM_WINDOW, 1, 1)):
            kernel = jnp.tile(window.reshape(shape), (1, 1, 1, 3))
            x_BHWC = jax.lax.conv_general_dilated(
                x_BHWC, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=3,
                precision='highest',
            )  # fmt: skip
        return x_BHWC

    mean_a, mean_b = blur(a_BHWC), blur(b_BHWC)
    var_a, var_b = blur(a_BHWC**2) - mean_a**2, blur(b_BHWC**2) - mean_b**2
    covariance = blur(a_BHWC * b_BHWC) - mean_a * mean_b
    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2  # the pixels' range is 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return jnp.mean(brightness * (2 * covariance + c2) / (var_a + var_b + c2), axis=(1, 2, 3))


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Fréchet distance of two sets of feature vectors, each taken as one Gaussian: 0 for equal sets.

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((A B)^½), computed in float64. With the centred vectors X and Y of the
    two sets, the last trace is the sum of the singular values of X Yᵀ: no matrix root, and exact for few pictures.

    Raises:
        UserError: fewer than two vectors on a side.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise UserError(f'Fréchet distance of {len(a_ND)} and {len(b_MD)} pictures: give at least 2 on each side')
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    mean_a, mean_b = a_ND.mean(0), b_MD.mean(0)
    x_ND = (a_ND - mean_a) / np.sqrt(len(a_ND) - 1)
    y_MD = (b_MD - mean_b) / np.sqrt(len(b_MD) - 1)
    cross = np.linalg.svd(x_ND @ y_MD.T, compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.square(x_ND).sum() + np.square(y_MD).sum() - 2 * cross)


def reconstruct(config: VQConfig | PublicVQConfig, params: nnx.State):
    """A jitted function: uint8 pictures `[B, H, W, 3]` → (uint8 reconstructions, ids `[B, h, w]`)."""
    graphdef = graphdef_and_template('tokenizer', config)[0]

    @jax.jit
    def run(params: nnx.State, img_BHWC: Array) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        ids_Bhw = model.encode(to_float(img_BHWC))
        return to_uint8(model.decode(ids_Bhw)), ids_Bhw

    return lambda img_BHWC: run(params, img_BHWC)


@jax.jit
def _compare(nets: dict[str, Perceptual], real_BHWC: Array, made_BHWC: Array) -> dict[str, Array]:
    a_BHWC, b_BHWC = to_float(real_BHWC), to_float(made_BHWC)
    judged = {name: perceptual.lpips(net, a_BHWC, b_BHWC) for name, net in nets.items()}
    return {'psnr': psnr(a_BHWC, b_BHWC), 'ssim': ssim(a_BHWC, b_BHWC), **judged}


class _Scores:
    """Sums over pictures, and what the codebook and the feature net saw."""

    def __init__(self, codes: int, judges: dict[str, Perceptual], feature_net: FeatureNet | None):
        self.judges, self.feature_net = judges, feature_net
        self.sums: dict[str, float] = {}
        self.counts_V, self.pieces = np.zeros(codes), 0
        self.features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, real_BHWC: np.ndarray, made_BHWC: Array | np.ndarray) -> None:
        """Compares uint8 pictures with their reconstructions."""
        for name, value_B in _compare(self.judges, jnp.asarray(real_BHWC), jnp.asarray(made_BHWC)).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(jnp.sum(value_B))
        self.pieces += len(real_BHWC)
        if self.feature_net is not None:
            for found, img_BHWC in zip(self.features, (real_BHWC, made_BHWC), strict=True):
                found.append(np.asarray(self.feature_net(jnp.asarray(img_BHWC))[0]))

    def count(self, ids: np.ndarray) -> None:
        self.counts_V += np.bincount(ids.reshape(-1), minlength=len(self.counts_V))

    def result(self, pictures: int) -> dict[str, float]:
        if pictures == 0:
            raise UserError('no pictures to evaluate on: check the split and the number asked for')
        total_V = jnp.asarray(self.counts_V, jnp.float32)
        result = {name: total / self.pieces for name, total in self.sums.items()} | {
            'codebook_usage': float(quantize.usage(total_V)),
            'perplexity': float(quantize.perplexity(total_V)),
            'pictures': pictures,
        }
        if self.feature_net is not None and self.pieces > 1:
            result['frechet_lite0'] = frechet_distance(*map(np.concatenate, self.features))
        return result


def evaluate_tokenizer(
    config: VQConfig | PublicVQConfig,
    params: nnx.State,
    pictures: Iterable[np.ndarray],
    *,
    judges: dict[str, Perceptual],
    feature_net: FeatureNet | None = None,
) -> dict[str, float]:
    """Judges reconstructions (rounded to uint8) of batches of pictures.

    Args:
        config: the tokenizer's.
        params: its weights.
        pictures: uint8 batches `[B, H, W, 3]`; one size, the last may be shorter.
        judges: metric name → perceptual net, e.g. {'lpips_vgg': ...}.
        feature_net: adds 'frechet_lite0', the Fréchet distance of reconstructions to the pictures.

    Returns:
        Means over the pictures: 'psnr' (dB), 'ssim', each judge; over all tokens: 'codebook_usage' (share of codes
        used), 'perplexity'; 'pictures', their number.

    Raises:
        UserError: no pictures.
    """
    run, scores, number = reconstruct(config, params), _Scores(config.codebook_size, judges, feature_net), 0
    for real_BHWC in pictures:
        made_BHWC, ids_Bhw = run(real_BHWC)
        scores.add(real_BHWC, made_BHWC)
        scores.count(np.asarray(ids_Bhw))
        number += len(real_BHWC)
    return scores.result(number)


def evaluate_whole(
    tokenizer: TiledTokenizer,
    pictures: Iterable[np.ndarray],
    *,
    judges: dict[str, Perceptual],
    feature_net: FeatureNet | None = None,
    piece: int = 256,
) -> dict[str, float]:
    """As `evaluate_tokenizer`, for pictures of any size, each reconstructed whole by tiles.

    Args:
        tokenizer: as `muse.tiling.tiled_tokenizer` prepares it.
        pictures: uint8 `[H, W, 3]`, both sides at least `piece`.
        judges: metric name → perceptual net.
        feature_net: adds 'frechet_lite0', over pieces.
        piece: pictures and reconstructions are compared in squares of this side, evenly spread to cover the picture,
            so that memory is bounded and nets see the size they know; means are over pieces.

    Raises:
        UserError: no pictures, or one smaller than a piece.
    """
    scores, number = _Scores(tokenizer.codebook_size, judges, feature_net), 0
    for real_HWC in pictures:
        height, width = real_HWC.shape[:2]
        if min(height, width) < piece:
            raise UserError(f'a picture of {height}x{width} is smaller than a piece of {piece}: choose a smaller piece')
        ids_hw = tiling.encode_tiled(tokenizer, real_HWC)
        made_HWC = tiling.decode_tiled(tokenizer, ids_hw)[:height, :width]
        for top in _spread(height, piece):
            for left in _spread(width, piece):
                box = slice(top, top + piece), slice(left, left + piece)
                scores.add(real_HWC[box][None], made_HWC[box][None])
        scores.count(ids_hw)
        number += 1
    return scores.result(number)


def _spread(side: int, piece: int) -> list[int]:
    """First pixels of the fewest pieces that cover a side."""
    number = -(-side // piece)
    return [round(k * (side - piece) / max(number - 1, 1)) for k in range(number)]
