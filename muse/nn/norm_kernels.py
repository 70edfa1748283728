"""GPU kernels of the norms: a sum and its norm in one pass over memory, and their gradients in another.

XLA takes two to three passes each: sums along rows, sums along columns and what is made of them are kernels of their
own. A program of the kernel holds a few whole rows at a time; the scale's gradient is summed within each program, and
over the programs afterwards.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from muse.nn.devices import ROWS, gpu_kernels, mesh_split, platform

_WIDTHS = (32, 4096)


class Tiling(NamedTuple):
    """`elements` that a program holds at a time, of which each thread of its `warps` has a share; how many such `tiles`
    it goes through."""

    elements: int
    warps: int
    tiles: int

    def rows(self, width: int) -> int:
        """Of a tile: whole ones."""
        return max(self.elements // width, 1)


FORWARD = Tiling(4096, 4, 1)  # held at once: one tile
BACKWARD = Tiling(4096, 4, 8)


def takes(x: Float[Array, '... D']) -> bool:
    """Whether the kernels are to be used: where they are asked for, and each device's rows are whole tiles."""
    if not gpu_kernels():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return (mesh.empty or mesh.size == 1 or mesh_split(x.shape[0], *ROWS) is not None) and fits(x)


def fits(x: Float[Array, '... D']) -> bool:
    """Whether each device's rows of x are whole tiles, and their width is a power of two."""
    width, (_, axes) = x.shape[-1], _split(x)
    rows = x.size // width // math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    whole = all(rows % tiling.rows(width) == 0 for tiling in (FORWARD, BACKWARD))
    return width & (width - 1) == 0 and _WIDTHS[0] <= width <= _WIDTHS[1] and whole


def _split(x: Array) -> tuple[P, tuple[str, ...]]:
    """How the mesh of `jax.set_mesh` splits rows `[B, …, D]`, or heads `[B, T, N, H]`; and its axes that do."""
    rows = (mesh_split(x.shape[0], *ROWS) if x.ndim > 1 else None) or ()
    heads = (mesh_split(x.shape[2], 'tensor') if x.ndim == 4 else None) or ()
    return P(rows or None, None, heads or None) if x.ndim == 4 else P(rows or None), (*rows, *heads)


def forward(x: Array, more: Array | None, scale_D: Array, epsilon: float) -> tuple[Array, Array]:
    """(x + more, its norm), as `muse.nn.norms.norm_after`; without `more`, (x, its norm)."""
    given = (x,) if more is None else (x, more)
    found = _each_device(partial(_forward, epsilon=epsilon), x, given, (scale_D,), (False,) * len(given))
    return (x, found[0]) if more is None else found


def backward(
    x: Array, scale_D: Array, grad: Array, stream_grad: Array | None, epsilon: float
) -> tuple[Array, Float[Array, ' D']]:
    """Gradients of x and of the scale. `grad` is the norm's; `stream_grad` is what x itself gets, or None."""
    given = (x, grad) if stream_grad is None else (x, grad, stream_grad)
    grad_x, parts_PD = _each_device(partial(_backward, epsilon=epsilon), x, given, (scale_D,), (False, True))
    return grad_x, jnp.sum(parts_PD, axis=0).astype(scale_D.dtype)


def _each_device(run: Any, x: Array, split: tuple, whole: tuple, parts: tuple[bool, ...]) -> Any:
    """`run` on each device's part of the mesh of `jax.set_mesh`: the compiler cannot split a kernel.

    `split` are arrays of the shape of x, `whole` others. Results are of the shape of x, or (`parts`) rows of sums.
    """
    spec, axes = _split(x)
    if not axes:
        return run(*split, *whole)
    in_specs = (*(spec for _ in split), *(P() for _ in whole))
    out_specs = tuple(P(axes) if part else spec for part in parts)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*split, *whole)


def _call(kernel: Any, inputs: tuple, scale_D: Array, tiling: Tiling, outputs: int, parts: bool) -> Any:
    """A kernel over blocks of tiles of all `inputs`, which have one shape."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    x = inputs[0]
    width = x.shape[-1]
    rows = x.size // width
    block = tiling.tiles * tiling.rows(width)
    programs = rows // block
    by_rows = pl.BlockSpec((block, width), lambda i: (i, 0))
    out_shape, out_specs = [jax.ShapeDtypeStruct((rows, width), x.dtype)] * outputs, [by_rows] * outputs
    if parts:
        out_shape.append(jax.ShapeDtypeStruct((programs, width), jnp.float32))
        out_specs.append(pl.BlockSpec((None, width), lambda i: (i, 0)))
    found = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[*([by_rows] * len(inputs)), pl.BlockSpec((width,), lambda i: (0,))],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=1),
        interpret=platform() == 'cpu',
    )(*(each.reshape(rows, width) for each in inputs), scale_D)
    return *(each.reshape(x.shape) for each in found[:outputs]), *found[outputs:]


@partial(jax.jit, static_argnames='epsilon')  # so that all layers are lowered once
def _forward(*given: Array, epsilon: float) -> Any:
    *inputs, scale_D = given
    added = len(inputs) > 1

    def kernel(*refs: Any) -> None:
        scale = refs[len(inputs)][...]  # ahead of what is stored, behind which it would wait
        total = refs[0][...]
        if added:
            total = total + refs[1][...]
            refs[-2][...] = total
        total32 = total.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(total32 * total32, axis=-1, keepdims=True) + epsilon)
        refs[-1][...] = (total32 * inverse * scale).astype(total.dtype)

    return _call(kernel, tuple(inputs), scale_D, FORWARD, len(inputs), parts=False)


@partial(jax.jit, static_argnames='epsilon')  # so that all layers are lowered once
def _backward(*given: Array, epsilon: float) -> Any:
    *inputs, scale_D = given
    width = inputs[0].shape[-1]
    rows_a_tile = BACKWARD.rows(width)
    tiles = math.gcd(BACKWARD.tiles, inputs[0].size // width // rows_a_tile)

    def kernel(*refs: Any) -> None:
        from jax.experimental import pallas as pl

        x_ref, grad_ref, out_ref, part_ref = refs[0], refs[1], refs[-2], refs[-1]
        scale = refs[len(inputs)][...]

        def one(i: Array, part: Array) -> Array:
            tile = pl.ds(i * rows_a_tile, rows_a_tile)
            x, grad = x_ref[tile, :].astype(jnp.float32), grad_ref[tile, :].astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
            scaled = grad * scale
            along = jnp.mean(scaled * x, axis=-1, keepdims=True) * inverse * inverse
            grad_x = inverse * (scaled - x * along)
            if len(inputs) > 2:
                grad_x = grad_x + refs[2][tile, :].astype(jnp.float32)
            out_ref[tile, :] = grad_x.astype(out_ref.dtype)
            return part + grad * x * inverse

        nothing = jnp.zeros((rows_a_tile, width), jnp.float32)
        part_ref[...] = jnp.sum(jax.lax.fori_loop(0, tiles, one, nothing), axis=0)

    return _call(kernel, tuple(inputs), scale_D, BACKWARD._replace(tiles=tiles), 1, parts=True)
