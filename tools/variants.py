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

from muse import drawing, masking
from muse.models import fused, transformer
from muse.nn import attention_kernels, few_keys, fused_linear, layers, norm_kernels
from muse.nn.attention_kernels import ATTENTION_KERNEL, Split
from muse.train import masked

Undo = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """`config` are settings of the model, `train` of the training loop, `compiler` options of XLA; `patches` are names
    of functions here."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiler: dict[str, Any] = dataclasses.field(default_factory=dict)
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


def _scanned() -> Undo:
    """Layers are left in their stack, as on a CPU."""
    return _all([_set(drawing, 'platform', lambda: 'cpu'), _unfused()])


def _unfused() -> Undo:
    """Layers apart, and each as training runs it: no own kernels."""
    return _set(drawing, 'drawing_kernels', lambda dtype: False)


def _xla_products() -> Undo:
    """Fused layers, but XLA makes their products and what surrounds them."""
    return _set(fused, 'tiles_for', lambda product, dtype: None)


def _own_products() -> Undo:
    """The own kernels for products of any size."""
    return _all([_set(fused_linear, limit, 1 << 30) for limit in ('_LARGEST', '_LONGEST')])


def _cudnn_attention() -> Undo:
    """Fused layers, but the kernel for attention is cuDNN's."""
    return _all([_set(few_keys, name, lambda *shapes: False) for name in ('fits', 'fits_axes')])


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


def _choice_of_gradients() -> Undo:
    """Gradients of layers are joined by whatever reads them, which chooses one of as many arrays for each element."""
    return _set(layers, '_stack', jnp.stack)


def _plain_norms() -> Undo:
    """Norms and their gradients without kernels of their own."""
    return _set(norm_kernels, 'takes', lambda x: False)


def _split_attention() -> Undo:
    """The backward pass of attention's own kernels is two kernels, which leave more of them room at a time."""
    return _set(attention_kernels, 'SPLITS', {256: Split(16, 1, 8, 64, 32, 4, 2, 2)})


def _plain_gelu() -> Undo:
    """GELU's gradient is derived by JAX."""
    return _set(layers, 'gelu', lambda x: jax.nn.gelu(x, approximate=True))


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


def _is_attention(primitive: Any, params: dict[str, Any]) -> bool:
    return primitive.name.startswith('dot_product_attention_fwd') or params.get('name') == ATTENTION_KERNEL


def _no_hidden() -> Undo:
    """As 'dots', but the MLP's hidden units, the largest of what is kept, are made again."""

    def keep(primitive: Any, *args: Any, **params: Any) -> bool:
        if primitive.name == 'dot_general' and args[1].shape[-1] > args[1].shape[0]:
            return False
        return layers._keeps_dots(primitive, *args, **params)

    return _policy(keep)


def _attention_alone() -> Undo:
    """Only what attention leaves is kept."""
    return _policy(lambda primitive, *args, **params: _is_attention(primitive, params))


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
    'scanned': _scanned,
    'unfused': _unfused,
    'xla_products': _xla_products,
    'own_products': _own_products,
    'cudnn_attention': _cudnn_attention,
    'scatter_embedding': _scatter_embedding,
    'float32_embedding': _float32_embedding,
    'plain_ce': _plain_ce,
    'choice_of_gradients': _choice_of_gradients,
    'plain_norms': _plain_norms,
    'split_attention': _split_attention,
    'plain_gelu': _plain_gelu,
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
_IN_GRAPHS = 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION'
_OF_DRAWING = ('full_null', 'scanned', 'unfused', 'xla_products', 'own_products', 'cudnn_attention')
DRAWING_VARIANTS: dict[str, Variant] = {
    'now': Variant(),
    'xla_attention': Variant(config={'attention': 'xla'}),
    **{name: Variant(patches=(name,)) for name in _OF_DRAWING},
    # The host starts a loop once and not each of its steps.
    'loops_in_graphs': Variant(compiler={'xla_gpu_enable_command_buffer': f'{_IN_GRAPHS},WHILE'}),
    'all_in_graphs': Variant(
        compiler={'xla_gpu_enable_command_buffer': f'{_IN_GRAPHS},WHILE,CONDITIONAL', 'xla_gpu_graph_min_graph_size': 1}
    ),
    **_UNROLLED,
}
TRAINING_VARIANTS: dict[str, Variant] = {
    'now': Variant(),
    'xla_attention': Variant(config={'attention': 'xla'}),
    'fused_attention': Variant(config={'attention': 'fused'}),
    # GELU and sums become part of cuBLASLt's products; Triton's products, which hold neither, are not tried.
    'cublaslt': Variant(compiler={'xla_gpu_enable_cublaslt': True, 'xla_gpu_enable_triton_gemm': False}),
    # The same, but Triton's are tried, which XLA splits along the rows that a weight's gradient sums over.
    'cublaslt_beside_triton': Variant(compiler={'xla_gpu_enable_cublaslt': True}),
    'heads_8': Variant(config={'heads': 8}),  # of another width: not the same function of the weights
    'dots': Variant(config={'remat': 'dots'}),
    'full': Variant(config={'remat': 'full'}),
    'none': Variant(config={'remat': 'none'}),
    **{f'accumulate_{n}': Variant(train={'accumulate': n}) for n in (2, 4, 8)},
    **{name: Variant(patches=(name,)) for name in PATCHES if name not in _OF_DRAWING},
    'split_attention': Variant(config={'attention': 'fused'}, patches=('split_attention',)),
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
        compiler={key: value for part in parts for key, value in part.compiler.items()},
        patches=tuple(patch for part in parts for patch in part.patches),
    )
