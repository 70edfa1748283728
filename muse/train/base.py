"""Training of the base masked transformer (§2.3, §2.6, §2.7) over a frozen tokenizer and a frozen text encoder.

Batches hold either tokens and text states ('tok', 'txt', 'len': written by tools/precompute.py) or pictures and text
ids ('img', 'ids', 'len'), which the frozen nets then encode ahead of the step. The step is that of `muse.train.masked`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from muse.config import BaseRun, to_dict
from muse.mesh import batch_sharding
from muse.models.transformer import Transformer
from muse.release.format import save_part
from muse.train import masked
from muse.train.frozen import Frozen, encode_sheet, load_frozen
from muse.train.init_from import start_from
from muse.train.optim import fresh_state
from muse.train.task import Batch, Metrics, State, Task

GRID_PICTURES = 16


def init_state(run: BaseRun, key: Key[Array, '']) -> State:
    """Fresh weights, their average, and the optimiser's state."""
    return fresh_state(run, Transformer(run.model, rngs=nnx.Rngs(params=key)))


def predict(
    model: Transformer,
    tok_BT: Int[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    txt_BSD: Float[Array, 'B S D'],
    len_B: Int[Array, ' B'],
) -> Float[Array, 'B T V']:
    """Logits for a picture with [MASK] in place of the masked tokens."""
    return model(jnp.where(mask_BT, model.mask_id, tok_BT), txt_BSD, len_B)


def _predict(model: Transformer, batch: Batch) -> Array:
    return predict(model, batch['tok'], batch['mask'], batch['txt'], batch['len'])


def train_step(run: BaseRun, graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> tuple[State, Metrics]:
    """One step of the optimiser on a batch of true tokens; see `muse.train.masked`."""
    return masked.update(run, _predict, graphdef, state, masked.corrupt(run, batch, key))


def evaluate(graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> Metrics:
    """Held-out losses of the averaged weights; see `muse.train.masked.evaluate`."""
    return masked.evaluate(_predict, graphdef, state, batch, key)


def export_base(run: BaseRun, frozen: Frozen, state: State, folder: str) -> None:
    """Writes the averaged weights as the part 'base', naming the frozen nets they belong to."""
    extra = {
        'tokenizer_sha256': frozen.tokenizer_hash,
        'text_encoder_sha256': frozen.text_encoder_hash,
        'decode': to_dict(run.decode),
        'step': int(state['step']),
    }
    save_part(folder, 'base', config=run.model, params=state['ema'], storage='float32', extra=extra)


def base_task(run: BaseRun, mesh: Mesh) -> Task:
    """The `Task` of a base run; loads its frozen nets onto `mesh`.

    Raises:
        UserError: missing or foreign frozen parts, or shapes that do not fit the model's.
    """
    frozen = load_frozen(run, mesh)
    sheet = encode_sheet(run, frozen.text, mesh)
    abstract = nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(params=0)))
    graphdef, shapes = nnx.split(abstract, nnx.Param)
    below = {'tokenizer': frozen.tokenizer_hash, 'text_encoder': frozen.text_encoder_hash}

    def draw(state: State, batch: Batch, key: Key[Array, ''], number: int) -> Array:
        return frozen.draw(graphdef, state['ema'], batch, key, number)

    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, graphdef, state, batch, key),
        evaluate=lambda state, batch, key: evaluate(graphdef, state, batch, key),
        export=lambda state, folder: export_base(run, frozen, state, folder),
        grid=lambda state, batch, key: draw(state, sheet or batch, key, len(run.prompts) or GRID_PICTURES),
        prepare=lambda batch: frozen.encode(batch, batch_sharding(mesh)),
        encode_text=frozen.text.encode,
        pictures=lambda state, batch, key, number: (
            draw(state, batch, key, number),
            frozen.pixels(batch['tok'][:number]),
        ),
        start=start_from(run.init_from, 'base', shapes, mesh, below=below),
    )
