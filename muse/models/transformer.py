"""The base masked transformer (§2.3, Table 4): picture tokens and text in, logits over the codebook out.

Pre-RMSNorm layers of self-attention, cross-attention to the text, and a GELU MLP; learned row and column positions.
Choices where the paper is silent are listed in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.config import SuperresConfig, TransformerConfig
from muse.nn.attention import CrossAttention, KeysValues, SelfAttention, with_null
from muse.nn.layers import MLP, Embed, Linear, RMSNorm, cast_matrices, param, scan_layers, stack

# Of every layer: each array has a leading axis of layers, or a list of layers (fused ones: one list of all).
Memory = KeysValues | list[KeysValues] | list[list[KeysValues]]


class Block(nnx.Module):
    """Self-attention, cross-attention, MLP; each behind a norm, each added to the stream.

    `self_attention` makes the module of that kind: over all tokens here, multi-axis in the super-res.
    """

    def __init__(
        self,
        config: TransformerConfig | SuperresConfig,
        *,
        rngs: nnx.Rngs,
        self_attention: Callable[..., SelfAttention] = SelfAttention,
    ):
        width, heads, backend = config.width, config.heads, config.attention
        out_scale = (3 * config.layers) ** -0.5  # keeps the variance of the residual stream ≈ 1 at any depth
        self.self_norm = RMSNorm(width, rngs=rngs)
        self.self_attention = self_attention(width, heads, rngs=rngs, backend=backend, out_scale=out_scale)
        self.cross_norm = RMSNorm(width, rngs=rngs)
        self.cross_attention = CrossAttention(width, heads, width, rngs=rngs, backend=backend, out_scale=out_scale)
        self.mlp_norm = RMSNorm(width, rngs=rngs)
        self.mlp = MLP(width, config.mlp_dim, rngs=rngs, out_scale=out_scale)

    def __call__(
        self, x_RTD: Float[Array, 'R T D'], keys_values: KeysValues, lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'R T D']:
        with jax.named_scope('self'):
            x_RTD, read_RTD = self.self_norm.beside(x_RTD)
            more_RTD = self.self_attention(read_RTD)
        with jax.named_scope('cross'):
            if x_RTD.shape[0] == lengths_B.shape[0]:
                x_RTD, read_RTD = self.cross_norm.after(x_RTD, more_RTD)
                more_RTD = self.cross_attention(read_RTD, keys_values, lengths_B)
            else:
                x_RTD = x_RTD + more_RTD
                more_RTD = self._read_some(x_RTD, keys_values, lengths_B)
        with jax.named_scope('mlp'):
            x_RTD, read_RTD = self.mlp_norm.after(x_RTD, more_RTD)
            return x_RTD + self.mlp(read_RTD)

    def keys_values(self, memory_BSD: Float[Array, 'B S1 D']) -> KeysValues:
        """What the layer reads, of what `with_null` returned."""
        return self.cross_attention.keys_values(memory_BSD)

    def _read_some(self, x_RTD: Float[Array, 'R T D'], keys_values: KeysValues, lengths_B: Int[Array, ' B']) -> Array:
        """Cross-attention where R = n · B: the first of each n rows reads a memory and the others read nothing."""
        rows, (_, tokens, width) = lengths_B.shape[0], x_RTD.shape
        x_BnTD = x_RTD.reshape(rows, -1, tokens, width)
        read_BTD = self.cross_attention(self.cross_norm(x_BnTD[:, 0]), keys_values, lengths_B)
        others = (rows, x_BnTD.shape[1] - 1, tokens, width)
        nothing_BnTD = jnp.broadcast_to(keys_values.nothing_D, others)
        return jnp.concatenate([read_BTD[:, None], nothing_BnTD], axis=1).reshape(x_RTD.shape)


class GridPositions(nnx.Module):
    """Learned 2-D positions as a row table plus a column table, so that a canvas of another aspect can be indexed.

    A larger canvas than trained reads the tables by linear interpolation.
    """

    def __init__(self, grid: tuple[int, int], width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.rows = param(init, rngs, (grid[0], width), (None, 'embed'))
        self.columns = param(init, rngs, (grid[1], width), (None, 'embed'))

    def __call__(self, grid: tuple[int, int]) -> Float[Array, 'T D']:
        """Positions of a grid of `rows × columns` tokens, row by row."""

        def fit(table: Array, size: int) -> Array:
            if size <= table.shape[0]:
                return table[:size]
            return jax.image.resize(table, (size, table.shape[1]), 'linear')

        rows_RD, columns_CD = fit(self.rows[...], grid[0]), fit(self.columns[...], grid[1])
        return (rows_RD[:, None] + columns_CD[None]).reshape(grid[0] * grid[1], -1)


def keys_values_of(blocks: Block | nnx.List[Any], memory_BSD: Float[Array, 'B S1 D']) -> Memory:
    """Cross-attention keys and values of every layer of a stack of `Block`s, of what `with_null` returned.

    What stands in a list need not be a `Block`, only have its `keys_values` (`muse.models.fused`).
    """
    if isinstance(blocks, nnx.List):
        return [block.keys_values(memory_BSD) for block in blocks]
    graphdef, params = nnx.split(blocks, nnx.Param)
    params = cast_matrices(params, memory_BSD.dtype)
    return jax.lax.map(lambda p: nnx.merge(graphdef, p).keys_values(memory_BSD), params)


class Transformer(nnx.Module):
    """Token ids with [MASK] at the unknown, text states and their lengths → logits over the codebook."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = Embed(config.codebook_size + 1, config.width, rngs=rngs)
        self.positions = GridPositions(config.grid, config.width, rngs=rngs)
        self.text_projection = Linear(config.text_width, config.width, (None, 'embed'), rngs=rngs)
        self.text_norm = RMSNorm(config.width, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs=rngs)
        self.final_norm = RMSNorm(config.width, rngs=rngs)
        self.head = Linear(config.width, config.codebook_size, ('embed', 'vocab'), rngs=rngs, scale=0.02)

    @property
    def mask_id(self) -> int:
        return self.config.codebook_size

    def stacks(self) -> dict[str, int]:
        """Names of the attributes that are stacked layers, and how many layers each has."""
        return {'blocks': self.config.layers}

    def memory(self, txt_BSD: Float[Array, 'B S D']) -> Memory:
        """Cross-attention keys and values of every layer, the arrays of `KeysValues` with layers in front.

        They depend on the text alone: sampling computes them once a prompt and hands them to `logits`.
        """
        return keys_values_of(self.blocks, self._project(txt_BSD))

    def logits(
        self,
        tok_BT: Int[Array, 'R T'] | Float[Array, 'R T W'],
        memory: Memory,
        len_B: Int[Array, ' B'],
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, 'R T V']:
        """Logits over the codebook (never over [MASK]), in the compute dtype.

        Args:
            tok_BT: ids in 0..V, V is [MASK]; or weights over the first V or V+1 ids.
            memory: what `memory` returned for the batch's text.
            len_B: real text tokens of each row; 0 is no text. With n times as many rows in `tok_BT`, the first of each
                n rows reads the text and the others have none, which costs them no attention (guidance, §2.7).
            grid: token rows and columns; the trained grid when None.
        """
        return self._run(tok_BT, lambda block, x_BTD, keys_values: block(x_BTD, keys_values, len_B), memory, grid)

    def __call__(
        self,
        tok_BT: Int[Array, 'B T'] | Float[Array, 'B T W'],
        txt_BSD: Float[Array, 'B S D'],
        len_B: Int[Array, ' B'],
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, 'B T V']:
        """`logits` under text states `[B, S, text_width]`. Training takes this way: each layer makes its keys and
        values itself, so that they can be rematerialised with it."""
        text_BSD = self._project(txt_BSD)

        def apply(block: Block, x_BTD, _):
            return block(x_BTD, block.keys_values(text_BSD), len_B)

        return self._run(tok_BT, apply, None, grid)

    def _project(self, txt_BSD):
        return with_null(self.text_norm(self.text_projection(txt_BSD.astype(self.config.dtype))))

    def _run(self, tok_BT, apply, per_layer, grid):
        config = self.config
        x_BTD = self.tokens(tok_BT, config.dtype) + self.positions(grid or config.grid).astype(config.dtype)
        x_BTD = scan_layers(self.blocks, apply, x_BTD, per_layer=per_layer, remat=config.remat, unroll=config.unroll)
        with jax.named_scope('head'):
            return self.head(self.final_norm(x_BTD))
