"""The base masked transformer (§2.3, Table 4): picture tokens and text in, logits over the codebook out.

Pre-RMSNorm layers of self-attention, cross-attention to the text, and a GELU MLP; learned row and column positions.
Choices where the paper is silent are listed in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.config import SuperresConfig, TransformerConfig
from muse.nn.attention import CrossAttention, KeysValues, MultiAxisAttention, SelfAttention
from muse.nn.layers import MLP, Embed, Linear, RMSNorm, param, scan_layers, stack

Memory = tuple[Float[Array, 'L B S1 N H'], Float[Array, 'L B S1 N H']]  # KeysValues of every layer


class Block(nnx.Module):
    """Self-attention, cross-attention, MLP; each behind a norm, each added to the stream.

    `self_attention` makes the module of that kind: over all tokens here, multi-axis in the super-res.
    """

    def __init__(
        self,
        config: TransformerConfig | SuperresConfig,
        *,
        rngs: nnx.Rngs,
        self_attention: Callable[..., SelfAttention | MultiAxisAttention] = SelfAttention,
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
        self, x_BTD: Float[Array, 'B T D'], keys_values: KeysValues, lengths_B: Int[Array, ' B']
    ) -> Float[Array, 'B T D']:
        x_BTD = x_BTD + self.self_attention(self.self_norm(x_BTD))
        x_BTD = x_BTD + self.cross_attention(self.cross_norm(x_BTD), keys_values, lengths_B)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


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


def keys_values_of(blocks: Block, memory_BSD: Float[Array, 'B S D']) -> Memory:
    """Cross-attention keys and values of every layer of a stack of `Block`s, `[L, B, 1+S, N, H]` each."""
    graphdef, params = nnx.split(blocks, nnx.Param)
    return jax.lax.map(lambda p: nnx.merge(graphdef, p).cross_attention.keys_values(memory_BSD), params)


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

    def memory(self, txt_BSD: Float[Array, 'B S D']) -> Memory:
        """Cross-attention keys and values of every layer, `[L, B, 1+S, N, H]` each.

        They depend on the text alone: sampling computes them once a prompt and hands them to `logits`.
        """
        return keys_values_of(self.blocks, self._project(txt_BSD))

    def logits(
        self,
        tok_BT: Int[Array, 'B T'] | Float[Array, 'B T W'],
        memory: Memory,
        len_B: Int[Array, ' B'],
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits over the codebook (never over [MASK]), in the compute dtype.

        Args:
            tok_BT: ids in 0..V, V is [MASK]; or weights over the first V or V+1 ids.
            memory: what `memory` returned for the batch's text.
            len_B: real text tokens of each row; 0 is no text.
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
            return block(x_BTD, block.cross_attention.keys_values(text_BSD), len_B)

        return self._run(tok_BT, apply, None, grid)

    def _project(self, txt_BSD):
        return self.text_norm(self.text_projection(txt_BSD.astype(self.config.dtype)))

    def _run(self, tok_BT, apply, per_layer, grid):
        config = self.config
        x_BTD = self.tokens(tok_BT, config.dtype) + self.positions(grid or config.grid).astype(config.dtype)
        x_BTD = scan_layers(self.blocks, apply, x_BTD, per_layer=per_layer, remat=config.remat, unroll=config.unroll)
        return self.head(self.final_norm(x_BTD))
