"""The public object: prompts in, pictures out (§2.4, §2.7, §2.8); pictures, masks and prompts in, pictures out (§3.3).

Pictures are given as `PIL.Image` of any mode, as uint8 arrays [height, width, 3], or as paths; they come back as
`PIL.Image` in RGB. Noise depends on (seed, picture index, step) alone: on a CPU a picture's bits do not depend on what
else is drawn with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muse import canvas as canvases
from muse import settings as knobs
from muse.canvas import Canvas, Grid
from muse.cascade import Cascade, Drawn, use_compilation_cache, veiled
from muse.config import DecodeConfig, FreeEditConfig
from muse.data.pictures import Picture, open_picture
from muse.errors import UserError, warn
from muse.nn.quantized import Precision, check_precision
from muse.release.format import Release, load_release, shipped
from muse.settings import Row, Settings, SuperresDecoding
from muse.text.tokenizer import clean

__all__ = ['Drawn', 'Muse', 'Picture', 'Row', 'Settings', 'load']


def load(path: str | Path | None = None, *, precision: Precision | None = None) -> Muse:
    """Loads a release folder; None is the model that comes with the package.

    Args:
        path: the folder.
        precision: of the matrix products in the layers of base and super-res: 'int8' or 'fp8' for half the memory of
            their weights in bfloat16 (`muse.nn.quantized`; docs/sampling.md has what it costs); None: as the release
            says.

    Raises:
        UserError: a missing, damaged or inconsistent release; another precision.
    """
    check_precision(precision)
    use_compilation_cache()
    return Muse(load_release(path or shipped()), precision)


class Muse:
    """A loaded model: `generate`, `upscale`, `inpaint`, `outpaint`, `edit`, `variation`, `encode`, `decode`."""

    def __init__(self, release: Release, precision: Precision | None = None):
        self.cascade = Cascade(release, precision)
        self.release = self.cascade.release  # without weights

    @property
    def grid(self) -> Grid:
        """Rows and columns of the base's tokens in a picture of `size`."""
        return self.release.base.config.grid

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of a picture for which no size was asked."""
        return canvases.native(self.release, self.has_superres).size

    @property
    def has_superres(self) -> bool:
        """Whether the release holds the super-resolution model."""
        return self.release.superres is not None

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_images: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        size: tuple[int, int] | None = None,
        decoding: DecodeConfig | None = None,
        superres: SuperresDecoding = None,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each prompt.

        Args:
            prompts: one text or several; a blank one draws without text, with a warning.
            negative_prompt: what to stay away from; takes the place of "no text" in the guidance (§2.7).
            num_images: pictures a prompt.
            seed: 0 … 2³² − 1.
            steps: decoding steps; None, here and below: the release's default.
            guidance_scale: t of §2.7; 0 is no guidance and twice as fast.
            temperature: of the token sampling; 0 takes the most likely token.
            size: width and height in pixels; None: `self.size`, which was trained on. Others are drawn less well.
            decoding: all knobs of the base's decoding; those given by themselves come first.
            superres: those of the super-res; False: the base alone draws.
            batch_size: pictures at a time on an accelerator. It never changes a picture on a CPU.

        Returns:
            RGB pictures; prompt p's are those from p · num_images on.

        Raises:
            UserError: a prompt that is no text or over 1 MB, a count below 1, a number out of range, a size that the
                model cannot draw.
        """
        checked = self.settings(
            seed, steps, guidance_scale, temperature, negative_prompt, size=size, decoding=decoding, superres=superres
        )
        return list(self.stream(prompts, checked, num_images=num_images, batch_size=batch_size))

    def settings(
        self,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        negative_prompt: str | None = None,
        *,
        size: tuple[int, int] | None = None,
        decoding: DecodeConfig | None = None,
        superres: SuperresDecoding = None,
    ) -> Settings:
        """Checks the knobs of `generate` and fills in the release's defaults; raises UserError as that does."""
        given = {'steps': steps, 'guidance_scale': guidance_scale, 'temperature': temperature}
        base = knobs.override(decoding or self.release.decode, **given)
        draft = canvases.draft(self.release, size, base, superres)
        checked = Settings(
            **knobs.fields(draft.base),
            seed=knobs.count('seed', seed, 0, knobs.MAX_SEED),
            negative_prompt=knobs.text('negative_prompt', negative_prompt or ''),
            size=draft.canvas.size,
            superres=draft.superres,
        )
        if clean(checked.negative_prompt) and checked.guidance_scale == 0 and not checked.superres:
            warn('negative_prompt has no effect at guidance_scale 0')
        return checked

    def need_superres(self) -> None:
        """Raises UserError where the release holds no super-res."""
        canvases.need_superres(self.release)

    def stream(
        self, prompts: str | Sequence[str], settings: Settings, *, num_images: int = 1, batch_size: int = 8
    ) -> Iterator[Image.Image]:
        """As `generate`, one picture after the other; everything is checked before this returns."""
        texts = knobs.prompts(prompts)
        knobs.count('num_images', num_images, 1)
        knobs.count('batch_size', batch_size, 1)
        rows = [Row(prompt=text, index=p * num_images + i) for p, text in enumerate(texts) for i in range(num_images)]
        drawn = self.draw(rows, settings, batch_size=min(batch_size, len(rows)))
        return (each.image for each in drawn)

    def draw(self, rows: Sequence[Row], settings: Settings, *, batch_size: int = 8) -> Iterator[Drawn]:
        """Draws rows that may each have a prompt, seed, guidance scale, temperature and known tokens of its own.

        Args:
            rows: in the order in which the pictures come.
            settings: what the rows share, and what a row leaves open.
            batch_size: rows a batch on an accelerator; the last batch is filled up, so that every one has this shape.

        Raises:
            UserError: a value of a row out of range, or known tokens of another shape; before anything is drawn.
        """
        knobs.count('batch_size', batch_size, 1)
        return self.cascade.draw([knobs.row(each) for each in rows], settings, self.canvas(settings), batch_size)

    def frames(self, drawn: Drawn) -> list[Image.Image]:
        """How a picture came about: after each step, what is still unknown in grey. All in the picture's size.

        The base's steps show the picture as the base's tokens give it, those of the super-res the final one.
        """
        shown = []
        low = drawn.image if drawn.high is None else self.cascade.pixels(drawn.low[None])[0].resize(drawn.image.size)
        for image, steps, tokenizer in (
            (low, drawn.low_steps, self.release.tokenizer),
            (drawn.image, drawn.high_steps, self.release.superres_tokenizer),
        ):
            if steps is not None and tokenizer is not None:
                shown += [veiled(image, step_hw >= tokenizer.config.codebook_size) for step_hw in steps]
        return shown

    def canvas(self, settings: Settings) -> Canvas:
        """The token grids of a picture drawn under these settings."""
        return canvases.of_size(self.release, settings.size, settings.superres is not None)

    def upscale(
        self,
        image: Picture,
        prompt: str = '',
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        superres: DecodeConfig | None = None,
    ) -> Image.Image:
        """The picture drawn anew by the super-res, twice as large (with the paper's grids) (§2.4).

        Args:
            image: of any size up to four times the pixels that the base draws. Shapes come from it, details are drawn.
            prompt: says what is seen; none is needed.
            negative_prompt, seed, superres: as for `generate`.

        Raises:
            UserError: the release holds no super-res; a picture too large.
        """
        from muse.editing.whole import upscale

        self.need_superres()
        settings = self.settings(seed, negative_prompt=negative_prompt, superres=superres)
        return Image.fromarray(upscale(self, pixels(image), prompt, settings))

    def inpaint(
        self,
        image: Picture,
        mask: Picture,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        decoding: DecodeConfig | None = None,
        superres: SuperresDecoding = None,
        context: float = knobs.CONTEXT,
    ) -> Image.Image:
        """Paints anew where the mask is white (128 or more), under a prompt (§3.3).

        Args:
            image: a picture of any size. A window around the mask is painted at the model's size, and what was
                painted is brought back to the picture's own.
            mask: black and white, of the picture's size.
            prompt: describes the whole window, the new part included.
            negative_prompt, seed, steps, guidance_scale, temperature, decoding, superres: as for `generate`.
            context: size of the window over that of the mask, at least 1; a large number takes the whole picture.

        Returns:
            A picture of the size of `image`. Outside the mask its pixels are those of `image`, bit for bit; the
            feather lies inside.

        Raises:
            UserError: a mask of another size or with transparency, or arguments that are no pictures or no text.
        """
        from muse.editing.holes import inpaint

        settings = self.settings(
            seed, steps, guidance_scale, temperature, negative_prompt, decoding=decoding, superres=superres
        )
        return Image.fromarray(inpaint(self, pixels(image), mask, prompt, settings, context))

    def outpaint(
        self,
        image: Picture,
        prompt: str,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        decoding: DecodeConfig | None = None,
        superres: SuperresDecoding = None,
    ) -> Image.Image:
        """Grows a picture by so many pixels on its sides, painted under a prompt (§3.3).

        What is larger than the model's pictures is painted window by window, outward. Other arguments as for `inpaint`.

        Returns:
            A picture of (left + width + right) × (top + height + bottom) that holds `image` bit for bit.

        Raises:
            UserError: as for `inpaint`; a side below 0, or more pixels than a picture may have.
        """
        from muse.editing.holes import outpaint

        settings = self.settings(
            seed, steps, guidance_scale, temperature, negative_prompt, decoding=decoding, superres=superres
        )
        return Image.fromarray(outpaint(self, pixels(image), (left, top, right, bottom), prompt, settings))

    def edit(
        self,
        image: Picture,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        free: FreeEditConfig = FreeEditConfig(),  # noqa: B008  frozen
        superres: SuperresDecoding = None,
    ) -> Image.Image:
        """Changes a picture towards a prompt without a mask (§3.3): see `edit_frames`, of which this is the last."""
        options = {'negative_prompt': negative_prompt, 'seed': seed, 'free': free, 'superres': superres}
        return self.edit_frames(image, prompt, [free.iterations], **options)[0]

    def edit_frames(
        self,
        image: Picture,
        prompt: str,
        at: Sequence[int],
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        free: FreeEditConfig = FreeEditConfig(),  # noqa: B008  frozen
        superres: SuperresDecoding = None,
    ) -> list[Image.Image]:
        """Mask-free editing, and what it looks like on the way.

        Each iteration draws a random share of the base's tokens anew under the prompt, seeing the others. The
        super-res then draws what lies under the tokens that changed.

        Args:
            image: a picture of any size; it is edited whole, at the model's size.
            prompt: describes the picture that is wanted.
            at: iterations after which to look, 0 (the picture itself) … `free.iterations`.
            negative_prompt, seed, superres: as for `generate`.
            free: share, iterations, guidance and sampling.

        Raises:
            UserError: a setting or an iteration out of range, or arguments that are no picture or no text.
        """
        from muse.editing.whole import edit

        settings = self.settings(seed, negative_prompt=negative_prompt, superres=superres)
        frames = edit(self, pixels(image), prompt, settings, knobs.free_edit(free), at)
        return [Image.fromarray(img_HWC) for img_HWC in frames]

    def variation(
        self,
        image: Picture,
        prompt: str = '',
        *,
        strength: float = 0.5,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        decoding: DecodeConfig | None = None,
        superres: SuperresDecoding = None,
    ) -> Image.Image:
        """Another picture like this one: a share `strength` of its tokens, chosen at random, is drawn anew.

        0 returns the picture as it is, 1 draws a new one. Other arguments, and errors, as for `inpaint`.
        """
        from muse.editing.whole import variation

        settings = self.settings(
            seed, steps, guidance_scale, temperature, negative_prompt, decoding=decoding, superres=superres
        )
        return Image.fromarray(variation(self, pixels(image), prompt, strength, settings))

    def encode(self, image: Picture, *, high: bool = False) -> np.ndarray:
        """Token ids `[rows, columns]`, int32, of a picture whose sides are multiples of the tokenizer's factor.

        Args:
            high: with the super-res' tokenizer instead of the base's.

        Raises:
            UserError: other sides, no picture, or `high` without a super-res.
        """
        img_HWC, factor = pixels(image), self._tokenizer_config(high).factor
        height, width = img_HWC.shape[:2]
        if width % factor or height % factor:
            raise UserError(f'image is {width}×{height}; resize it so that {factor} divides both sides')
        return self.cascade.tokens(img_HWC, high=high)

    def decode(self, tokens: np.ndarray, *, high: bool = False) -> Image.Image:
        """The picture of token ids `[rows, columns]` of the tokenizer that `encode` took.

        Raises:
            UserError: ids that are no integers from 0 to the codebook's last, or `high` without a super-res.
        """
        tokens, codes = np.asarray(tokens), self._tokenizer_config(high).codebook_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f'tokens are {tokens.dtype} of shape {tokens.shape}; give integers [rows, columns]')
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= codes:
            raise UserError(f'tokens must be a filled grid of ids from 0 to {codes - 1}; take them from encode()')
        return self.cascade.pixels(tokens.astype(np.int32)[None], high=high)[0]

    def _tokenizer_config(self, high: bool) -> Any:
        if high:
            self.need_superres()
            assert self.release.superres_tokenizer is not None
            return self.release.superres_tokenizer.config
        return self.release.tokenizer.config


def pixels(image: Picture) -> np.ndarray:
    """uint8 [height, width, 3] of a picture, upright and over white."""
    if not isinstance(image, Picture):
        raise UserError(f'image is a {type(image).__name__}; give a PIL.Image, an array [height, width, 3] or a path')
    return open_picture(image)
