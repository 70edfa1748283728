"""Editing through `keep_BT` (§3.3): inpainting keeps the tokens outside the mask and draws the others anew.

What the mask leaves black never changes: its pixels are copied from the picture, not decoded from tokens.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from muse.errors import UserError, warn
from muse.pipeline import Muse, Settings, check_prompts

FEATHER = 64  # the blend at the mask's rim takes 1/64 of the picture's short side


def inpaint(model: Muse, image: Image.Image, mask: Image.Image, prompt: str, settings: Settings) -> Image.Image:
    """Repaints where `mask` is at least 128, under `prompt`.

    Args:
        model: the loaded model.
        image: a picture of any size; one of another size than the model's is painted at the model's size, and only
            what was painted is brought back to the picture's own. Transparent parts are laid over white.
        mask: grey, of the picture's size.
        prompt: describes the whole picture, the new part included.
        settings: as `Muse.settings` gives them.

    Returns:
        An RGB picture of the size of `image`. Outside the mask its pixels are those of `image`, bit for bit; the
        feather lies inside.

    Raises:
        UserError: a mask of another size, or arguments that are no pictures or no text.
    """
    for name, value in (('image', image), ('mask', mask)):
        if not isinstance(value, Image.Image):
            raise UserError(f'{name} is a {type(value).__name__}; give a PIL.Image')
    [prompt] = check_prompts([prompt])
    if mask.size != image.size:
        sizes = f'mask is {mask.width}×{mask.height}, the picture {image.width}×{image.height}'
        raise UserError(f'{sizes}; give a mask of the same size')
    image, hole_HW = flatten(image), np.asarray(mask.convert('L')) >= 128
    if not hole_HW.any():
        warn('the mask is empty (no pixel of 128 or more): the picture is returned as it is')
        return image
    painted = _paint(model, image, cells(hole_HW, model.grid), prompt, settings)
    feather = max(1, min(image.size) // FEATHER)
    return Image.fromarray(composite(np.asarray(image), np.asarray(painted), hole_HW, feather))


def _paint(model: Muse, image: Image.Image, unknown_hw: np.ndarray, prompt: str, settings: Settings) -> Image.Image:
    tok_hw = model.encode(image.resize(model.size, Image.Resampling.LANCZOS))
    img_BHWC = model.paint(
        [model.text_states(prompt)],
        model.text_states(settings.negative_prompt),
        [0],
        settings,
        tok_hw.reshape(1, -1),
        ~unknown_hw.reshape(1, -1),
    )
    return Image.fromarray(img_BHWC[0]).resize(image.size, Image.Resampling.LANCZOS)


def flatten(image: Image.Image) -> Image.Image:
    """An RGB copy; transparency is laid over white."""
    if image.has_transparency_data:
        over = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), over).convert('RGB')
    return image.convert('RGB')


def cells(hole_HW: Bool[np.ndarray, 'H W'], grid: tuple[int, int]) -> Bool[np.ndarray, 'h w']:
    """The token cells that any masked pixel touches, however small its share, at whatever size of picture."""

    def touches(pixels: int, tokens: int) -> np.ndarray:
        """[tokens, pixels]: whether pixel p's interval [p, p+1)/pixels meets cell t's [t, t+1)/tokens."""
        t, p = np.arange(tokens)[:, None], np.arange(pixels)[None]
        return (p * tokens < (t + 1) * pixels) & ((p + 1) * tokens > t * pixels)

    rows_hH, columns_wW = (touches(n, t).astype(np.float32) for n, t in zip(hole_HW.shape, grid, strict=True))
    return rows_hH @ hole_HW.astype(np.float32) @ columns_wW.T > 0


def composite(old_HWC: np.ndarray, new_HWC: np.ndarray, hole_HW: np.ndarray, feather: int) -> np.ndarray:
    """`new` inside the hole, `old` outside, blended over `feather` pixels inside the hole's rim; uint8 all."""
    alpha_HW1 = _alpha(hole_HW, feather)[..., None]
    blend_HWC = np.rint(alpha_HW1 * new_HWC + (1 - alpha_HW1) * old_HWC).astype(np.uint8)
    return np.where(hole_HW[..., None], blend_HWC, old_HWC)


def _alpha(hole_HW: Bool[np.ndarray, 'H W'], feather: int) -> Float[np.ndarray, 'H W']:
    """0 outside the hole, rising inward to 1 at `feather` pixels from the rim (sooner in a hole that is thinner).

    The picture's own border is no rim.
    """
    depth_HW, inside_HW = np.zeros(hole_HW.shape, np.float32), hole_HW
    for _ in range(feather):
        if not inside_HW.any():
            break
        depth_HW += inside_HW
        padded = np.pad(inside_HW, 1, constant_values=True)
        inside_HW = inside_HW & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return depth_HW / depth_HW.max()
