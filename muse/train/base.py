"""Training of the base masked transformer (§2.3, §2.6, §2.7) over a frozen tokenizer and a frozen text encoder.

Batches hold either tokens and text states ('tok', 'txt', 'len': written by tools/precompute.py) or pictures and text
ids ('img', 'ids', 'len'), which the frozen nets then encode ahead of the step. Every draw of a row depends on
(seed, step, row of the global batch) alone: any mesh and any number of micro-batches give the same training.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from muse import masking
from muse.config import BaseRun, to_dict
from muse.mesh import batch_sharding
from muse.models.transformer import Transformer
from muse.release.format import save_part
from muse.train.frozen import Frozen, load_frozen
from muse.train.optim import learning_rate, make_optimizer, update_ema
from muse.train.task import Batch, Metrics, State, Task

GRID_PICTURES = 16


def init_state(run: BaseRun, key: Key[Array, '']) -> State:
    """Fresh weights, their average, and the optimiser's state."""
    params = nnx.split(Transformer(run.model, rngs=nnx.Rngs(params=key)), nnx.Param)[1]
    optimizer = make_optimizer(run.optim, run.train.steps)
    ema = jax.tree.map(jnp.copy, params)
    return {'step': jnp.zeros((), jnp.int32), 'params': params, 'ema': ema, 'opt': optimizer.init(params)}


def corrupt(run: BaseRun, batch: Batch, key: Key[Array, '']) -> Batch:
    """Adds the masks of §2.6 and drops the text of some rows (§2.7). Drawn for the whole batch at once."""
    ratio_key, mask_key, text_key = jax.random.split(key, 3)
    rows, tokens = batch['tok'].shape
    mask_BT = masking.random_mask(mask_key, masking.mask_ratio(ratio_key, rows), tokens)
    return {**batch, 'mask': mask_BT, 'len': masking.drop_text(text_key, batch['len'], run.loss.text_dropout)}


def predict(
    model: Transformer,
    tok_BT: Int[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    txt_BSD: Float[Array, 'B S D'],
    len_B: Int[Array, ' B'],
) -> Float[Array, 'B T V']:
    """Logits for a picture with [MASK] in place of the masked tokens."""
    return model(jnp.where(mask_BT, model.mask_id, tok_BT), txt_BSD, len_B)


def _loss(params: nnx.State, graphdef: Any, batch: Batch, label_smoothing: float) -> tuple[Array, Metrics]:
    logits_BTV = predict(nnx.merge(graphdef, params), batch['tok'], batch['mask'], batch['txt'], batch['len'])
    loss_B = masking.masked_ce(logits_BTV, batch['tok'], batch['mask'], label_smoothing)
    accuracy_B = masking.masked_accuracy(logits_BTV, batch['tok'], batch['mask'])
    return jnp.mean(loss_B), {'accuracy': jnp.mean(accuracy_B)}


def gradients(
    graphdef: Any, params: nnx.State, batch: Batch, label_smoothing: float, accumulate: int
) -> tuple[nnx.State, Metrics]:
    """Gradients and metrics of a corrupted batch, in `accumulate` micro-batches of equal size (the same result)."""
    value_and_grad = jax.value_and_grad(_loss, has_aux=True)

    def of(batch: Batch) -> tuple[nnx.State, Metrics]:
        (loss, metrics), grads = value_and_grad(params, graphdef, batch, label_smoothing)
        return grads, {'loss': loss, **metrics}

    if accumulate == 1:
        return of(batch)

    # Micro-batch i takes rows i, i + A, i + 2A …: each device keeps the rows it already holds.
    def split(x: Array) -> Array:
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x / accumulate, total, of(micro_batch)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, batch))
    micro_batches = {name: split(x) for name, x in batch.items()}
    return jax.lax.scan(add, zeros, micro_batches)[0]


def train_step(run: BaseRun, graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> tuple[State, Metrics]:
    """One step of the optimiser. Metrics: loss, accuracy on masked tokens, norms, learning rate."""
    batch = corrupt(run, batch, key)
    params = state['params']
    grads, metrics = gradients(graphdef, params, batch, run.loss.label_smoothing, run.train.accumulate)
    optimizer = make_optimizer(run.optim, run.train.steps)
    updates, opt = optimizer.update(grads, state['opt'], params)
    params = optax.apply_updates(params, updates)
    step = state['step'] + 1
    ema = update_ema(state['ema'], params, step, run.train.ema_decay)
    metrics |= {
        'grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(params),
        'update_norm': optax.tree.norm(updates),
        'learning_rate': learning_rate(run.optim, run.train.steps)(state['step']),
    }
    return {'step': step, 'params': params, 'ema': ema, 'opt': opt}, metrics


def evaluate(graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> Metrics:
    """Held-out loss of the averaged weights in nats per masked token, without label smoothing or text dropout.

    The same masks are filled in under the right caption ('loss'), under that of the row above ('loss_shuffled') and
    without text ('loss_no_text'); 'caption_wins' is the share of rows whose right caption beats the wrong one.
    """
    ratio_key, mask_key = jax.random.split(key)
    tok_BT, txt_BSD, len_B = batch['tok'], batch['txt'], batch['len']
    mask_BT = masking.random_mask(mask_key, masking.mask_ratio(ratio_key, tok_BT.shape[0]), tok_BT.shape[1])
    model = nnx.merge(graphdef, state['ema'])

    def nats(txt_BSD: Array, len_B: Array) -> tuple[Array, Array]:
        logits_BTV = predict(model, tok_BT, mask_BT, txt_BSD, len_B)
        return masking.masked_ce(logits_BTV, tok_BT, mask_BT), masking.masked_accuracy(logits_BTV, tok_BT, mask_BT)

    right_B, accuracy_B = nats(txt_BSD, len_B)
    shuffled_B, _ = nats(jnp.roll(txt_BSD, 1, axis=0), jnp.roll(len_B, 1))
    none_B, _ = nats(txt_BSD, jnp.zeros_like(len_B))
    return {
        'loss': jnp.mean(right_B),
        'loss_shuffled': jnp.mean(shuffled_B),
        'loss_no_text': jnp.mean(none_B),
        'accuracy': jnp.mean(accuracy_B),
        'caption_wins': jnp.mean((right_B < shuffled_B).astype(jnp.float32)),
    }


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
    abstract = nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(params=0)))
    graphdef = nnx.split(abstract, nnx.Param)[0]
    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, graphdef, state, batch, key),
        evaluate=lambda state, batch, key: evaluate(graphdef, state, batch, key),
        export=lambda state, folder: export_base(run, frozen, state, folder),
        grid=lambda state, batch, key: frozen.draw(graphdef, state['ema'], batch, key, GRID_PICTURES),
        prepare=lambda batch: frozen.encode(batch, batch_sharding(mesh)),
        encode_text=frozen.encode_text,
    )
