"""Attention: one function with three backends, and the self-, multi-axis and cross-attention modules made of it.

Text of any source reaches a model as an array and a length. The null condition belongs to the layer that reads it: a
learned key/value in FIRST place, so that real keys are always a prefix, "no text" is a prefix of one, and no row is
ever a softmax over nothing (docs/design.md, "The null condition").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from muse.config import Backend
from muse.errors import UserError, warn
from muse.nn.attention_kernels import fits, normed_attention
from muse.nn.devices import AMPERE, GPUS, ROWS, capability, has_triton, mesh_split, platform
from muse.nn.layers import Linear, RMSNorm, param

_SPLASH_BLOCK = 128
_CUDNN_HEAD = 128  # the widest head its kernels take on every chip
_CUDNN_BIAS = 8  # queries and keys come in multiples of this where there is a bias


def attention(
    q_BTNH: Float[Array, 'B T N H'],
    k_BSNH: Float[Array, 'B S N H'],
    v_BSNH: Float[Array, 'B S N H'],
    *,
    lengths_B: Int[Array, ' B'] | None = None,
    bias_1NTS: Float[Array, '1 N T S'] | None = None,
    scale: float,
    backend: Backend = 'auto',
) -> Float[Array, 'B T N H']:
    """Softmax attention over a prefix of the keys.

    Args:
        q_BTNH, k_BSNH, v_BSNH: queries, keys, values of one floating dtype.
        lengths_B: how many keys of each row are real; must be ≥ 1. None: all.
        bias_1NTS: added to the scaled logits (T5's relative positions).
        scale: factor on q·k.
        backend: 'xla' (reference), 'cudnn' (GPU, bf16 or fp16 only), 'splash' (TPU), or 'auto': the chip's own where it
            takes the shapes and types, else 'xla'. 'fused' is a matter of the modules below, and 'auto' here.
    """
    if backend in ('auto', 'fused'):
        backend = _native(q_BTNH, has_bias=bias_1NTS is not None)
    if backend == 'splash':
        return _splash(q_BTNH, k_BSNH, v_BSNH, lengths_B, scale)
    if backend == 'cudnn':
        return _cudnn(q_BTNH, k_BSNH, v_BSNH, lengths_B, bias_1NTS, scale)
    logits_BNTS = jnp.einsum('btnh,bsnh->bnts', q_BTNH, k_BSNH, preferred_element_type=jnp.float32) * scale
    if bias_1NTS is not None:
        logits_BNTS = logits_BNTS + bias_1NTS.astype(jnp.float32)
    if lengths_B is not None:
        real_BS = jnp.arange(k_BSNH.shape[1]) < lengths_B[:, None]
        logits_BNTS = jnp.where(real_BS[:, None, None, :], logits_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum('bnts,bsnh->btnh', weights_BNTS, v_BSNH)


def _native(q_BTNH: Array, *, has_bias: bool) -> Backend:
    """The kernel of the chip that the program is for."""
    chip = platform()
    if chip == 'tpu':
        return 'xla' if has_bias or q_BTNH.shape[1] % _SPLASH_BLOCK else 'splash'
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    takes_head = q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= _CUDNN_HEAD
    return 'cudnn' if chip in GPUS and half and takes_head and has_cudnn() else 'xla'


def _cudnn(q_BTNH, k_BSNH, v_BSNH, lengths_B, bias_1NTS, scale):
    """cuDNN's kernel. A bias must have the type of the queries, and rows that are aligned: lengths are filled up."""
    (b, t, *_), s = q_BTNH.shape, k_BSNH.shape[1]
    if bias_1NTS is not None:
        more_t, more_s = -t % _CUDNN_BIAS, -s % _CUDNN_BIAS
        lengths_B = jnp.full(b, s, jnp.int32) if lengths_B is None and more_s else lengths_B
        q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, more_t), (0, 0), (0, 0)))
        k_BSNH, v_BSNH = (jnp.pad(x, ((0, 0), (0, more_s), (0, 0), (0, 0))) for x in (k_BSNH, v_BSNH))
        bias_1NTS = jnp.pad(bias_1NTS, ((0, 0), (0, 0), (0, more_t), (0, more_s))).astype(q_BTNH.dtype)
    y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, bias=bias_1NTS, scale=scale, implementation='cudnn', key_value_seq_lengths=lengths_B
    )
    return y_BTNH[:, :t]


def has_cudnn() -> bool:
    """Whether 'cudnn' runs here: an NVIDIA GPU from Ampere on."""
    return capability() >= AMPERE


def _splash(q_BTNH, k_BSNH, v_BSNH, lengths_B, scale):
    """The TPU kernel, on each device's rows and heads of the mesh of `jax.set_mesh`: the compiler cannot split it.

    Keys are padded to a multiple of the kernel's 128 and then count as not real, as those past a row's length.
    """
    (b, t, n, _), s = q_BTNH.shape, k_BSNH.shape[1]
    if t % _SPLASH_BLOCK:
        raise UserError(f"attention 'splash' wants a multiple of {_SPLASH_BLOCK} queries, not {t}: use 'xla'")
    lengths_B = jnp.full(b, s) if lengths_B is None and s % _SPLASH_BLOCK else lengths_B
    padding = ((0, 0), (0, -s % _SPLASH_BLOCK), (0, 0), (0, 0))
    k_BSNH, v_BSNH = jnp.pad(k_BSNH, padding), jnp.pad(v_BSNH, padding)
    operands = (q_BTNH * scale, k_BSNH, v_BSNH) + (() if lengths_B is None else (lengths_B,))
    rows, heads = mesh_split(b, *ROWS), mesh_split(n, 'tensor')
    if rows is None and heads is None:
        return _splash_kernel(*operands)
    spec = P(rows, None, heads, None)
    in_specs = (spec, spec, spec, P(rows))[: len(operands)]
    return jax.shard_map(_splash_kernel, in_specs=in_specs, out_specs=spec, check_vma=False)(*operands)


def _splash_kernel(q_BTNH, k_BSNH, v_BSNH, lengths_B=None):
    """One device's part. Padding is a segment of its own: real keys and all queries are segment 0, pads segment 1."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, t, n, _), s = q_BTNH.shape, k_BSNH.shape[1]
    mask = masks.MultiHeadMask([masks.FullMask((t, s)) for _ in range(n)])
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=platform() == 'cpu')
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    if lengths_B is None:
        out_BNTH = jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    else:
        pads_BS = (jnp.arange(s) >= lengths_B[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros((q.shape[0], t), jnp.int32), kv=pads_BS)
        out_BNTH = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(out_BNTH, 1, 2)  # pyright: ignore[reportArgumentType]


def _heads(x: Float[Array, 'B T D'], heads: int) -> Float[Array, 'B T N H']:
    return x.reshape(*x.shape[:-1], heads, -1)


def _fused(backend: Backend, q_BTNH: Array, k_BSNH: Array, groups: int = 1) -> bool:
    """Whether this project's own kernels, which hold the norms too, are asked for and take the shapes and types."""
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    there = (half and platform() in GPUS) or platform() == 'cpu'  # on a CPU interpreted: for tests
    wanted = backend == 'fused' and there and fits(q_BTNH, k_BSNH, groups)
    if wanted and not has_triton():
        warn(f"model.attention 'fused' is as 'auto' here: jax {jax.__version__} has no jax.experimental.pallas.triton")
        return False
    return wanted


class SelfAttention(nnx.Module):
    """Multi-head self-attention with QK-norm, without biases."""

    groups = 1  # runs of tokens that attend among themselves, as `normed_attention` counts them

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, backend: Backend = 'auto', out_scale: float = 1.0):
        self.heads, self.head_dim = heads, width // heads
        self.backend: Backend = backend
        self.query = Linear(width, width, ('embed', 'heads'), rngs=rngs)
        self.key = Linear(width, width, ('embed', 'heads'), rngs=rngs)
        self.value = Linear(width, width, ('embed', 'heads'), rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), rngs=rngs, scale=out_scale)
        self.query_norm = RMSNorm(self.head_dim, rngs=rngs)
        self.key_norm = RMSNorm(self.head_dim, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        q_BTNH, k_BTNH, v_BTNH = (_heads(project(x_BTD), self.heads) for project in (self.query, self.key, self.value))
        if _fused(self.backend, q_BTNH, k_BTNH, self.groups):
            lengths_B = jnp.full(q_BTNH.shape[0], k_BTNH.shape[1] // self.groups, jnp.int32)
            scales = self.query_norm.scale[...], self.key_norm.scale[...]
            options = {'scale': self.head_dim**-0.5, 'epsilon': self.query_norm.epsilon, 'groups': self.groups}
            y_BTNH = normed_attention(q_BTNH, k_BTNH, v_BTNH, *scales, lengths_B, **options)
        else:
            y_BTNH = self.attend(self.query_norm(q_BTNH), self.key_norm(k_BTNH), v_BTNH)
        return self.out(y_BTNH.reshape(x_BTD.shape))

    def attend(self, q_BTNH: Array, k_BTNH: Array, v_BTNH: Array) -> Float[Array, 'B T N H']:
        """What lies between the projections: every token to every token."""
        return attention(q_BTNH, k_BTNH, v_BTNH, scale=self.head_dim**-0.5, backend=self.backend)


def to_blocks(x: Array, grid: tuple[int, int], block: int) -> Array:
    """Tokens `[B, T, ...]` of a grid, row by row → block by block, each block row by row.

    In this order a block is a run of `block²` tokens, so that attention within blocks and across them is a reshape:
    a model permutes its input once and its output once (`from_blocks`), never between layers.
    """
    (rows, columns), rest = grid, x.shape[2:]
    x = x.reshape(x.shape[0], rows // block, block, columns // block, block, *rest)
    return x.swapaxes(2, 3).reshape(x.shape[0], rows * columns, *rest)


def from_blocks(x: Array, grid: tuple[int, int], block: int) -> Array:
    """What `to_blocks` did, undone."""
    (rows, columns), rest = grid, x.shape[2:]
    x = x.reshape(x.shape[0], rows // block, columns // block, block, block, *rest)
    return x.swapaxes(2, 3).reshape(x.shape[0], rows * columns, *rest)


class MultiAxisAttention(SelfAttention):
    """Self-attention along two axes of a grid of blocks (HiT, Zhao et al. 2021, section 3.1), with QK-norm.

    Half of the heads attend within each block of `block × block` tokens; the other half attend across the blocks, from
    a token to the tokens at its place in every block (a dilated grid over the whole picture). Tokens come in the order
    of `to_blocks`. With 64×64 tokens and blocks of 8×8 each query sees 64 keys instead of 4096.
    """

    def __init__(
        self, width: int, heads: int, *, block: int, rngs: nnx.Rngs, backend: Backend = 'auto', out_scale: float = 1.0
    ):
        # Splash wants at least 128 keys; 64 keys a query make a score matrix too small to need a kernel.
        backend = 'xla' if backend == 'splash' else backend
        super().__init__(width, heads, rngs=rngs, backend=backend, out_scale=out_scale)
        self.block_tokens = self.groups = block**2

    def attend(self, q_BTNH: Array, k_BTNH: Array, v_BTNH: Array) -> Float[Array, 'B T N H']:
        """What lies between the projections: half of the heads within the blocks, the others across them."""
        local, across = zip(*(self._axes(x) for x in (q_BTNH, k_BTNH, v_BTNH)), strict=True)
        scale, shape = self.head_dim**-0.5, (q_BTNH.shape[0], -1, self.block_tokens, self.heads // 2, self.head_dim)
        y_local = attention(*local, scale=scale, backend=self.backend).reshape(shape)
        y_across = attention(*across, scale=scale, backend=self.backend)
        y_across = y_across.reshape(shape[0], self.block_tokens, -1, *shape[3:]).swapaxes(1, 2)
        return jnp.stack([y_local, y_across], axis=4).reshape(q_BTNH.shape)

    def _axes(self, x_BTNH: Float[Array, 'B T N H']) -> tuple[Array, Array]:
        """`[B·blocks, tokens, N/2, H]` for the heads within blocks, `[B·tokens, blocks, N/2, H]` for those across.

        The two kinds take turns among the heads, so that a mesh that splits the heads splits both kinds alike.
        """
        x = x_BTNH.reshape(x_BTNH.shape[0], -1, self.block_tokens, self.heads // 2, 2, self.head_dim)
        local, across = x[..., 0, :], x[..., 1, :].swapaxes(1, 2)
        return local.reshape(-1, *local.shape[2:]), across.reshape(-1, *across.shape[2:])


class KeysValues(NamedTuple):
    """What a cross-attention layer reads: S1 is the null and the memory."""

    keys_BSNH: Float[Array, 'B S1 N H']
    values_BSNH: Float[Array, 'B S1 N H']
    nothing_D: Float[Array, ' D']  # the layer's whole output where the length is 0: attention over the null alone


def with_null(memory_BSD: Float[Array, 'B S D']) -> Float[Array, 'B S1 D']:
    """A memory with a row of zeros in first place: there `CrossAttention.keys_values` puts each layer's null."""
    return jnp.pad(memory_BSD, ((0, 0), (1, 0), (0, 0)))


class CrossAttention(nnx.Module):
    """Multi-head cross-attention to a memory of ragged length, with QK-norm and a learned null in first place."""

    def __init__(
        self,
        width: int,
        heads: int,
        memory_width: int,
        *,
        rngs: nnx.Rngs,
        backend: Backend = 'auto',
        out_scale: float = 1.0,
    ):
        self.heads, self.head_dim = heads, width // heads
        self.backend: Backend = backend
        self.query = Linear(width, width, ('embed', 'heads'), rngs=rngs)
        self.key = Linear(memory_width, width, ('embed', 'heads'), rngs=rngs)
        self.value = Linear(memory_width, width, ('embed', 'heads'), rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), rngs=rngs, scale=out_scale)
        self.query_norm = RMSNorm(self.head_dim, rngs=rngs)
        self.key_norm = RMSNorm(self.head_dim, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.null_key = param(small, rngs, (heads, self.head_dim), ('heads', None))
        self.null_value = param(small, rngs, (heads, self.head_dim), ('heads', None))

    def keys_values(self, memory_BSD: Float[Array, 'B S1 D']) -> KeysValues:
        """Keys and values of the null and of the memory behind it: computed once a prompt.

        Args:
            memory_BSD: what `with_null` returned.
        """

        def null_first(x_BSD: Array, null: nnx.Param) -> Array:
            # The null's row of the product is overwritten where it lies; put in front, all others would be copied.
            x_BSNH = _heads(x_BSD, self.heads)
            null_B1NH = jnp.broadcast_to(null[...].astype(x_BSNH.dtype), (x_BSNH.shape[0], 1, *null.shape))
            return jax.lax.dynamic_update_slice(x_BSNH, null_B1NH, (0, 0, 0, 0))

        keys = null_first(self.key(memory_BSD), self.null_key)
        values = null_first(self.value(memory_BSD), self.null_value)
        nothing_D = self.out(self.null_value[...].astype(memory_BSD.dtype).reshape(-1))
        return KeysValues(self.key_norm(keys), values, nothing_D)

    def __call__(
        self, x_BTD: Float[Array, 'B T D'], keys_values: KeysValues, lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'B T D']:
        """Reads the memory; `lengths_B` counts its real rows without the null, 0 is no condition."""
        q_BTNH = _heads(self.query(x_BTD), self.heads)
        if _fused(self.backend, q_BTNH, keys_values.keys_BSNH):
            options = {'scale': self.head_dim**-0.5, 'epsilon': self.query_norm.epsilon}
            scale_H, (keys, values, _) = self.query_norm.scale[...], keys_values
            y_BTNH = normed_attention(q_BTNH, keys, values, scale_H, None, lengths_B + 1, **options)
        else:
            y_BTNH = self.attend(self.query_norm(q_BTNH), keys_values, lengths_B)
        return self.out(y_BTNH.reshape(x_BTD.shape))

    def attend(self, q_BTNH: Array, keys_values: KeysValues, lengths_B: Int[Array, ' B']) -> Float[Array, 'B T N H']:
        """What lies between the projections of `__call__`."""
        k, v, _ = keys_values
        scale = self.head_dim**-0.5
        return attention(q_BTNH, k, v, lengths_B=lengths_B + 1, scale=scale, backend=self.backend)
