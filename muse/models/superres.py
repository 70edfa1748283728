"""The super-resolution transformer (§2.4, Table 6): low-res tokens and text in, logits over high-res tokens out.

A stack of self-attention layers reads the low-res tokens; its output beside the projected text is the memory that the
second stack reads by cross-attention, whose own self-attention is multi-axis (HiT, Zhao et al. 2021). Its surface is
that of `muse.models.transformer.Transformer`, so that one decoder and one kind of training serve both. Without text
the memory is the null and the low-res tokens, which are never dropped. Choices where the paper is silent are listed in
docs/design.md.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.config import SuperresConfig
from muse.errors import UserError
from muse.models.transformer import Block, GridPositions, Memory, keys_values_of
from muse.nn.attention import MultiAxisAttention, SelfAttention, from_blocks, to_blocks, with_null
from muse.nn.layers import MLP, Embed, Linear, RMSNorm, scan_layers, stack

Grid = tuple[int, int]


class LowBlock(nnx.Module):
    """Self-attention and MLP over the low-res tokens; each behind a norm, each added to the stream."""

    def __init__(self, config: SuperresConfig, *, rngs: nnx.Rngs):
        out_scale = (2 * config.low_layers) ** -0.5
        self.self_norm = RMSNorm(config.width, rngs=rngs)
        self.self_attention = SelfAttention(
            config.width, config.heads, rngs=rngs, backend=config.attention, out_scale=out_scale
        )
        self.mlp_norm = RMSNorm(config.width, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_dim, rngs=rngs, out_scale=out_scale)

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        x_BTD, read_BTD = self.self_norm.beside(x_BTD)
        x_BTD, read_BTD = self.mlp_norm.after(x_BTD, self.self_attention(read_BTD))
        return x_BTD + self.mlp(read_BTD)


class Superres(nnx.Module):
    """High-res ids with [MASK] at the unknown, low-res ids, text states and lengths → logits over the codebook."""

    def __init__(self, config: SuperresConfig, *, rngs: nnx.Rngs):
        _check(config)
        self.config = config
        self.tokens = Embed(config.codebook_size + 1, config.width, rngs=rngs)
        self.positions = GridPositions(config.grid, config.width, rngs=rngs)
        self.low_tokens = Embed(config.low_codebook_size, config.width, rngs=rngs)
        self.low_positions = GridPositions(config.low_grid, config.width, rngs=rngs)
        self.low_blocks = (
            stack(lambda rngs: LowBlock(config, rngs=rngs), config.low_layers, rngs=rngs) if config.low_layers else None
        )
        self.low_norm = RMSNorm(config.width, rngs=rngs)
        self.text_projection = Linear(config.text_width, config.width, (None, 'embed'), rngs=rngs)
        self.text_norm = RMSNorm(config.width, rngs=rngs)
        multi_axis = partial(MultiAxisAttention, block=config.block)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs, self_attention=multi_axis), config.layers, rngs=rngs)
        self.final_norm = RMSNorm(config.width, rngs=rngs)
        self.head = Linear(config.width, config.codebook_size, ('embed', 'vocab'), rngs=rngs, scale=0.02)

    @property
    def mask_id(self) -> int:
        return self.config.codebook_size

    def stacks(self) -> dict[str, int]:
        """Names of the attributes that are stacked layers, and how many layers each has."""
        low = {'low_blocks': self.config.low_layers} if self.config.low_layers else {}
        return {'blocks': self.config.layers, **low}

    def low_grid(self, grid: Grid | None = None) -> Grid:
        """Rows and columns of the low-res tokens that belong to a high-res grid (the trained one when None).

        Raises:
            UserError: rows or columns that are no multiple of the block's side and of the ratio of the two grids.
        """
        return low_grid(self.config, grid or self.config.grid)

    def memory(
        self,
        low_BT: Int[Array, 'B T'] | Float[Array, 'B T W'],
        txt_BSD: Float[Array, 'B S D'],
        grid: Grid | None = None,
    ) -> Memory:
        """Cross-attention keys and values of every layer: of null, low-res, text, in this order.

        They depend on the low-res tokens and the text alone: sampling computes them once and hands them to `logits`.

        Args:
            low_BT: low-res ids (no [MASK] among them), row by row; or weights over them.
            txt_BSD: text states `[B, S, text_width]`.
            grid: high-res token rows and columns; the trained grid when None.
        """
        return keys_values_of(self.blocks, self._read(low_BT, txt_BSD, grid))

    def logits(
        self,
        tok_BT: Int[Array, 'B T'] | Float[Array, 'B T W'],
        memory: Memory,
        len_B: Int[Array, ' B'],
        grid: Grid | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits over the high-res codebook (never over [MASK]), in the compute dtype, row by row as the ids.

        Args:
            tok_BT: ids in 0..V, V is [MASK]; or weights over the first V or V+1 ids.
            memory: what `memory` returned for the batch's low-res tokens and text, and the same grid.
            len_B: real text tokens of each row; 0 is no text, which leaves the low-res tokens.
            grid: high-res token rows and columns; the trained grid when None.

        Raises:
            UserError: a grid as for `low_grid`.
        """
        real_B = self._real(len_B, grid)
        return self._run(tok_BT, lambda block, x_BTD, keys_values: block(x_BTD, keys_values, real_B), memory, grid)

    def __call__(
        self,
        tok_BT: Int[Array, 'B T'] | Float[Array, 'B T W'],
        low_BT: Int[Array, 'B T2'] | Float[Array, 'B T2 W2'],
        txt_BSD: Float[Array, 'B S D'],
        len_B: Int[Array, ' B'],
        grid: Grid | None = None,
    ) -> Float[Array, 'B T V']:
        """`logits` under low-res tokens and text. Training takes this way: each layer makes its keys and values itself,
        so that they can be rematerialised with it."""
        memory_BSD, real_B = self._read(low_BT, txt_BSD, grid), self._real(len_B, grid)

        def apply(block: Block, x_BTD, _):
            return block(x_BTD, block.keys_values(memory_BSD), real_B)

        return self._run(tok_BT, apply, None, grid)

    def _read(self, low_BT, txt_BSD, grid):
        """The memory before it becomes keys and values: null, low-res, text, in this order: real rows are a prefix."""
        config = self.config
        x_BTD = self.low_tokens(low_BT, config.dtype)
        x_BTD = x_BTD + self.low_positions(self.low_grid(grid)).astype(config.dtype)
        if self.low_blocks is not None:
            unroll = min(config.unroll, config.low_layers)
            x_BTD = scan_layers(self.low_blocks, lambda block, x, _: block(x), x_BTD, remat=config.remat, unroll=unroll)
        text_BSD = self.text_norm(self.text_projection(txt_BSD.astype(config.dtype)))
        return with_null(jnp.concatenate([self.low_norm(x_BTD), text_BSD], axis=1))

    def _real(self, len_B, grid):
        rows, columns = self.low_grid(grid)
        return rows * columns + len_B

    def _run(self, tok_BT, apply, per_layer, grid):
        config, grid = self.config, grid or self.config.grid
        positions_1TD = to_blocks(self.positions(grid).astype(config.dtype)[None], grid, config.block)
        x_BTD = self.tokens(to_blocks(tok_BT, grid, config.block), config.dtype) + positions_1TD
        x_BTD = scan_layers(self.blocks, apply, x_BTD, per_layer=per_layer, remat=config.remat, unroll=config.unroll)
        with jax.named_scope('head'):
            return self.head(self.final_norm(from_blocks(x_BTD, grid, config.block)))


def low_grid(config: SuperresConfig, grid: Grid) -> Grid:
    """Rows and columns of the low-res tokens under a high-res grid; see `Superres.low_grid`."""
    for size, high, low in zip(grid, config.grid, config.low_grid, strict=True):
        if size < 1 or size % config.block or size % (high // low):
            raise UserError(
                f'{grid[0]}x{grid[1]} tokens do not fit the super-res: both sides must be multiples of {config.block} '
                f'(its block) and of {high // low} (its tokens along one low-res token)'
            )
    return grid[0] * config.low_grid[0] // config.grid[0], grid[1] * config.low_grid[1] // config.grid[1]


def _check(config: SuperresConfig) -> None:
    if config.heads < 2 or config.heads % 2 or config.width % config.heads:
        raise UserError(
            f'model.heads is {config.heads} and model.width {config.width}: heads must be even and divide the width'
        )
    if config.block < 1:
        raise UserError(f'model.block is {config.block}: give at least 1')
    ratios = [divmod(high, low) if low > 0 else (0, 1) for high, low in zip(config.grid, config.low_grid, strict=True)]
    if any(rest or ratio < 1 for ratio, rest in ratios):
        raise UserError(f'model.grid is {config.grid}: it must be a multiple of model.low_grid {config.low_grid}')
    low_grid(config, config.grid)
