"""What the training loop needs to know of a model: a handful of functions.

`muse.train.tokenizer`, `base` and `superres` each make one `Task`; `muse.train.loop` runs any of them. A new kind of
training is a new module that makes a `Task`, not a branch in the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Key

# {'step': i32 steps done, 'params': nnx.State, 'ema': nnx.State, optimiser states …}; never a random key.
State = dict[str, Any]
Batch = dict[str, Any]
Metrics = dict[str, Any]  # scalars, or `Buckets` of muse.train.averages


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of training, as functions of arrays and a key.

    Attributes:
        init: key → state. Pure; the loop jits it with sharded outputs, so that no device holds the whole of it.
        step: (state, batch, key) → (state, metrics). Pure; the loop jits it and donates the state. The key already
            depends on the step. 'loss', a scalar, is among the metrics.
        evaluate: (state, batch, key) → metrics. Pure, jitted by the loop; means over the batch; 'loss' is among them.
        export: (state, folder) writes the averaged weights as a part of a release.
        grid: (state, batch, key) → uint8 pictures `[N, H, W, 3]`, or None where there is nothing to show. Called as
            it is: it jits what it needs.
        prepare: batch → batch, before `step` and `evaluate`. Frozen nets encode here, outside of the donated state.
            Called as it is.
        encode_text: caption → (ids_S int32 padded, length), for the data workers; None: captions stay behind.
        pictures: (state, prepared batch, key, N) → (made, true), uint8 `[N, H, W, 3]` each: what the averaged weights
            make of the first N rows, and what it is held against. Called as it is.
        start: state → state, once, where a run starts anew: puts the weights of `init_from` in place. None: none.
    """

    init: Callable[[Key[Array, '']], State]
    step: Callable[[State, Batch, Key[Array, '']], tuple[State, Metrics]]
    evaluate: Callable[[State, Batch, Key[Array, '']], Metrics]
    export: Callable[[State, str], None]
    grid: Callable[[State, Batch, Key[Array, '']], Array | None] | None = None
    prepare: Callable[[Batch], Batch] | None = None
    encode_text: Callable[[str], tuple[np.ndarray, int]] | None = None
    pictures: Callable[[State, Batch, Key[Array, ''], int], tuple[Array, Array]] | None = None
    start: Callable[[State], State] | None = None
