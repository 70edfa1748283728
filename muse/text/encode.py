"""Prompts → text states: the one way from words to what the transformer reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.text.tokenizer import Tokenizer

_BATCH = 8  # texts a call off the CPU


@partial(jax.jit, static_argnums=0)
def _states(graphdef: nnx.GraphDef, params: nnx.State, ids_BS: Array, len_B: Array) -> Array:
    return nnx.merge(graphdef, params)(ids_BS, len_B)


def encode_prompts(
    encoder: nnx.Module, tokenizer: Tokenizer, prompts: Sequence[str], length: int
) -> tuple[Float[Array, 'B S D'], Int[Array, ' B']]:
    """States `[B, length, D]` in the encoder's compute dtype, and their lengths `[B]` (0 for a blank prompt).

    Each distinct text is encoded once. Every call of the encoder has one fixed shape, so that the states of a prompt
    do not depend on the others: one text a call on a CPU, where they are then equal to the bit.

    Args:
        encoder: (ids_BS, len_B) → states; a `T5Encoder`.
        tokenizer: its vocabulary.
        prompts: at least one.
        length: tokens every prompt is padded or cut to.
    """
    distinct = list(dict.fromkeys(prompts))
    ids_US, len_U = tokenizer.batch(distinct, length)
    graphdef, params = nnx.split(encoder, nnx.Param)
    size = 1 if jax.default_backend() == 'cpu' else _BATCH
    states = []
    for start in range(0, len(distinct), size):
        rows = slice(start, start + size)
        fill = max(0, start + size - len(distinct))
        ids_BS, len_B = np.pad(ids_US[rows], ((0, fill), (0, 0))), np.pad(len_U[rows], (0, fill))
        states.append(_states(graphdef, params, ids_BS, len_B))
    place = {text: row for row, text in enumerate(distinct)}
    order = np.array([place[text] for text in prompts])
    return jnp.concatenate(states)[order], jnp.asarray(len_U[order])
