"""The nets of a release at work: rows to draw → low-res tokens → high-res tokens → pixels (§2.4 to §2.8).

Everything here is checked already; `muse.pipeline` is what a user calls. On a CPU rows are drawn one at a time through
programs of batch 1. On accelerators they are drawn in batches of one size, spread over all the devices of this host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from PIL import Image

from muse import drawing
from muse.canvas import Canvas, Grid
from muse.config import DecodeConfig
from muse.drawing import Batch
from muse.errors import UserError
from muse.mesh import AXES
from muse.models import t5
from muse.nn.layers import cast_matrices
from muse.nn.quantized import Precision, quantized
from muse.release.format import Part, Release, graphdef_and_template
from muse.settings import Row, Settings
from muse.text.encode import PromptCache
from muse.text.tokenizer import Tokenizer

UNKNOWN = -1  # stands for a token to be drawn
AHEAD = 64  # rows whose texts are encoded together, ahead of their drawing

Texts = dict[str, tuple[Array, int]]  # states [S, D] and length of each text


@dataclass(frozen=True)
class Drawn:
    """One picture and the tokens that it was decoded from; ids are int32 [rows, columns]."""

    image: Image.Image
    low: np.ndarray
    high: np.ndarray | None  # None where the base alone drew
    low_steps: np.ndarray  # [steps, rows, columns]: after each step, the codebook's size where still unknown
    high_steps: np.ndarray | None


class Net(NamedTuple):
    """A model's structure, for this machine, and its parameters, on it."""

    graph: nnx.GraphDef
    params: nnx.State


class Cascade:
    """The loaded nets. `superres` and `superres_tokenizer` are None where the release holds none.

    They hold all weights: those of `release` are shapes here, so that nothing is held twice in two types.
    """

    def __init__(self, release: Release, precision: Precision | None = None):
        self.release = _described(release)
        self.precision: Precision | None = precision
        self.on_cpu = jax.default_backend() == 'cpu'
        devices = jax.local_devices()
        self._mesh = None
        if not self.on_cpu and len(devices) > 1:
            self._mesh = Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
        self.base, self.tokenizer = self._net('base', release.base), self._net('tokenizer', release.tokenizer)
        self.superres = self._net('superres', release.superres) if release.superres else None
        self.superres_tokenizer = (
            self._net('superres_tokenizer', release.superres_tokenizer) if release.superres_tokenizer else None
        )
        self._text_encoder = nnx.merge(*self._net('text_encoder', release.text_encoder))
        self._vocabulary, self._prompts = Tokenizer(release.vocabulary), PromptCache()

    def _net(self, name: str, part: Part) -> Net:
        """The structure need not be the one that was trained: on a CPU it computes in float32 (bf16 is slow there), and
        attention is this machine's. Weights are held in the type that they are applied in."""
        config, params = part.config, part.params
        draws = name in ('base', 'superres')
        if self.on_cpu:
            config = dataclasses.replace(config, dtype='float32')
        if name == 'text_encoder':
            config = t5.native(config)
        elif draws:
            config = dataclasses.replace(config, attention='auto')
        graph = graphdef_and_template(name, config)[0]
        if draws and self.precision is not None:
            graph, params = quantized(graph, params, self.precision)
        if draws:
            params = cast_matrices(params, config.dtype)
        if self._mesh is not None:
            params = jax.device_put(params, NamedSharding(self._mesh, P()))
        return Net(graph, params)

    def texts(self, texts: Sequence[str]) -> Texts:
        """States and length (0: no text) of each distinct text."""
        length = self.release.base.config.text_length
        encoder = self.release.text_encoder.hash
        return self._prompts.encode(encoder, self._text_encoder, self._vocabulary, texts, length)

    def draw(self, rows: Sequence[Row], settings: Settings, canvas: Canvas, batch_size: int = 1) -> Iterator[Drawn]:
        """Draws rows in batches of exactly `batch_size`, of which the last is filled up by repetition (1 on a CPU).

        Texts are encoded and warned of before this returns, as far as `AHEAD` reaches.
        """
        size = 1 if self.on_cpu else batch_size
        ahead = size * max(1, AHEAD // size)
        known = [_known(row, canvas, self) for row in rows]
        self.texts(_texts_of(rows[:ahead], settings))

        def drawn() -> Iterator[Drawn]:
            texts: Texts = {}
            for start in range(0, len(rows), size):
                if start % ahead == 0:
                    texts = self.texts(_texts_of(rows[start : start + ahead], settings))
                here = [min(row, len(rows) - 1) for row in range(start, start + size)]
                with self._devices():
                    some = self._draw([rows[i] for i in here], [known[i] for i in here], texts, settings, canvas)
                yield from some[: len(rows) - start]

        return drawn()

    def _devices(self) -> contextlib.AbstractContextManager[object]:
        """The mesh for the programs within, by which attention kernels know what a device has of a batch."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _draw(
        self,
        rows: list[Row],
        known: list[tuple[np.ndarray, np.ndarray | None]],
        texts: Texts,
        settings: Settings,
        canvas: Canvas,
    ) -> list[Drawn]:
        low_BT, batch = np.stack([low_T for low_T, _ in known]), self._batch(rows, texts, settings, settings)
        if settings.superres is None or canvas.high is None:
            low_KBT, pictures = self._paint_base(low_BT, batch, settings, canvas.low)
            return [
                Drawn(image, low[-1], None, low, None)
                for image, low in zip(pictures, _grids(low_KBT, canvas.low), strict=True)
            ]
        high_BT = np.stack([high_T for _, high_T in known if high_T is not None])
        high_batch = self._batch(rows, texts, settings, settings.superres)
        if self.on_cpu or _complete(low_BT) or _complete(high_BT):
            low_KBT = self._fill(low_BT, None, batch, settings, canvas.low)
            high_KBT = self._fill(high_BT, low_KBT[-1], high_batch, settings.superres, canvas.high)
            pictures = self.pixels(high_KBT[-1].reshape(-1, *canvas.high), high=True)
        else:
            assert self.superres is not None
            graphs, params = zip(self.base, self.superres, self._tokenizer_of(True), strict=True)
            low_KBT, high_KBT, img_BHWC = drawing.paint_cascade(
                params,
                (*self._canvas(low_BT), batch),
                (*self._canvas(high_BT), high_batch),
                graphs=graphs,
                grids=(canvas.low, canvas.high),
                programs=(drawing.program_of(settings), drawing.program_of(settings.superres)),
            )
            low_KBT, high_KBT, pictures = np.asarray(low_KBT), np.asarray(high_KBT), _images(img_BHWC)
        steps = zip(pictures, _grids(low_KBT, canvas.low), _grids(high_KBT, canvas.high), strict=True)
        return [Drawn(image, low[-1], high[-1], low, high) for image, low, high in steps]

    def _paint_base(
        self, tok_BT: np.ndarray, batch: Batch, config: DecodeConfig, grid: Grid
    ) -> tuple[np.ndarray, list[Image.Image]]:
        """Tokens after each step and the pictures. In one program on accelerators, which then never wait for the host;
        on a CPU the decoder is a program that edits share."""
        if self.on_cpu or _complete(tok_BT):
            tok_KBT = self._fill(tok_BT, None, batch, config, grid)
            return tok_KBT, self.pixels(tok_KBT[-1].reshape(-1, *grid))
        graphs, params = zip(self.base, self.tokenizer, strict=True)
        program = drawing.program_of(config)
        tok_KBT, img_BHWC = drawing.paint_base(
            params, *self._canvas(tok_BT), batch, graphs=graphs, grid=grid, program=program
        )
        return np.asarray(tok_KBT), _images(img_BHWC)

    def _canvas(self, tok_BT: np.ndarray) -> Any:
        """What is to be filled, and what of it is known."""
        return self._spread((np.where(tok_BT != UNKNOWN, tok_BT, 0), tok_BT != UNKNOWN))

    def _fill(
        self, tok_BT: np.ndarray, low_BT: np.ndarray | None, batch: Batch, config: DecodeConfig, grid: Grid
    ) -> np.ndarray:
        """Tokens after each step, `[K, B, T]`; those of the super-res where `low_BT` is given."""
        if _complete(tok_BT):
            return tok_BT[None]
        program, tokens = drawing.program_of(config), self._canvas(tok_BT)
        if low_BT is None:
            graph, params = self.base
            return np.asarray(drawing.fill_base(params, *tokens, batch, graph=graph, grid=grid, program=program))
        assert self.superres is not None
        graph, params = self.superres
        filled = drawing.fill_superres(
            params, self._spread(low_BT), *tokens, batch, graph=graph, grid=grid, program=program
        )
        return np.asarray(filled)

    def resample(
        self, tok_hw: np.ndarray, keep_hw: np.ndarray, row: Row, settings: Settings, config: DecodeConfig, share: float
    ) -> np.ndarray:
        """Mask-free editing of one picture's low-res tokens: the grid after each iteration, `[K, rows, columns]`."""
        batch = self._batch([row], self.texts(_texts_of([row], settings)), settings, config)
        graph, params = self.base
        with self._devices():
            tok_KBT = drawing.resample_base(
                params,
                tok_hw.reshape(1, -1),
                keep_hw.reshape(1, -1),
                batch,
                np.float32(share),  # pyright: ignore[reportArgumentType]
                graph=graph,
                grid=tok_hw.shape,
                program=drawing.program_of(config),
            )
        return _grids(np.asarray(tok_KBT), tok_hw.shape)[0]

    def pixels(self, ids_Bhw: np.ndarray, *, high: bool = False) -> list[Image.Image]:
        """The pictures of token ids, of the base's tokenizer or the super-res'."""
        graph, params = self._tokenizer_of(high)
        img_BHWC = drawing.decode_pixels(params, self._spread(ids_Bhw), graph=graph)
        return _images(img_BHWC)

    def tokens(self, img_HWC: np.ndarray, *, high: bool = False) -> np.ndarray:
        """Token ids `[rows, columns]` of uint8 pixels."""
        graph, params = self._tokenizer_of(high)
        return np.asarray(drawing.encode_pixels(params, img_HWC[None], graph=graph))[0]

    def _tokenizer_of(self, high: bool) -> Net:
        net = self.superres_tokenizer if high else self.tokenizer
        assert net is not None
        return net

    def _batch(self, rows: Sequence[Row], texts: Texts, shared: Settings, config: DecodeConfig) -> Batch:
        """What a program reads. A row's own scale and temperature are those of the base's decoding."""
        own = config is shared
        guidance_B = [_or(row.guidance_scale if own else None, config.guidance_scale) for row in rows]
        temperature_B = [_or(row.temperature if own else None, config.temperature) for row in rows]
        conditions = [texts[row.prompt] for row in rows]
        negatives = [texts[_or(row.negative_prompt, shared.negative_prompt)] for row in rows]
        branches = [conditions, negatives] if any(guidance_B) else [conditions]
        with_text = branches if any(length for _, length in negatives) else [conditions]  # see `drawing.Batch`
        txt_GBSD = jnp.stack([jnp.stack([txt_SD for txt_SD, _ in branch]) for branch in with_text[: len(branches)]])
        return drawing.batch_of(
            config,
            self._spread(txt_GBSD, axis=1),
            np.asarray([[length for _, length in branch] for branch in branches], np.int32),
            np.asarray([_or(row.seed, shared.seed) for row in rows], np.uint32),
            np.asarray([row.index for row in rows], np.int32),
            np.asarray(guidance_B, np.float32),
            np.asarray(temperature_B, np.float32),
        )

    def _spread(self, arrays: Any, axis: int = 0) -> Any:
        """Splits arrays over the accelerators of this host along their rows, where these divide."""
        mesh = self._mesh
        if mesh is None:
            return arrays

        def put(x):
            split = P(*[None] * axis, 'data') if x.shape[axis] % mesh.size == 0 else P()
            return jax.device_put(x, NamedSharding(mesh, split))

        return jax.tree.map(put, arrays)


def _described(release: Release) -> Release:
    """The release with shapes in place of weights, as `describe_release` gives it."""
    parts = {field.name: getattr(release, field.name) for field in dataclasses.fields(release)}
    shapes = {
        name: dataclasses.replace(part, params=jax.eval_shape(lambda params=part.params: params))
        for name, part in parts.items()
        if isinstance(part, Part)
    }
    return dataclasses.replace(release, **shapes)


def veiled(image: Image.Image, unknown_hw: np.ndarray) -> Image.Image:
    """The picture with grey over its unknown cells."""
    veil = Image.fromarray(unknown_hw.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new('RGB', image.size, (128, 128, 128)), image, veil)


def _complete(tok_BT: np.ndarray) -> bool:
    return bool((tok_BT != UNKNOWN).all())


def _images(img_BHWC: Array) -> list[Image.Image]:
    return [Image.fromarray(img_HWC) for img_HWC in np.asarray(img_BHWC)]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _texts_of(rows: Sequence[Row], settings: Settings) -> list[str]:
    prompts = [row.prompt for row in rows]
    return [*prompts, *(_or(row.negative_prompt, settings.negative_prompt) for row in rows)]


def _grids(tok_KBT: np.ndarray, grid: Grid) -> np.ndarray:
    """[B, K, rows, columns]"""
    return np.moveaxis(tok_KBT, 0, 1).reshape(tok_KBT.shape[1], -1, *grid)


def _known(row: Row, canvas: Canvas, cascade: Cascade) -> tuple[np.ndarray, np.ndarray | None]:
    """A row's known tokens of both levels, flat, with UNKNOWN elsewhere."""
    low_T = _checked('low', row.low, canvas.low, cascade.release.tokenizer)
    if canvas.high is None:
        return low_T, None
    assert cascade.release.superres_tokenizer is not None
    return low_T, _checked('high', row.high, canvas.high, cascade.release.superres_tokenizer)


def _checked(name: str, tok_hw: np.ndarray | None, grid: Grid, tokenizer: Part) -> np.ndarray:
    if tok_hw is None:
        return np.full(grid[0] * grid[1], UNKNOWN, np.int32)
    tok_hw, codes = np.asarray(tok_hw), tokenizer.config.codebook_size
    if tok_hw.shape != grid or not np.issubdtype(tok_hw.dtype, np.integer):
        raise UserError(f'{name} tokens are {tok_hw.dtype} {tok_hw.shape}; give integers of shape {grid}')
    if tok_hw.min() < UNKNOWN or tok_hw.max() >= codes:
        raise UserError(
            f'{name} tokens run from {tok_hw.min()} to {tok_hw.max()}; give ids from 0 to {codes - 1}, or −1'
        )
    return tok_hw.astype(np.int32).ravel()


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/muse, unless a place was chosen already (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.values['jax_compilation_cache_dir'] is None and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = Path.home() / '.cache' / 'muse'
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a read-only home: compile anew each time
        jax.config.update('jax_compilation_cache_dir', str(folder))
