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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

ROWS = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split
Axes = tuple[str | None, ...]
Init = Callable[..., Array]
BlockT = TypeVar('BlockT', bound=nnx.Module)
StateT = TypeVar('StateT')
_ALIGNED = 128

_fan_in = nnx.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def param(init: Init, rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 parameter of `shape` whose dimensions are named `axes` (None: never sharded)."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def mesh_split(size: int, *axes: str) -> tuple[str, ...] | None:
    """`axes`, where the mesh of `jax.set_mesh` has them and they split a dimension of `size` evenly; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = all(axis in mesh.axis_names for axis in axes) and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return axes if ours and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def platform() -> str:
    """'cpu', 'tpu' …: of the mesh of `jax.set_mesh`, which may be of chips that are not there; else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device is not None else None) or jax.default_backend()


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
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


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


class Embed(nnx.Module):
    """A table of vectors looked up by integer id, or by rows of weights over the ids.

    Weights ("soft one-hots", `[..., V]`) let a gradient flow through a choice of tokens.
    """

    def __init__(
        self, rows: int, features: int, *, rngs: nnx.Rngs, axes: Axes = ('vocab', 'embed'), stddev: float = 0.02
    ):
        self.table = param(nnx.initializers.normal(stddev), rngs, (rows, features), axes)

    def __call__(self, ids_or_weights: Array, dtype: Any = jnp.float32) -> Float[Array, '... D']:
        table_VD = self.table[...]
        if jnp.issubdtype(ids_or_weights.dtype, jnp.integer):
            with jax.named_scope('embed'):
                return take_rows(table_VD, ids_or_weights, dtype)
        return ids_or_weights.astype(dtype) @ table_VD[: ids_or_weights.shape[-1]].astype(dtype)


class MLP(nnx.Module):
    """Two-layer GELU perceptron without biases (tanh GELU)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, out_scale: float = 1.0):
        self.up = Linear(width, hidden, ('embed', 'mlp'), rngs=rngs)
        self.down = Linear(hidden, width, ('mlp', 'embed'), rngs=rngs, scale=out_scale)

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=True))


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
    """The layers of what `stack` returned, one by one.

    For a loop around `scan_layers` that takes no gradient (drawing): a layer's weights are then arrays of their own
    ahead of the loop, and are not copied out of the stack again in each of its steps.
    """
    graphdef, params = nnx.split(stacked, nnx.Param)
    return nnx.List([nnx.merge(graphdef, jax.tree.map(lambda x: x[i], params)) for i in range(layers)])  # noqa: B023


def cast_matrices(params: StateT, dtype: Any) -> StateT:
    """Kernels as `dtype`, everything else as it is: what a `Linear` does when applied, done once ahead of a loop.

    A step then reads half the bytes in bfloat16, and gradients of stacked layers are held in it. Results are the same:
    norms and tables stay float32 since they are used so.
    """

    def cast(path: Any, x: Array) -> Array:
        return x.astype(dtype) if any(getattr(key, 'key', None) == 'kernel' for key in path) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _keeps_dots(primitive: Any, *args: Any, **params: Any) -> bool:
    """Matrix products, and what cuDNN's attention leaves for its backward pass: it would be run again otherwise."""
    if primitive.name.startswith('dot_product_attention_fwd'):
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
        stacked: what `stack` returned; or what `unstack` made of it, and then `per_layer` is a list too.
        apply: (layer, x, extra) → x of the same shape and dtype.
        x: the carry.
        per_layer: pytree with a leading layers axis, one slice a layer, or None.
        remat: 'none', 'dots' (keep matrix products and attention, recompute the rest) or 'full' (recompute everything).
        unroll: layers a scan step.
    """
    if isinstance(stacked, nnx.List):
        for i, layer in enumerate(stacked):
            x = apply(layer, x, None if per_layer is None else per_layer[i])
        return x
    graphdef, params = nnx.split(stacked, nnx.Param)
    params = cast_matrices(params, x.dtype)

    def body(carry, slices):
        layer_params, extra = slices
        return apply(nnx.merge(graphdef, layer_params), split_rows(carry), extra), None

    if remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (params, per_layer), unroll=unroll)[0]
