"""A stack of transformer layers as drawing runs it on an NVIDIA GPU: norms, GELU and additions inside the products, and
attention in kernels of its own where these take its shapes.

Made once ahead of the steps from layers that `muse.nn.layers.unstack` returned; weights are joined and folded then. It
computes what `muse.models.transformer.Block` does, for the base and for the super-res, and takes no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.models.transformer import Block
from muse.nn import few_keys
from muse.nn.attention import CrossAttention, KeysValues, MultiAxisAttention, SelfAttention
from muse.nn.devices import warn_if_asked
from muse.nn.fused_linear import Product, Readers, Stream, add_product, normed_gelu, normed_heads, stream_of, tiles_for
from muse.nn.layers import Linear, RMSNorm


def _folded(norm: RMSNorm, *linears: Linear) -> nnx.Param:
    """Kernels side by side, with the scale of the norm before them in their rows."""
    kernel_KN = jnp.concatenate([linear.kernel[...] for linear in linears], axis=1)
    return nnx.Param((norm.scale[...][:, None] * kernel_KN).astype(kernel_KN.dtype))


def _head_scales(heads: int, *norms: RMSNorm | None) -> nnx.Param:
    """The scale of each column's head norm, float32."""
    ones = next(jnp.ones_like(norm.scale[...]) for norm in norms if norm is not None)
    return nnx.Param(jnp.concatenate([jnp.tile(ones if norm is None else norm.scale[...], heads) for norm in norms]))


class FusedBlock(nnx.Module):
    """One layer."""

    def __init__(self, block: Block):
        own, cross = block.self_attention, block.cross_attention
        self.block = block
        self.self_kernel = _folded(block.self_norm, own.query, own.key, own.value)
        self.self_scales = _head_scales(own.heads, own.query_norm, own.key_norm, None)
        self.cross_kernel = _folded(block.cross_norm, cross.query)
        self.cross_scales = _head_scales(cross.heads, cross.query_norm)
        self.up_kernel = _folded(block.mlp_norm, block.mlp.up)

    def __call__(self, stream: Stream, keys_values: KeysValues, lengths_B: Int[Array, ' B'], tokens: int) -> Stream:
        """`Block.__call__` of a stream whose rows are runs of `tokens` tokens."""
        with jax.named_scope('self'):
            stream = self._attend(stream, tokens)
        with jax.named_scope('cross'):
            stream = self._read(stream, keys_values, lengths_B, tokens)
        with jax.named_scope('mlp'):
            return self._mlp(stream)

    def _attend(self, stream: Stream, tokens: int) -> Stream:
        own, kernel_KN, norm = self.block.self_attention, self.self_kernel[...], self.block.self_norm
        m, width = stream.x_MD.shape
        tiles = tiles_for(Product('heads', m, width, 3 * width, m, own.head_dim, 3), kernel_KN.dtype)
        projected = normed_heads(
            stream,
            kernel_KN,
            self.self_scales[...],
            parts=3,
            normed=2,
            head=own.head_dim,
            epsilon=norm.epsilon,
            tiles=tiles,
        )
        q, k, v = (x_MD.reshape(-1, tokens, own.heads, own.head_dim) for x_MD in projected)
        return _added(stream, _attended(own, q, k, v).reshape(m, width), own.out)

    def _read(self, stream: Stream, keys_values: KeysValues, lengths_B: Int[Array, ' B'], tokens: int) -> Stream:
        """Cross-attention; what `Block` says of its `_read` holds here."""
        cross, kernel_KN, norm = self.block.cross_attention, self.cross_kernel[...], self.block.cross_norm
        (m, width), rows = stream.x_MD.shape, lengths_B.shape[0]
        every = m // tokens // rows
        readers = None if every == 1 else Readers(tokens, every)
        run = m if readers is None else tokens
        product = Product('heads', rows * tokens, width, width, run, cross.head_dim)
        [q_MD] = normed_heads(
            stream,
            kernel_KN,
            self.cross_scales[...],
            parts=1,
            normed=1,
            head=cross.head_dim,
            epsilon=norm.epsilon,
            readers=readers,
            tiles=tiles_for(product, kernel_KN.dtype),
        )
        q_BTNH = q_MD.reshape(rows, tokens, cross.heads, cross.head_dim)
        y_BTNH = _read_from(cross, q_BTNH, keys_values, lengths_B)
        return _added(stream, y_BTNH.reshape(q_MD.shape), cross.out, readers, keys_values.nothing_D)

    def _mlp(self, stream: Stream) -> Stream:
        kernel_KN, norm = self.up_kernel[...], self.block.mlp_norm
        m, width = stream.x_MD.shape
        tiles = tiles_for(Product('gelu', m, width, kernel_KN.shape[1], m), kernel_KN.dtype)
        y_MF = normed_gelu(stream, kernel_KN, epsilon=norm.epsilon, tiles=tiles)
        return _added(stream, y_MF, self.block.mlp.down)


def _attended(own: SelfAttention, q: Array, k: Array, v: Array) -> Float[Array, 'B T N H']:
    """`own.attend`."""
    scale = own.head_dim**-0.5
    if isinstance(own, MultiAxisAttention):
        if _takes(own, few_keys.fits_axes(q, own.block_tokens), q, own.block_tokens):
            return few_keys.attend_axes(q, k, v, scale=scale)
    elif _takes(own, few_keys.fits(q, k), q, k.shape[1]):
        return few_keys.attend(q, k, v, jnp.full(q.shape[0], k.shape[1], jnp.int32), scale=scale)
    return own.attend(q, k, v)


def _read_from(
    cross: CrossAttention, q_BTNH: Array, keys_values: KeysValues, lengths_B: Int[Array, ' B']
) -> Float[Array, 'B T N H']:
    """`cross.attend`."""
    k, v, _ = keys_values
    if _takes(cross, few_keys.fits(q_BTNH, k), q_BTNH, k.shape[1]):
        return few_keys.attend(q_BTNH, k, v, lengths_B + 1, scale=cross.head_dim**-0.5)
    return cross.attend(q_BTNH, keys_values, lengths_B)


def _takes(attention: SelfAttention | CrossAttention, fits: bool, q_BTNH: Array, keys: int) -> bool:
    """Whether the own kernel is used: the config leaves the choice open, and shapes fit."""
    if attention.backend not in ('auto', 'fused'):
        return False
    if not fits:
        _, tokens, _, width = q_BTNH.shape
        warn_if_asked(f'no own kernel takes attention of {tokens} queries over {keys} keys in heads of {width}')
    return fits


def _added(
    stream: Stream, y_MK: Array, linear: Linear, readers: Readers | None = None, nothing_D: Array | None = None
) -> Stream:
    kernel_KN = linear.kernel[...]
    m, width = stream.x_MD.shape
    product = Product('add', m, y_MK.shape[1], width, m if readers is None else readers.tokens)
    tiles = tiles_for(product, kernel_KN.dtype)
    return add_product(stream, y_MK, kernel_KN, nothing_N=nothing_D, readers=readers, tiles=tiles)


class FusedLayers(nnx.Module):
    """All layers of a stack. To the model around it they are one layer, whose memory is the list of theirs."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List([FusedBlock(block) for block in blocks])

    def keys_values(self, memory_BSD: Float[Array, 'B S1 D']) -> list[KeysValues]:
        """What each layer reads."""
        return [fused.block.keys_values(memory_BSD) for fused in self.blocks]

    def __call__(
        self, x_RTD: Float[Array, 'R T D'], keys_values: Sequence[KeysValues], lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'R T D']:
        _, tokens, width = x_RTD.shape
        stream = stream_of(x_RTD.reshape(-1, width))
        for block, own in zip(self.blocks, keys_values, strict=True):
            stream = block(stream, own, lengths_B, tokens)
        return stream.x_MD.reshape(x_RTD.shape)
