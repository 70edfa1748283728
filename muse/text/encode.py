"""Prompts → text states: the one way from words to what the transformer reads (§2.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from muse.errors import UserError
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


class PromptCache:
    """Text states by model and text, so that a prompt is encoded once however often it is drawn.

    One cache may serve several models. It keeps at most `max_bytes` of states and lets the longest unused go first.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        """Raises UserError when `max_bytes` is negative; 0 keeps nothing."""
        if max_bytes < 0:
            raise UserError(f'max_bytes is {max_bytes}: it must be 0 (keep nothing) or more')
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[str, int, str], tuple[Array, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def encode(
        self, model: str, encoder: nnx.Module, tokenizer: Tokenizer, prompts: Sequence[str], length: int
    ) -> dict[str, tuple[Float[Array, 'S D'], int]]:
        """States `[length, D]` and length of each distinct prompt, in the order of first mention.

        Args:
            model: the hash of the text encoder: what was kept of another one is not used.
            encoder, tokenizer, length: as for `encode_prompts`, which encodes all that are new in one call.
            prompts: any number, repeats allowed. All are returned, also where they do not all fit into the cache.
        """
        distinct = list(dict.fromkeys(prompts))
        found = {text: self._kept[key] for text in distinct if (key := (model, length, text)) in self._kept}
        new = [text for text in distinct if text not in found]
        if new:
            txt_BSD, len_B = encode_prompts(encoder, tokenizer, new, length)
            found |= {text: (txt_BSD[i], int(len_B[i])) for i, text in enumerate(new)}
        for text in distinct:
            self._keep((model, length, text), found[text])
        return {text: found[text] for text in distinct}

    def _keep(self, key: tuple[str, int, str], value: tuple[Array, int]) -> None:
        if key not in self._kept:
            self._kept[key] = value
            self._bytes += value[0].nbytes
        self._kept.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, (states, _) = self._kept.popitem(last=False)
            self._bytes -= states.nbytes
