"""Shared building blocks. Every parameter carries logical axes, which `muse.mesh` maps onto the device mesh.

Modules hold only `nnx.Param`, in float32, and cast to the compute dtype when applied. Repeated blocks are stacked
along a leading 'layers' axis and run with one `lax.scan`, so that compile time does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from muse.nn.attention_kernels import ATTENTION_KERNEL
from muse.nn.devices import ROWS, mesh_split
from muse.nn.norms import norm_after, norm_beside, rms_norm

Axes = tuple[str | None, ...]
Init = Callable[..., Array]
BlockT = TypeVar('BlockT', bound=nnx.Module)
StateT = TypeVar('StateT')
_ALIGNED = 128
_GELU_RATE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # of GELU by tanh

_fan_in = nnx.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def param(init: Init, rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 parameter of `shape` whose dimensions are named `axes` (None: never sharded)."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def split_rows(x: Array) -> Array:
    """Holds the rows (first axis) of an activation split over the mesh of `jax.set_mesh`; without one, x as it is.

    Left alone, the compiler may gather the rows and split the width instead, since the weights are split by width
    over 'fsdp': every device would then attend over the whole batch.
    """
    rows = mesh_split(x.shape[0], *ROWS)
    return x if rows is None else jax.lax.with_sharding_constraint(x, P(rows))


class Linear(nnx.Module):
    """y = x·W (+ b). `scale` multiplies the fan-in initialisation; 0 starts the layer at zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: Axes,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        scale: float = 1.0,
    ):
        init = nnx.initializers.variance_scaling(scale**2, 'fan_in', 'truncated_normal') if scale else _zeros
        self.kernel = param(init, rngs, (in_features, out_features), axes)
        self.bias = param(_zeros, rngs, (out_features,), axes[-1:]) if use_bias else None

    def __call__(self, x: Float[Array, '... in_']) -> Float[Array, '... out']:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _zeros(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    del key
    return jnp.zeros(shape, dtype)


def _ones(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    del key
    return jnp.ones(shape, dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, statistics in float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, axes: Axes = ('norm',), epsilon: float = 1e-6):
        self.scale = param(_ones, rngs, (features,), axes)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
        return rms_norm(x, self.scale[...], self.epsilon)

    def beside(self, x: Float[Array, '... D']) -> tuple[Float[Array, '... D'], Float[Array, '... D']]:
        """x as it is, and its norm: the stream and what a layer's first part reads of it."""
        return norm_beside(x, self.scale[...], self.epsilon)

    def after(
        self, x: Float[Array, '... D'], more: Float[Array, '... D']
    ) -> tuple[Float[Array, '... D'], Float[Array, '... D']]:
        """x + more, and its norm: the stream after one part of a layer, and what the next part reads of it."""
        return norm_after(x, more, self.scale[...], self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows(table_VD: Float[Array, 'V D'], ids: Array, dtype: Any = jnp.float32) -> Float[Array, '... D']:
    """Rows of a float32 table by id, as `dtype`. Their gradient is a one-hot matrix product instead of a scatter.

    Most tokens of a masked canvas are the same [MASK] row: a scatter's atomic adds collide on it, which took 18 % of
    a training step on a GPU. The product is of `dtype`, which the gradient comes in, and is summed in float32.
    """
    return table_VD[ids].astype(dtype)


def _take_rows_forward(table_VD, ids, dtype):
    return table_VD[ids].astype(dtype), (ids, table_VD)


def _take_rows_backward(dtype, residuals, grad):
    del dtype
    ids, table_VD = residuals
    rows = table_VD.shape[0]
    # A codebook and [MASK] are an odd number of rows, which matrix units take only in a slower way.
    one_hot = jax.nn.one_hot(ids.reshape(-1), rows + -rows % _ALIGNED, dtype=grad.dtype)
    grad_VD = jnp.einsum('nv,nd->vd', one_hot, grad.reshape(-1, grad.shape[-1]), preferred_element_type=jnp.float32)
    return grad_VD[:rows].astype(table_VD.dtype), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def look_up(table_VD: Float[Array, 'V D'], ids_or_weights: Array, dtype: Any) -> Float[Array, '... D']:
    """Rows of a float32 table by integer id, or sums of them by weights over the first ids, as `dtype`.

    Weights ("soft one-hots", `[..., V]`) let a gradient flow through a choice of tokens.
    """
    if jnp.issubdtype(ids_or_weights.dtype, jnp.integer):
        return take_rows(table_VD, ids_or_weights, dtype)
    return ids_or_weights.astype(dtype) @ table_VD[: ids_or_weights.shape[-1]].astype(dtype)


class Embed(nnx.Module):
    """A table of vectors; see `look_up`."""

    def __init__(
        self, rows: int, features: int, *, rngs: nnx.Rngs, axes: Axes = ('vocab', 'embed'), stddev: float = 0.02
    ):
        self.table = param(nnx.initializers.normal(stddev), rngs, (rows, features), axes)

    def __call__(self, ids_or_weights: Array, dtype: Any = jnp.float32) -> Float[Array, '... D']:
        with jax.named_scope('embed'):
            return look_up(self.table[...], ids_or_weights, dtype)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GELU by tanh. For its gradient x alone is kept, and one pass over it makes the gradient, in float32."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, grad):
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_GELU_RATE * (x32 + _GELU_CUBE * x32**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x32 * (1 - tanh**2) * _GELU_RATE * (1 + 3 * _GELU_CUBE * x32**2)
    return ((grad.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class MLP(nnx.Module):
    """Two-layer GELU perceptron without biases (tanh GELU)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, out_scale: float = 1.0):
        self.up = Linear(width, hidden, ('embed', 'mlp'), rngs=rngs)
        self.down = Linear(hidden, width, ('mlp', 'embed'), rngs=rngs, scale=out_scale)

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        return self.down(gelu(self.up(x_BTD)))


def stack(make: Callable[[nnx.Rngs], BlockT], layers: int, *, rngs: nnx.Rngs) -> BlockT:
    """One module whose parameters hold `layers` independent copies of `make`'s along a leading 'layers' axis."""
    graphdef, template = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))), nnx.Param)

    def values(key: Array) -> list[Array]:
        return jax.tree.leaves(nnx.split(make(nnx.Rngs(params=key)), nnx.Param)[1])

    stacked = jax.vmap(values)(jax.random.split(rngs.params(), layers))
    structure = jax.tree.structure(template)
    params = jax.tree.unflatten(structure, stacked)

    def with_layer_axis(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(axes=('layers', *variable.get_metadata()['axes']))

    params = jax.tree.map(with_layer_axis, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graphdef, params)


def unstack(stacked: BlockT, layers: int) -> nnx.List[BlockT]:
    """The layers of what `stack` returned, one by one; `cast_matrices` belongs ahead of it.

    A layer's weights are then arrays of their own: a loop around `scan_layers` (drawing) does not copy them out of the
    stack again in each of its steps, and where a gradient is taken of them (`restack`) nothing that is kept for the
    backward pass, and no gradient, is copied into stacks and out of them.
    """
    graphdef, params = nnx.split(stacked, nnx.Param)
    return nnx.List([nnx.merge(graphdef, jax.tree.map(lambda x: x[i], params)) for i in range(layers)])  # noqa: B023


def restack(apart: nnx.State, stacked: nnx.State) -> nnx.State:
    """Values of a model whose stacks were taken apart by `unstack`, in the form and the types of `stacked`."""
    values = dict(nnx.to_flat_state(apart))

    def joined(path: tuple[Any, ...], like: nnx.Variable) -> nnx.Variable:
        if path in values:
            value = values[path][...]
        else:
            value = _stack([values[(path[0], i, *path[1:])][...] for i in range(like.shape[0])])
        return like.replace(value.astype(like.dtype))

    return nnx.from_flat_state([(path, joined(path, like)) for path, like in nnx.to_flat_state(stacked)])


def _stack(values: list[Array]) -> Array:
    """`jnp.stack`, each value copied to its place as soon as it is known, ahead of whatever reads the stack.

    XLA writes no stack where it can put the choice of a value into each reader: on a GPU an optimiser that looks every
    element up in one of 36 arrays ran at a third of the speed of memory.
    """
    found = jnp.zeros((len(values), *values[0].shape), values[0].dtype)
    for i, value in enumerate(values):
        found = jax.lax.dynamic_update_index_in_dim(found, value, i, 0)
    return jax.lax.optimization_barrier(found)


def cast_matrices(params: StateT, dtype: Any) -> StateT:
    """Kernels as `dtype`, everything else as it is: what a `Linear` does when applied, done once ahead of a loop.

    A step then reads half the bytes in bfloat16, and gradients of stacked layers are held in it. Results are the same:
    norms and tables stay float32 since they are used so.
    """

    def cast(path: Any, x: Array) -> Array:
        return x.astype(dtype) if any(getattr(key, 'key', None) == 'kernel' for key in path) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _keeps_dots(primitive: Any, *args: Any, **params: Any) -> bool:
    """Matrix products, and what attention leaves for its backward pass: it would be run again otherwise."""
    if primitive.name.startswith('dot_product_attention_fwd') or params.get('name') == ATTENTION_KERNEL:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


REMAT_POLICIES = {'dots': _keeps_dots, 'full': jax.checkpoint_policies.nothing_saveable}


def scan_layers(
    stacked: nnx.Module,
    apply: Callable[..., Array],
    x: Array,
    *,
    per_layer: Any = None,
    remat: str = 'none',
    unroll: int = 1,
) -> Array:
    """Runs x through a stack of layers: x ← apply(layer, x, per_layer[i]) for each layer in turn.

    Args:
        stacked: what `stack` returned; or what `unstack` made of it, cast, and then `per_layer` is a list too.
        apply: (layer, x, extra) → x of the same shape and dtype.
        x: the carry.
        per_layer: pytree with a leading layers axis, one slice a layer, or None.
        remat: 'none', 'dots' (keep matrix products and attention, recompute the rest) or 'full' (recompute everything).
        unroll: layers a scan step.
    """
    if isinstance(stacked, nnx.List):
        return _run_apart(stacked, apply, x, per_layer, remat)
    graphdef, params = nnx.split(stacked, nnx.Param)
    params = cast_matrices(params, x.dtype)

    def body(carry, slices):
        layer_params, extra = slices
        return apply(nnx.merge(graphdef, layer_params), split_rows(carry), extra), None

    if remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (params, per_layer), unroll=unroll)[0]


def _run_apart(stacked, apply, x, per_layer, remat):
    """`scan_layers` without a loop.

    Without the border of a loop the compiler would find the recomputation to be what the forward pass did, and keep
    that: `prevent_cse` forbids it.
    """
    for i, layer in enumerate(stacked):
        extra, x = None if per_layer is None else per_layer[i], split_rows(x)
        if remat == 'none':
            x = apply(layer, x, extra)
            continue
        graphdef, params = nnx.split(layer, nnx.Param)

        def run(params, x, extra, graphdef=graphdef):
            return apply(nnx.merge(graphdef, params), x, extra)

        x = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=True)(params, x, extra)
    return x
