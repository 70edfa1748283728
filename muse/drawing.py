"""The compiled programs of sampling and editing: text states and known tokens → tokens → pixels (§2.4, §2.7, §2.8).

Each step is a program of its own for edits, and on a CPU; `paint_base` and `paint_cascade` are all steps in one.

What changes from call to call (prompts, seeds, scales, temperatures, which tokens are known) is data of a program.
It is compiled anew for another shape (batch, steps, size) and for what a run does differently: guided or not, against
a negative prompt or none, an order of filling, a schedule, top-k or top-p at all. `traces` counts.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt8

from muse.canvas import Grid, windows
from muse.config import DecodeConfig, GuidanceSchedule, MaskSchedule, Order
from muse.decode import LogitsFn, decode_steps, halton_order, noise_keys, random_order, resample_steps
from muse.guidance import cfg_weights, guided_logits, scale_at
from muse.models.superres import Superres
from muse.models.vqgan import to_float, to_uint8
from muse.nn.devices import GPUS, drawing_kernels, platform, warn_if_asked
from muse.nn.layers import cast_matrices, unstack
from muse.nn.quantized import is_quantized

Branches = Callable[[Int[Array, 'BG T'], Int[Array, ' BG']], Float[Array, 'BG T V']]  # tokens, text lengths → logits
# Folded into the noise keys of the super-res: it draws other things than the base from the same seed.
_SUPERRES = np.uint32(2**32 - 1)
traces: Counter[str] = Counter()  # how often JAX has traced each program: other prompts and knobs must not add to it


class Batch(NamedTuple):
    """What a program reads besides tokens. G is 2 with guidance: (conditional, negative or none), and 1 without.

    Where no row has a negative prompt the second branch has no states, and costs the base no cross-attention.
    """

    txt_GBSD: Float[Array, 'G B S D'] | Float[Array, '1 B S D']
    len_GB: Int[Array, 'G B']
    seed_B: Integer[Array, ' B']
    index_B: Int[Array, ' B']  # of the picture: its noise is made of seed, index and step
    guidance_B: Float[Array, ' B']
    temperature_2B: Float[Array, '2 B']  # at the first step and at the last
    interval: tuple[Array, Array]  # guidance acts from here to there
    choice_temperature: Float[Array, '']
    top_k: Int[Array, ''] | None
    top_p: Float[Array, ''] | None


class Program(NamedTuple):
    """What a program is compiled for."""

    steps: int
    schedule: MaskSchedule
    guidance_schedule: GuidanceSchedule
    order: Order


def program_of(config: DecodeConfig) -> Program:
    """The compiled side of the decoding settings."""
    return Program(config.steps, config.schedule, config.guidance_schedule, config.order)


def batch_of(
    config: DecodeConfig,
    txt_GBSD: Array,
    len_GB: Array | np.ndarray,
    seed_B: Array | np.ndarray,
    index_B: Array | np.ndarray,
    guidance_B: Array | np.ndarray | None = None,
    temperature_B: Array | np.ndarray | None = None,
) -> Batch:
    """The traced side of the decoding settings beside each row's own; None of a row's takes the settings'."""
    rows = len(index_B)
    if guidance_B is None:
        guidance_B = np.full(rows, config.guidance_scale, np.float32)
    if temperature_B is None:
        temperature_B = np.full(rows, config.temperature, np.float32)
    last = config.final_temperature
    last_B = temperature_B if last is None else np.full(rows, last, np.float32)
    fields: dict[str, Any] = {  # NumPy's arrays are JAX's once a program reads them
        'txt_GBSD': txt_GBSD,
        'len_GB': len_GB,
        'seed_B': seed_B,
        'index_B': index_B,
        'guidance_B': guidance_B,
        'temperature_2B': np.stack([temperature_B, last_B]),
        'interval': (np.float32(config.guidance_interval[0]), np.float32(config.guidance_interval[1])),
        'choice_temperature': np.float32(config.choice_temperature),
        'top_k': np.int32(config.top_k) if config.top_k else None,
        'top_p': np.float32(config.top_p) if config.top_p < 1 else None,
    }
    return Batch(**fields)


@partial(jax.jit, static_argnames=('graph', 'grid', 'program'))
def fill_base(
    params: nnx.State,
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    grid: Grid,
    program: Program,
) -> Int[Array, 'K B T']:
    """The base transformer fills a canvas of `grid` tokens: the canvas after each step, as `decode_steps` gives it."""
    traces['fill_base'] += 1
    keys_B = noise_keys(batch.seed_B, batch.index_B)
    return _fill(_base_branches(params, graph, grid, batch), canvas_BT, keep_BT, keys_B, batch, grid, program)


@partial(jax.jit, static_argnames=('graph', 'grid', 'program'))
def fill_superres(
    params: nnx.State,
    low_BT: Int[Array, 'B T2'],
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    grid: Grid,
    program: Program,
) -> Int[Array, 'K B T']:
    """The super-res fills a canvas of `grid` high-res tokens over complete low-res ones (§2.4); as `fill_base`."""
    traces['fill_superres'] += 1
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(noise_keys(batch.seed_B, batch.index_B), _SUPERRES)
    branches = _superres_branches(_merged(graph, params), low_BT, batch, grid)
    return _fill(branches, canvas_BT, keep_BT, keys_B, batch, grid, program)


@partial(jax.jit, static_argnames=('graph', 'grid', 'program'))
def resample_base(
    params: nnx.State,
    tok_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    batch: Batch,
    share: Float[Array, ''],
    *,
    graph: nnx.GraphDef,
    grid: Grid,
    program: Program,
) -> Int[Array, 'K B T']:
    """Mask-free editing on the base (§3.3): the tokens after each iteration, as `resample_steps` gives them."""
    traces['resample_base'] += 1
    return resample_steps(
        _guided(_base_branches(params, graph, grid, batch), batch, program),
        tok_BT,
        keep_BT,
        noise_keys(batch.seed_B, batch.index_B),
        steps=program.steps,
        share=share,
        temperature=_temperature(batch, program.steps),
        top_k=batch.top_k,
        top_p=batch.top_p,
    )


@partial(jax.jit, static_argnames='graph')
def encode_pixels(params: nnx.State, img_BHWC: Array, *, graph: nnx.GraphDef) -> Int[Array, 'B h w']:
    """uint8 pixels → token ids."""
    traces['encode'] += 1
    return nnx.merge(graph, params).encode(to_float(img_BHWC))


@partial(jax.jit, static_argnames='graph')
def decode_pixels(params: nnx.State, ids_Bhw: Array, *, graph: nnx.GraphDef) -> UInt8[Array, 'B H W 3']:
    """Token ids → uint8 pixels."""
    traces['decode'] += 1
    return to_uint8(nnx.merge(graph, params).decode(ids_Bhw))


@partial(jax.jit, static_argnames=('graphs', 'grid', 'program'))
def paint_base(
    params: tuple[nnx.State, nnx.State],
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    batch: Batch,
    *,
    graphs: tuple[nnx.GraphDef, nnx.GraphDef],
    grid: Grid,
    program: Program,
) -> tuple[Int[Array, 'K B T'], UInt8[Array, 'B H W 3']]:
    """Text states to pixels in one program: `fill_base`, then `decode_pixels`, of the base and its tokenizer."""
    tok_KBT = fill_base(params[0], canvas_BT, keep_BT, batch, graph=graphs[0], grid=grid, program=program)
    return tok_KBT, decode_pixels(params[1], tok_KBT[-1].reshape(-1, *grid), graph=graphs[1])


@partial(jax.jit, static_argnames=('graphs', 'grids', 'programs'))
def paint_cascade(
    params: tuple[nnx.State, nnx.State, nnx.State],
    low: tuple[Int[Array, 'B T2'], Bool[Array, 'B T2'], Batch],
    high: tuple[Int[Array, 'B T'], Bool[Array, 'B T'], Batch],
    *,
    graphs: tuple[nnx.GraphDef, nnx.GraphDef, nnx.GraphDef],
    grids: tuple[Grid, Grid],
    programs: tuple[Program, Program],
) -> tuple[Int[Array, 'K2 B T2'], Int[Array, 'K B T'], UInt8[Array, 'B H W 3']]:
    """Text states to large pictures in one program, of the base, the super-res and its tokenizer.

    `low` and `high` are what each level is to fill: canvas, known tokens, and what its program reads.
    """
    low_KBT = fill_base(params[0], *low, graph=graphs[0], grid=grids[0], program=programs[0])
    high_KBT = fill_superres(params[1], low_KBT[-1], *high, graph=graphs[1], grid=grids[1], program=programs[1])
    return low_KBT, high_KBT, decode_pixels(params[2], high_KBT[-1].reshape(-1, *grids[1]), graph=graphs[2])


def _base_branches(params: nnx.State, graph: nnx.GraphDef, grid: Grid, batch: Batch) -> Branches:
    base = _merged(graph, params)
    memory = base.memory(_rows(batch.txt_GBSD))
    without_states = len(batch.len_GB) // len(batch.txt_GBSD)
    return lambda tok_RT, len_R: base.logits(tok_RT, memory, len_R[::without_states], grid)


def _merged(graph: nnx.GraphDef, params: nnx.State) -> Any:
    """The model as its steps run it: weights cast, once and not in each step, and the layers apart where that pays.

    Layers in a stack are copied out of it in every step: on a GPU a quarter of the time of one picture. Apart, each is
    compiled on its own; a CPU hardly notices either. `drawing_kernels` take what lies around products too,
    unless these are of one-byte numbers.
    """
    config = nnx.merge(graph, params).config
    model = nnx.merge(graph, cast_matrices(params, config.dtype))
    if platform() in GPUS or config.unroll >= config.layers:
        model.config = dataclasses.replace(config, remat='none')
        model.blocks = unstack(model.blocks, config.layers)
    if is_quantized(model.blocks):
        warn_if_asked('own kernels take no products of one-byte numbers')
    elif drawing_kernels(config.dtype):
        from muse.models.fused import FusedLayers  # and with it Pallas, which is for nothing else here

        model.blocks = nnx.List([FusedLayers(model.blocks)])
    return model


def _superres_branches(superres: Superres, low_BT: Int[Array, 'B T'], batch: Batch, grid: Grid) -> Branches:
    """Logits of the super-res; on a canvas beyond its trained size from overlapping windows of that size.

    Each window is seen at the positions that were trained. Where windows overlap their logits are averaged, with a
    weight that falls towards a window's rim, so that no seam is left; all of them are drawn from in one decode.
    """
    branches = len(batch.len_GB)
    low_RT = jnp.repeat(low_BT, branches, axis=0)
    txt_RSD = _rows(jnp.tile(batch.txt_GBSD, (branches // len(batch.txt_GBSD), 1, 1, 1)))
    config, (rows, columns) = superres.config, superres.low_grid(grid)
    tiles = windows((rows, columns), config.low_grid, (grid[0] // rows, grid[1] // columns))
    if len(tiles.low_Wt) == 1:
        memory = superres.memory(low_RT, txt_RSD, grid)
        return lambda tok_RT, len_R: superres.logits(tok_RT, memory, len_R, grid)
    memories = jax.lax.map(lambda at_t: superres.memory(low_RT[:, at_t], txt_RSD, tiles.window), tiles.low_Wt)

    def logits(tok_RT, len_R):
        def add(total_RTV, slices):
            at_t, weight_t, memory = slices
            part_RtV = superres.logits(tok_RT[:, at_t], memory, len_R, tiles.window).astype(jnp.float32)
            return total_RTV.at[:, at_t].add(part_RtV * weight_t[:, None]), None

        nothing_RTV = jnp.zeros((*tok_RT.shape, config.codebook_size), jnp.float32)
        return jax.lax.scan(add, nothing_RTV, (tiles.high_Wt, tiles.weight_Wt, memories))[0]

    return logits


def _rows(x_GB: Array) -> Array:
    """The branches of a row side by side, so that rows stay where they are on a mesh that splits them."""
    x_BG = jnp.swapaxes(x_GB, 0, 1)
    return x_BG.reshape(-1, *x_BG.shape[2:])


def _guided(branch_logits: Branches, batch: Batch, program: Program) -> LogitsFn:
    """All G guidance branches of a row run as one batch of G · B (§2.7)."""
    branches, rows = batch.len_GB.shape

    def logits_fn(tok_BT, progress):
        logits_RTV = branch_logits(jnp.repeat(tok_BT, branches, axis=0), _rows(batch.len_GB))
        if branches == 1:
            return logits_RTV
        scale_B = scale_at(batch.guidance_B, progress, program.guidance_schedule, batch.interval)
        logits_GBTV = jnp.swapaxes(logits_RTV.reshape(rows, branches, *logits_RTV.shape[1:]), 0, 1)
        return guided_logits(logits_GBTV, cfg_weights(scale_B))

    return logits_fn


def _temperature(batch: Batch, steps: int) -> Float[Array, 'K B']:
    first_B, last_B = batch.temperature_2B
    return first_B + jnp.linspace(0, 1, steps)[:, None] * (last_B - first_B)


def _fill(
    branch_logits: Branches,
    canvas_BT: Int[Array, 'B T'],
    keep_BT: Bool[Array, 'B T'],
    keys_B: Key[Array, ' B'],
    batch: Batch,
    grid: Grid,
    program: Program,
) -> Int[Array, 'K B T']:
    match program.order:
        case 'halton':
            order_BT = jnp.broadcast_to(halton_order(grid).astype(np.float32), canvas_BT.shape)
        case 'random':
            order_BT = random_order(keys_B, canvas_BT.shape[1])
        case _:
            order_BT = None
    return decode_steps(
        _guided(branch_logits, batch, program),
        canvas_BT,
        keep_BT,
        keys_B,
        steps=program.steps,
        temperature=_temperature(batch, program.steps),
        choice_temperature=batch.choice_temperature,
        schedule=program.schedule,
        order_BT=order_BT,
        top_k=batch.top_k,
        top_p=batch.top_p,
    )


def sheet_batch(config: DecodeConfig, txt_BSD: Array, len_B: Array, seed: Array) -> Batch:
    """A guided batch for the sheets that training draws: no negative prompts, one seed, pictures by their row."""
    rows = len(len_B)
    none_B = jnp.zeros_like(len_B)
    return batch_of(config, txt_BSD[None], jnp.stack([len_B, none_B]), jnp.broadcast_to(seed, rows), np.arange(rows))
