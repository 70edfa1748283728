"""The public object: prompts in, pictures out (§2.7, §2.8 with §2.2's decoder behind).

From text states to pixels everything is one jitted program, compiled once for each (batch, steps, guided or not).
Noise depends on (seed, picture index, step) alone. On a CPU, where batching gains nothing, pictures are drawn one at
a time through a batch of 1, so that not even the rounding can depend on the batch size.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from muse.config import DecodeConfig
from muse.decode import decode, row_keys
from muse.errors import UserError, warn
from muse.guidance import cfg_weights, guided_logits, scale_at
from muse.models.t5 import T5Encoder
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN, to_float, to_uint8
from muse.release.format import Release, load_release, shipped
from muse.text.encode import encode_prompts
from muse.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Checked knobs of one run, as they are written beside the pictures."""

    seed: int
    steps: int
    guidance_scale: float
    temperature: float
    negative_prompt: str


def load(path: str | Path | None = None) -> Muse:
    """Loads a release folder; None is the model that comes with the package.

    Raises:
        UserError: a missing, damaged or inconsistent release.
    """
    _use_compilation_cache()
    return Muse(load_release(path or shipped()))


class Muse:
    """A loaded model. `generate` draws, `inpaint` repaints, `encode` and `decode` are the picture tokenizer's."""

    def __init__(self, release: Release):
        self.release = release
        self.on_cpu = jax.default_backend() == 'cpu'
        self._base, self._tokenizer = release.base.params, release.tokenizer.params
        self._graphs = (
            _graph(Transformer, release.base.config, self.on_cpu),
            _graph(VQGAN, release.tokenizer.config, self.on_cpu),
        )
        text_graph = _graph(T5Encoder, release.text_encoder.config, self.on_cpu)
        self._text_encoder = nnx.merge(text_graph, release.text_encoder.params)
        self._vocabulary = Tokenizer(release.vocabulary)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a picture."""
        return self.release.base.config.grid

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a drawn picture in pixels."""
        factor = self.release.tokenizer.config.factor
        return self.grid[1] * factor, self.grid[0] * factor

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
            batch_size: pictures at a time on an accelerator. It never changes a picture on a CPU.

        Returns:
            RGB pictures of `self.size`; prompt p's are those from p · num_images on.

        Raises:
            UserError: a prompt that is no text or over 1 MB, a count below 1, a number out of range.
        """
        settings = self.settings(seed, steps, guidance_scale, temperature, negative_prompt)
        return list(self.stream(prompts, settings, num_images=num_images, batch_size=batch_size))

    def settings(
        self,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        negative_prompt: str | None = None,
    ) -> Settings:
        """Checks the knobs of `generate` and fills in the release's defaults."""
        defaults = self.release.decode
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise UserError(f'negative_prompt is {negative_prompt!r}; give a text or None')
        _check_unicode('negative_prompt', negative_prompt or '')
        settings = Settings(
            seed=_count('seed', seed, 0, 2**32 - 1),
            steps=_count('steps', defaults.steps if steps is None else steps, 1, math.prod(self.grid)),
            guidance_scale=_number('guidance_scale', guidance_scale, defaults.guidance_scale),
            temperature=_number('temperature', temperature, defaults.temperature),
            negative_prompt=negative_prompt or '',
        )
        if settings.negative_prompt.strip() and settings.guidance_scale == 0:
            warn('negative_prompt has no effect at guidance_scale 0')
        return settings

    def stream(
        self, prompts: str | Sequence[str], settings: Settings, *, num_images: int = 1, batch_size: int = 8
    ) -> Iterator[Image.Image]:
        """As `generate`, one picture after the other; everything is checked before this returns."""
        prompts = check_prompts(prompts)
        _count('num_images', num_images, 1)
        _count('batch_size', batch_size, 1)
        texts = self._texts([*prompts, settings.negative_prompt])
        total = len(prompts) * num_images
        size = 1 if self.on_cpu else min(batch_size, total)

        def pictures() -> Iterator[Image.Image]:
            for start in range(0, total, size):
                index = list(range(start, min(start + size, total)))
                padded = index + index[-1:] * (size - len(index))
                conditions = [texts[prompts[i // num_images]] for i in padded]
                img_BHWC = self.paint(conditions, texts[settings.negative_prompt], padded, settings)
                yield from (Image.fromarray(img_HWC) for img_HWC in img_BHWC[: len(index)])

        return pictures()

    def paint(
        self,
        conditions: Sequence[tuple[Array, int]],
        negative: tuple[Array, int],
        index: Sequence[int],
        settings: Settings,
        canvas_BT: np.ndarray | None = None,
        keep_BT: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draws one batch: uint8 `[B, H, W, 3]`.

        Args:
            conditions: text states and length of each row, as `text_states` gives them.
            negative: those of the negative prompt, or of no text.
            index: each row's picture index, which its noise is made of.
            settings: the knobs.
            canvas_BT, keep_BT: token ids and which of them are known; None is an empty canvas.
        """
        branches = [conditions] if settings.guidance_scale == 0 else [conditions, [negative] * len(conditions)]
        shape = (len(conditions), math.prod(self.grid))
        return np.asarray(
            draw(
                self._base,
                self._tokenizer,
                jnp.stack([jnp.stack([txt_SD for txt_SD, _ in rows]) for rows in branches]),
                np.asarray([[length for _, length in rows] for rows in branches], np.int32),
                np.zeros(shape, np.int32) if canvas_BT is None else canvas_BT.astype(np.int32),
                np.zeros(shape, bool) if keep_BT is None else keep_BT,
                np.asarray(index, np.int32),
                np.uint32(settings.seed),
                np.float32(settings.guidance_scale),
                np.float32(settings.temperature),
                graphs=self._graphs[:2],
                steps=settings.steps,
                defaults=self.release.decode,
            )
        )

    def text_states(self, text: str) -> tuple[Array, int]:
        """Frozen encoder's states `[text_length, D]` of one text and how many of them are real (0: no text)."""
        return self._texts([text])[text]

    def _texts(self, texts: Sequence[str]) -> dict[str, tuple[Array, int]]:
        """States and length of each distinct text."""
        distinct, length = list(dict.fromkeys(texts)), self.release.base.config.text_length
        txt_BSD, len_B = encode_prompts(self._text_encoder, self._vocabulary, distinct, length)
        return {text: (txt_BSD[i], int(len_B[i])) for i, text in enumerate(distinct)}

    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
    ) -> Image.Image:
        """Repaints where `mask` is white; see `muse.editing.inpaint`."""
        from muse.editing import inpaint

        settings = self.settings(seed, steps, guidance_scale, temperature, negative_prompt)
        return inpaint(self, image, mask, prompt, settings)

    def encode(self, image: Image.Image) -> np.ndarray:
        """Token ids `[rows, columns]`, int32, of a picture whose sides are multiples of the tokenizer's factor."""
        factor = self.release.tokenizer.config.factor
        if not isinstance(image, Image.Image):
            raise UserError(f'image is a {type(image).__name__}; give a PIL.Image')
        if image.width % factor or image.height % factor:
            raise UserError(f'image is {image.width}×{image.height}; resize it so that {factor} divides both sides')
        img_HWC = np.asarray(image.convert('RGB'))
        return np.asarray(_encode_pixels(self._tokenizer, img_HWC[None], graph=self._graphs[1]))[0]

    def decode(self, tokens: np.ndarray) -> Image.Image:
        """The picture of token ids `[rows, columns]` (0 … codebook − 1)."""
        tokens, codes = np.asarray(tokens), self.release.tokenizer.config.codebook_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f'tokens are {tokens.dtype} of shape {tokens.shape}; give integers [rows, columns]')
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= codes:
            raise UserError(f'tokens must be a filled grid of ids from 0 to {codes - 1}; take them from encode()')
        ids_1hw = tokens.astype(np.int32)[None]
        return Image.fromarray(np.asarray(_decode_tokens(self._tokenizer, ids_1hw, graph=self._graphs[1]))[0])


traces: Counter[str] = Counter()  # how often JAX has traced each program: other prompts and knobs must not add to it


@partial(jax.jit, static_argnames=('graphs', 'steps', 'defaults'))
def draw(
    base_params: nnx.State,
    tokenizer_params: nnx.State,
    txt_GBSD: Float[Array, 'G B S D'],
    len_GB: Int[Array, 'G B'],
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    index_B: Int[Array, ' B'],
    seed: Array,
    guidance_scale: Array,
    temperature: Array,
    *,
    graphs: tuple[nnx.GraphDef, nnx.GraphDef],
    steps: int,
    defaults: DecodeConfig,
) -> UInt8[Array, 'B H W 3']:
    """Text states → tokens → pixels. All G guidance branches of a row run as one batch of G · B.

    The one program of sampling, editing and the sheets that training draws.

    Args:
        base_params, tokenizer_params: of the modules whose structure is `graphs`.
        txt_GBSD, len_GB: text of each branch: (conditional) or (conditional, negative or none).
        canvas_BT, keep_BT: token ids and which of them are known.
        index_B, seed: the noise of each row is made of both.
        guidance_scale, temperature: see `DecodeConfig`; traced, so that other values compile nothing.
        steps: of decoding.
        defaults: what is fixed for a model: schedules and the noise on the confidence.
    """
    traces['draw'] += 1
    base, tokenizer = nnx.merge(graphs[0], base_params), nnx.merge(graphs[1], tokenizer_params)
    branches, batch = len_GB.shape
    memory = base.memory(txt_GBSD.reshape(branches * batch, *txt_GBSD.shape[2:]))
    scale_B = jnp.broadcast_to(guidance_scale, (batch,))

    def logits_fn(tok_BT, progress):
        logits = base.logits(jnp.tile(tok_BT, (branches, 1)), memory, len_GB.reshape(-1))
        if branches == 1:
            return logits
        weights_GB = cfg_weights(scale_at(scale_B, progress, defaults.guidance_schedule))
        return guided_logits(logits.reshape(branches, batch, *logits.shape[1:]), weights_GB)

    tok_BT = decode(
        logits_fn,
        canvas_BT,
        keep_BT,
        row_keys(seed, index_B),
        steps=steps,
        temperature=temperature,
        choice_temperature=defaults.choice_temperature,
        schedule=defaults.schedule,
    )
    return to_uint8(tokenizer.decode(tok_BT.reshape(batch, *base.config.grid)))


@partial(jax.jit, static_argnames='graph')
def _encode_pixels(params: nnx.State, img_BHWC: Array, *, graph: nnx.GraphDef) -> Int[Array, 'B h w']:
    traces['encode'] += 1
    return nnx.merge(graph, params).encode(to_float(img_BHWC))


@partial(jax.jit, static_argnames='graph')
def _decode_tokens(params: nnx.State, ids_Bhw: Array, *, graph: nnx.GraphDef) -> UInt8[Array, 'B H W 3']:
    traces['decode'] += 1
    return to_uint8(nnx.merge(graph, params).decode(ids_Bhw))


def _graph(model: Callable[..., nnx.Module], config: Any, on_cpu: bool) -> nnx.GraphDef:
    """The model's structure for this machine, which need not be the one that it was trained on.

    On a CPU it computes in float32 (bf16 is slow there); an attention kernel of another backend gives way to 'xla'.
    """
    native = {'gpu': 'cudnn', 'tpu': 'splash'}.get(jax.default_backend())
    if on_cpu:
        config = dataclasses.replace(config, dtype='float32')
    if getattr(config, 'attention', native) != native:
        config = dataclasses.replace(config, attention='xla')
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(params=0))), nnx.Param)[0]


def _use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/muse, unless a place was chosen already (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.values['jax_compilation_cache_dir'] is None and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = Path.home() / '.cache' / 'muse'
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a read-only home: compile anew each time
        jax.config.update('jax_compilation_cache_dir', str(folder))


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts as a list; warns of blank ones, which draw without text."""
    if not isinstance(prompts, Sequence):
        raise UserError(f'prompts are a {type(prompts).__name__}; give a text or a list of texts')
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError('no prompt was given: give at least one text')
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f'prompt {prompt!r} is a {type(prompt).__name__}; give a text')
        _check_unicode('prompt', prompt)
    if blank := sum(not prompt.strip() for prompt in prompts):
        warn(f'empty prompts: {blank} of {len(prompts)}; drawn without text')
    return prompts


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f'{name} {text[:40]!r} holds bytes that are no UTF-8: save or type it as UTF-8') from None


def _count(name: str, value: Any, low: int, high: int | None = None) -> int:
    wanted = f'an integer from {low} to {high}' if high is not None else f'an integer of at least {low}'
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or value > (high or value):
        raise UserError(f'{name} is {value!r}; give {wanted}')
    return int(value)


def _number(name: str, value: Any, default: float) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value < 1e6:
        raise UserError(f'{name} is {value!r}; give a number of at least 0')
    return float(value)
