"""Ways of doing one thing differently, for the benches: settings of the model, and patches of the code.

What a variant undoes is what the code does now, and why it does; what it does anew is a candidate. docs/performance.md
holds what each was found to bring.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from muse import drawing, masking
from muse.models import transformer
from muse.nn import attention, layers
from muse.train import masked

Undo = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """`config` are settings of the model, `train` of the training loop, `patches` names of functions here."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches: tuple[str, ...] = ()


def _set(owner: Any, name: str, value: Any) -> Undo:
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


def _all(undo: Sequence[Undo]) -> Undo:
    def every() -> None:
        for each in undo:
            each()

    return every


def _full_null() -> Undo:
    """The unconditional branch attends to its null like any other memory."""
    branches = drawing._base_branches

    def tiled(params: Any, graph: Any, grid: Any, batch: drawing.Batch) -> Any:
        txt_GBSD = jnp.tile(batch.txt_GBSD, (len(batch.len_GB) // len(batch.txt_GBSD), 1, 1, 1))
        return branches(params, graph, grid, batch._replace(txt_GBSD=txt_GBSD))

    return _set(drawing, '_base_branches', tiled)


def _packed_qkv() -> Undo:
    """One matrix product makes queries, keys and values."""

    def projected(self: Any, x_BTD: Any) -> tuple[Any, Any, Any]:
        kernels = (self.query.kernel, self.key.kernel, self.value.kernel)
        packed = jnp.concatenate([kernel[...].astype(x_BTD.dtype) for kernel in kernels], axis=1)
        return tuple(jnp.split(x_BTD @ packed, 3, axis=-1))  # pyright: ignore[reportReturnType]

    return _set(attention, 'project', projected)


def _prepacked_qkv() -> Undo:
    """As 'packed', the kernels joined once ahead of the steps (drawing only)."""
    merged = drawing._merged

    def prepacked(graph: Any, params: Any) -> Any:
        model = merged(graph, params)
        for blocks in model.blocks if isinstance(model.blocks, nnx.List) else (model.blocks,):
            own = blocks.self_attention
            kernels = [part.kernel[...] for part in (own.query, own.key, own.value)]
            own.query.kernel = own.query.kernel.replace(jnp.concatenate(kernels, axis=-1))
        return model

    def projected(self: Any, x_BTD: Any) -> tuple[Any, ...]:
        width = x_BTD.shape[-1]
        if self.query.kernel.shape[-1] == width:  # the layers over low-res tokens
            return self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        return tuple(jnp.split(self.query(x_BTD), 3, axis=-1))

    return _all((_set(drawing, '_merged', prepacked), _set(attention, 'project', projected)))


def _xla_blocks() -> Undo:
    """Multi-axis attention over its 64 keys without a kernel."""
    call = attention.MultiAxisAttention.__call__

    def plain(self: Any, x_BTD: Any) -> Any:
        self.backend = 'xla'
        return call(self, x_BTD)

    return _set(attention.MultiAxisAttention, '__call__', plain)


def _scatter_embedding() -> Undo:
    """The gradient of a table is a scatter."""
    return _set(layers, 'take_rows', lambda table_VD, ids, dtype=jnp.float32: table_VD[ids].astype(dtype))


def _float32_embedding() -> Undo:
    """The gradient of a table is a float32 one-hot product."""
    take: Any = layers.take_rows
    return _set(layers, 'take_rows', lambda table_VD, ids, dtype: take(table_VD, ids, jnp.float32).astype(dtype))


def _plain_ce() -> Undo:
    """The loss' gradient is derived by JAX."""

    def derived(logits_BTV: Any, tok_BT: Any, smoothing: float) -> Any:
        logits_BTV = logits_BTV.astype(jnp.float32)
        nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tok_BT)
        uniform_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.mean(logits_BTV, axis=-1)
        return (1 - smoothing) * nats_BT + smoothing * uniform_BT

    return _set(masking, 'smoothed_ce', derived)


def _cast_each() -> Undo:
    """Each layer casts its own weights, in the forward pass and again in the backward pass."""
    return _all([_set(module, 'cast_matrices', lambda params, dtype: params) for module in (layers, transformer)])


def _policy(policy: Callable[..., bool]) -> Undo:
    old = layers.REMAT_POLICIES['dots']
    layers.REMAT_POLICIES['dots'] = policy
    return lambda: layers.REMAT_POLICIES.update(dots=old)


def _dots_alone() -> Undo:
    """Matrix products are kept, attention is run again in the backward pass."""
    return _policy(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def _is_attention(primitive: Any) -> bool:
    return primitive.name.startswith('dot_product_attention_fwd')


def _no_hidden() -> Undo:
    """As 'dots', but the MLP's hidden units, the largest of what is kept, are made again."""

    def keep(primitive: Any, *args: Any, **params: Any) -> bool:
        if primitive.name == 'dot_general' and args[1].shape[-1] > args[1].shape[0]:
            return False
        return layers._keeps_dots(primitive, *args, **params)

    return _policy(keep)


def _attention_alone() -> Undo:
    """Only what attention leaves is kept."""
    return _policy(lambda primitive, *args, **params: _is_attention(primitive))


def _no_average() -> Undo:
    """No moving average of the weights: what it costs."""
    return _set(masked, 'update_ema', lambda ema, params, step, decay: ema)


def _no_norms() -> Undo:
    """No norms among the metrics: what they cost."""
    return _set(masked, 'step_metrics', lambda *args: {})


def _no_accuracy() -> Undo:
    """No accuracy among the metrics: what it costs."""
    return _set(masking, 'masked_accuracy', lambda logits_BTV, tok_BT, mask_BT: jnp.zeros(tok_BT.shape[0]))


PATCHES: dict[str, Callable[[], Undo]] = {
    'full_null': _full_null,
    'packed_qkv': _packed_qkv,
    'prepacked_qkv': _prepacked_qkv,
    'xla_blocks': _xla_blocks,
    'scatter_embedding': _scatter_embedding,
    'float32_embedding': _float32_embedding,
    'plain_ce': _plain_ce,
    'cast_each': _cast_each,
    'dots_alone': _dots_alone,
    'no_hidden': _no_hidden,
    'attention_alone': _attention_alone,
    'no_average': _no_average,
    'no_norms': _no_norms,
    'no_accuracy': _no_accuracy,
}
_UNROLLED = {
    f'unroll_{layers}': Variant(config={'unroll': layers}) for layers in (2, 4, 6, 8, 12, 16, 18, 24, 32, 36, 48)
}
DRAWING_VARIANTS: dict[str, Variant] = {
    'now': Variant(),
    'xla_attention': Variant(config={'attention': 'xla'}),
    **{name: Variant(patches=(name,)) for name in ('full_null', 'prepacked_qkv', 'packed_qkv', 'xla_blocks')},
    **_UNROLLED,
}
TRAINING_VARIANTS: dict[str, Variant] = {
    'now': Variant(),
    'xla_attention': Variant(config={'attention': 'xla'}),
    'dots': Variant(config={'remat': 'dots'}),
    'full': Variant(config={'remat': 'full'}),
    'none': Variant(config={'remat': 'none'}),
    **{f'accumulate_{n}': Variant(train={'accumulate': n}) for n in (2, 4, 8)},
    **{name: Variant(patches=(name,)) for name in PATCHES if name not in ('full_null', 'prepacked_qkv')},
    'no_hidden': Variant(config={'remat': 'dots'}, patches=('no_hidden',)),
    'attention_alone': Variant(config={'remat': 'dots'}, patches=('attention_alone',)),
    'dots_alone': Variant(config={'remat': 'dots'}, patches=('dots_alone',)),
    **_UNROLLED,
}


@contextlib.contextmanager
def patched(names: Sequence[str]) -> Iterator[None]:
    """The code with some patches in it."""
    undo = [PATCHES[name]() for name in names]
    try:
        yield
    finally:
        for each in reversed(undo):
            each()


def combined(name: str, known: dict[str, Variant]) -> Variant:
    """A variant by name, or several joined by '+'."""
    parts = [known[part] for part in name.split('+')]
    return Variant(
        config={key: value for part in parts for key, value in part.config.items()},
        train={key: value for part in parts for key, value in part.train.items()},
        patches=tuple(patch for part in parts for patch in part.patches),
    )
