"""Matrix products of a transformer layer with what surrounds them inside, for drawing on an NVIDIA GPU (§2.8).

Nothing here takes a gradient. A layer's norms, head norms, GELU and additions are passes over memory of their own when
the compiler writes them; here they are part of the product that follows or precedes them, in one of three shapes:

    normed_heads   norm → product → norm of each head           queries (, keys, values)
    normed_gelu    norm → product → GELU                        the MLP's way up
    add_product    stream + product (or a constant)             every way back into the stream

A norm is two numbers: its scale, which the caller folds into the kernel's rows, and each row's root mean square, which
multiplies the product. Its sum of squares comes from whoever wrote the row: `Stream` carries it along.

Each function takes `Tiles`, and then is one Triton kernel; or None, and then it is what XLA makes of the same formula.
`tiles_for` says which, by shape alone. Differences from a layer without any of this, in bfloat16 only: the norm's scale
is rounded into the kernel instead of into the row, the row's root mean square is applied after the product, and GELU is
computed in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from muse.nn.devices import is_hopper, platform, warn_if_asked

Kind = Literal['heads', 'gelu', 'add']


class Tiles(NamedTuple):
    """How a kernel cuts its work: a block makes `rows × columns` of the result, `depth` of the inner axis a step."""

    rows: int
    columns: int
    depth: int
    stages: int  # steps whose operands are on their way at a time
    warps: int


class Stream(NamedTuple):
    """The residual stream, and the sum of squares of each of its rows as P parts to be added up."""

    x_MD: Float[Array, 'M D']
    squares_PM: Float[Array, 'P M']


class Readers(NamedTuple):
    """Which rows of a stream take part: the first of each `every` runs of `tokens` rows."""

    tokens: int
    every: int


def stream_of(x_MD: Float[Array, 'M D']) -> Stream:
    """A stream at its beginning."""
    return Stream(x_MD, _squares(x_MD))


def _squares(x_MD):
    return jnp.sum(jnp.square(x_MD.astype(jnp.float32)), axis=1)[None]


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


class Product(NamedTuple):
    """What tiles are chosen by: the product in a call of one of the three functions."""

    kind: Kind
    m: int  # rows of the result
    k: int
    n: int
    run: int  # rows that belong together: `Readers.tokens`, or all
    head: int = 1
    parts: int = 1

    @property
    def flops(self) -> float:
        """Operations, where all rows take part."""
        return 2.0 * self.m * self.k * self.n


def fits(tiles: Tiles, product: Product) -> bool:
    """Whether tiles cut a product evenly."""
    m, k, n, run, head, parts = product[1:]
    even = m % tiles.rows == run % tiles.rows == k % tiles.depth == n // parts % tiles.columns == 0
    return even and tiles.columns % head == 0


def blocks(tiles: Tiles, product: Product) -> int:
    """Thread blocks of a kernel."""
    return product.m // tiles.rows * (product.n // tiles.columns)


# Found by `tools/bench.py linear` on an H100 where they differ from the rule of `tiles_for`.
TUNED: dict[Product, Tiles | None] = {}

_LARGEST = 1024  # rows from which cuBLAS' products gain more than what is fused here saves
_LONGEST = 2048  # inner size from which a product of few rows is better split along it, as cuBLAS does
_BLOCKS = 96  # a GPU of 132 multiprocessors should have about so many blocks at least
_CANDIDATES = (Tiles(128, 128, 64, 4, 8), Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 64, 4, 4))
_SMALL = _CANDIDATES[2:]  # operands of 64 KiB: most chips but a Hopper have shared memory for no more


def tiles_for(product: Product, dtype: Any) -> Tiles | None:
    """The tiles of a product on this GPU; None: XLA's own is used.

    The largest that cut it evenly into enough blocks to fill the chip, or the most blocks.
    """
    if dtype != jnp.bfloat16:
        return None
    if product in TUNED:
        return TUNED[product]
    fitting = [tiles for tiles in (_CANDIDATES if is_hopper() else _SMALL) if fits(tiles, product)]
    if not fitting:
        warn_if_asked(f'no own kernel cuts products of {product.m}x{product.k}x{product.n} for heads of {product.head}')
    if not fitting or product.m > _LARGEST or product.k > _LONGEST:
        return None
    full = [tiles for tiles in fitting if blocks(tiles, product) >= _BLOCKS]
    return full[0] if full else fitting[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The three products


def normed_heads(
    stream: Stream,
    kernel_KN: Float[Array, 'K N'],
    scale_N: Float[Array, ' N'],
    *,
    parts: int,
    normed: int,
    head: int,
    epsilon: float,
    readers: Readers | None = None,
    tiles: Tiles | None,
) -> list[Float[Array, 'M2 W']]:
    """Projections of a normed stream, cut into heads that are normed themselves.

    Args:
        stream: M rows of width K.
        kernel_KN: `parts` projections of N / parts columns side by side, the norm's scale in their rows.
        scale_N: float32 scale of the head norms; 1 for parts without.
        parts, normed: how many projections there are, and how many of them, from the first on, have head norms.
        head: columns of a head.
        epsilon: of all norms.
        readers: which rows are projected; None: all.
        tiles: see the module.
    """
    if tiles is None:
        x_MK, inverse_M1 = _read(stream, readers, epsilon)
        y_MN = ((x_MK @ kernel_KN).astype(jnp.float32) * inverse_M1).astype(x_MK.dtype)
        columns = normed * (kernel_KN.shape[1] // parts)
        z_MN = _normed(y_MN[:, :columns], head, epsilon) * scale_N[:columns]
        each = jnp.split(z_MN.astype(x_MK.dtype), normed, axis=1)
        return [*each, *(jnp.split(y_MN[:, columns:], parts - normed, axis=1) if parts > normed else ())]
    m, k = stream.x_MD.shape
    n = kernel_KN.shape[1]
    m = m if readers is None else m // readers.every
    of_part = n // parts // tiles.columns

    def columns_of(part: int) -> Any:
        # Blocks of other parts are given a block of this one's that they leave alone.
        return lambda i, j: (i, jnp.clip(j - part * of_part, 0, of_part - 1))

    projected = _call(
        partial(_heads_kernel, depth=tiles.depth, epsilon=epsilon, head=head, normed=normed, of_part=of_part),
        tiles,
        (m, n),
        inputs=[*_stream_inputs(stream, readers, tiles), _kernel_input(kernel_KN, tiles), _row_input(scale_N, tiles)],
        outputs=[
            (jax.ShapeDtypeStruct((m, n // parts), stream.x_MD.dtype), (tiles.rows, tiles.columns), columns_of(part))
            for part in range(parts)
        ],
        flops=2 * m * k * n,
    )
    return list(projected)


def normed_gelu(
    stream: Stream, kernel_KN: Float[Array, 'K N'], *, epsilon: float, tiles: Tiles | None
) -> Float[Array, 'M N']:
    """The tanh GELU of a product of a normed stream; `kernel_KN` has the norm's scale in its rows."""
    (m, k), n = stream.x_MD.shape, kernel_KN.shape[1]
    if tiles is None:
        x_MK, inverse_M1 = _read(stream, None, epsilon)
        y_MN = ((x_MK @ kernel_KN).astype(jnp.float32) * inverse_M1).astype(x_MK.dtype)
        return _gelu(y_MN.astype(jnp.float32)).astype(y_MN.dtype)
    out = jax.ShapeDtypeStruct((m, n), stream.x_MD.dtype)
    return _call(
        partial(_gelu_kernel, depth=tiles.depth, epsilon=epsilon),
        tiles,
        (m, n),
        inputs=[*_stream_inputs(stream, None, tiles), _kernel_input(kernel_KN, tiles)],
        outputs=[(out, (tiles.rows, tiles.columns), lambda i, j: (i, j))],
        flops=2 * m * k * n,
    )[0]


def add_product(
    stream: Stream,
    y_MK: Float[Array, 'M2 K'],
    kernel_KN: Float[Array, 'K N'],
    *,
    nothing_N: Float[Array, ' N'] | None = None,
    readers: Readers | None = None,
    tiles: Tiles | None,
) -> Stream:
    """A stream plus the product of its readers' rows `y_MK`; the other rows get the constant `nothing_N` instead."""
    x_MN = stream.x_MD
    m, n = x_MN.shape
    if tiles is None:
        z_MN = y_MK @ kernel_KN
        if readers is not None and nothing_N is not None:
            z_GTN = z_MN.reshape(-1, 1, readers.tokens, n)
            first = (jnp.arange(readers.every) == 0)[:, None, None]
            z_MN = jnp.where(first, z_GTN, nothing_N).reshape(m, n)
        x_MN = x_MN + z_MN
        return Stream(x_MN, _squares(x_MN))
    k = y_MK.shape[1]
    across = (tiles.rows, tiles.columns), lambda i, j: (i, j)
    parts = n // tiles.columns
    inputs = [(y_MK, (tiles.rows, k), _own_rows(readers, tiles)), _kernel_input(kernel_KN, tiles), (x_MN, *across)]
    if nothing_N is not None:
        inputs.append(_row_input(nothing_N, tiles))
    every, blocks_a_run = (1, 1) if readers is None else (readers.every, readers.tokens // tiles.rows)
    out, squares_PM = _call(
        partial(_add_kernel, depth=tiles.depth, every=every, blocks_a_run=blocks_a_run),
        tiles,
        (m, n),
        inputs=inputs,
        outputs=[
            (jax.ShapeDtypeStruct((m, n), x_MN.dtype), *across),
            (jax.ShapeDtypeStruct((parts, m), jnp.float32), (None, tiles.rows), lambda i, j: (j, i)),
        ],
        flops=2 * y_MK.shape[0] * k * n,
    )
    return Stream(out, squares_PM)


def _read(stream, readers, epsilon):
    """The rows that take part, and one over their root mean square."""
    x_MK, squares_M = stream.x_MD, jnp.sum(stream.squares_PM, axis=0)
    k = x_MK.shape[1]
    if readers is not None:
        x_MK = x_MK.reshape(-1, readers.every, readers.tokens, k)[:, 0].reshape(-1, k)
        squares_M = squares_M.reshape(-1, readers.every, readers.tokens)[:, 0].reshape(-1)
    return x_MK, jax.lax.rsqrt(squares_M / k + epsilon)[:, None]


def _normed(y_MN, head, epsilon):
    """Each head over its root mean square, float32, not yet scaled."""
    y_MNH = y_MN.astype(jnp.float32).reshape(y_MN.shape[0], -1, head)
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(y_MNH), axis=2, keepdims=True) / head + epsilon)
    return (y_MNH * inverse).reshape(y_MN.shape)


def _gelu(x):
    """tanh GELU, written by the exponential: x · sigmoid(2 u), which a GPU has an instruction for."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x / (1 + jnp.exp(-2 * u))


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def _call(kernel, tiles, shape, *, inputs, outputs, flops):
    """A kernel over blocks of the result's rows and columns. Of inputs and outputs: array, block, block's place."""
    from jax.experimental.pallas import triton

    arrays, blocks_in, places_in = zip(*inputs, strict=True)
    shapes, blocks_out, places_out = zip(*outputs, strict=True)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes))
    return pl.pallas_call(
        kernel,
        grid=(shape[0] // tiles.rows, shape[1] // tiles.columns),
        in_specs=[pl.BlockSpec(block, place) for block, place in zip(blocks_in, places_in, strict=True)],
        out_specs=[pl.BlockSpec(block, place) for block, place in zip(blocks_out, places_out, strict=True)],
        out_shape=list(shapes),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=platform() == 'cpu',
    )(*arrays)


def _stream_inputs(stream, readers, tiles):
    (_, k), parts, row = stream.x_MD.shape, stream.squares_PM.shape[0], _stream_rows(readers, tiles)
    return [
        (stream.x_MD, (tiles.rows, k), lambda i, j: (row(i), 0)),
        (stream.squares_PM, (parts, tiles.rows), lambda i, j: (0, row(i))),
    ]


def _kernel_input(kernel_KN, tiles):
    return kernel_KN, (kernel_KN.shape[0], tiles.columns), lambda i, j: (0, j)


def _row_input(row_N, tiles):
    return row_N, (tiles.columns,), lambda i, j: (j,)


def _stream_rows(readers, tiles):
    """Where in the stream the readers' block i lies."""
    if readers is None:
        return lambda i: i
    run = readers.tokens // tiles.rows
    return lambda i: jax.lax.div(i, run) * (run * readers.every) + jax.lax.rem(i, run)


def _own_rows(readers, tiles):
    """Where among the readers' rows the stream's block i lies (any block for those that do not read)."""
    if readers is None:
        return lambda i, j: (i, 0)
    run = readers.tokens // tiles.rows
    return lambda i, j: (jax.lax.div(i, run * readers.every) * run + jax.lax.rem(i, run), 0)


def _product(x_ref, kernel_ref, depth):
    """The product of a block's rows and columns in float32."""

    def step(i, sum_RC):
        at = pl.ds(i * depth, depth)
        return sum_RC + jnp.dot(x_ref[:, at], kernel_ref[at, :], preferred_element_type=jnp.float32)

    nothing_RC = jnp.zeros((x_ref.shape[0], kernel_ref.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, x_ref.shape[1] // depth, step, nothing_RC)


def _normed_product(x_ref, squares_ref, kernel_ref, depth, epsilon):
    """… of normed rows, rounded as a `Linear` rounds, and float32 again."""
    inverse_R = jax.lax.rsqrt(jnp.sum(squares_ref[...], axis=0) / x_ref.shape[1] + epsilon)
    y_RC = _product(x_ref, kernel_ref, depth) * inverse_R[:, None]
    return y_RC.astype(x_ref.dtype).astype(jnp.float32)


def _heads_kernel(x_ref, squares_ref, kernel_ref, scale_ref, *out_refs, depth, epsilon, head, normed, of_part):
    y_RC = _normed_product(x_ref, squares_ref, kernel_ref, depth, epsilon)
    part = jax.lax.div(pl.program_id(1), of_part)
    z_RC = _normed(y_RC, head, epsilon)
    if normed < len(out_refs):
        z_RC = jnp.where(part < normed, z_RC, y_RC)
    z_RC = (z_RC * scale_ref[...][None, :]).astype(x_ref.dtype)
    for i, out_ref in enumerate(out_refs):

        @pl.when(part == i)
        def _(out_ref=out_ref):
            out_ref[...] = z_RC


def _gelu_kernel(x_ref, squares_ref, kernel_ref, out_ref, *, depth, epsilon):
    y_RC = _normed_product(x_ref, squares_ref, kernel_ref, depth, epsilon)
    out_ref[...] = _gelu(y_RC).astype(out_ref.dtype)


def _add_kernel(y_ref, kernel_ref, x_ref, *refs, depth, every, blocks_a_run):
    *nothing_refs, out_ref, squares_ref = refs
    if every == 1:
        z_RC = _product(y_ref, kernel_ref, depth)
    else:
        reads = jax.lax.rem(jax.lax.div(pl.program_id(0), blocks_a_run), every) == 0
        nothing_RC = jnp.broadcast_to(nothing_refs[0][...][None, :].astype(jnp.float32), x_ref.shape)
        z_RC = jax.lax.cond(reads, lambda: _product(y_ref, kernel_ref, depth), lambda: nothing_RC)
    new_RC = (x_ref[...].astype(jnp.float32) + z_RC.astype(x_ref.dtype).astype(jnp.float32)).astype(x_ref.dtype)
    out_ref[...] = new_RC
    squares_ref[...] = jnp.sum(jnp.square(new_RC.astype(jnp.float32)), axis=1)
