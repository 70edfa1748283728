"""One step and one evaluation of masked-token training (§2.3, §2.6, §2.7), shared by the base and the super-res.

What differs between them comes as `Predict`: which keys of a batch the model reads beside the masked tokens. Every draw
of a row depends on (seed, step, row of the global batch) alone: any mesh and any number of micro-batches give the same
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Key

from muse import masking
from muse.config import BaseRun, SuperresRun
from muse.train.micro_batches import over_micro_batches
from muse.train.optim import learning_rate, make_optimizer, update_ema
from muse.train.task import Batch, Metrics, State

Predict = Callable[[Any, Batch], Array]  # (model, batch with 'tok', 'mask' and the condition) → logits_BTV
Change = Callable[[Batch], Batch]


def init_state(run: BaseRun | SuperresRun, model: nnx.Module) -> State:
    """The state of a fresh model: its weights, their average, and the optimiser's state."""
    params = nnx.split(model, nnx.Param)[1]
    optimizer = make_optimizer(run.optim, run.train.steps)
    ema = jax.tree.map(jnp.copy, params)
    return {'step': jnp.zeros((), jnp.int32), 'params': params, 'ema': ema, 'opt': optimizer.init(params)}


def corrupt(run: BaseRun | SuperresRun, batch: Batch, key: Key[Array, '']) -> Batch:
    """Adds the masks of §2.6 and drops the text of some rows (§2.7). Drawn for the whole batch at once."""
    ratio_key, mask_key, text_key = jax.random.split(key, 3)
    rows, tokens = batch['tok'].shape
    mask_BT = masking.random_mask(mask_key, masking.mask_ratio(ratio_key, rows), tokens)
    return {**batch, 'mask': mask_BT, 'len': masking.drop_text(text_key, batch['len'], run.loss.text_dropout)}


def gradients(
    predict: Predict, graphdef: Any, params: nnx.State, batch: Batch, label_smoothing: float, accumulate: int
) -> tuple[nnx.State, Metrics]:
    """Gradients and metrics of a corrupted batch, in `accumulate` micro-batches of equal size (the same result)."""

    def loss(params: nnx.State, batch: Batch) -> tuple[Array, Metrics]:
        logits_BTV = predict(nnx.merge(graphdef, params), batch)
        loss_B = masking.masked_ce(logits_BTV, batch['tok'], batch['mask'], label_smoothing)
        accuracy_B = masking.masked_accuracy(logits_BTV, batch['tok'], batch['mask'])
        return jnp.mean(loss_B), {'accuracy': jnp.mean(accuracy_B)}

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def of(batch: Batch) -> tuple[tuple[nnx.State, Metrics], tuple[()]]:
        (loss, metrics), grads = value_and_grad(params, batch)
        return (grads, {'loss': loss, **metrics}), ()

    return over_micro_batches(of, batch, accumulate)[0]


def update(
    run: BaseRun | SuperresRun, predict: Predict, graphdef: Any, state: State, batch: Batch
) -> tuple[State, Metrics]:
    """One step of the optimiser on a corrupted batch. Metrics: loss, accuracy on masked tokens, norms, rate."""
    params = state['params']
    grads, metrics = gradients(predict, graphdef, params, batch, run.loss.label_smoothing, run.train.accumulate)
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


def other_caption(batch: Batch) -> Batch:
    """The batch with each row under the text of the row above."""
    return {**batch, 'txt': jnp.roll(batch['txt'], 1, axis=0), 'len': jnp.roll(batch['len'], 1)}


def no_text(batch: Batch) -> Batch:
    """The batch without text."""
    return {**batch, 'len': jnp.zeros_like(batch['len'])}


def evaluate(
    predict: Predict,
    graphdef: Any,
    state: State,
    batch: Batch,
    key: Key[Array, ''],
    others: Mapping[str, Change] | None = None,
) -> Metrics:
    """Held-out loss of the averaged weights in nats per masked token, without label smoothing or text dropout.

    The same masks are filled in under the right caption ('loss'), under that of the row above ('loss_shuffled') and
    without text ('loss_no_text'); 'caption_wins' is the share of rows whose right caption beats the wrong one.
    `others` adds a 'loss_<name>' for each further change of the batch.
    """
    ratio_key, mask_key = jax.random.split(key)
    rows, tokens = batch['tok'].shape
    batch = {**batch, 'mask': masking.random_mask(mask_key, masking.mask_ratio(ratio_key, rows), tokens)}
    model = nnx.merge(graphdef, state['ema'])

    def nats(logits_BTV: Array) -> Array:
        return masking.masked_ce(logits_BTV, batch['tok'], batch['mask'])

    logits_BTV = predict(model, batch)
    right_B = nats(logits_BTV)
    changes = {'shuffled': other_caption, 'no_text': no_text, **(others or {})}
    changed = {name: nats(predict(model, change(batch))) for name, change in changes.items()}
    return {
        'loss': jnp.mean(right_B),
        **{f'loss_{name}': jnp.mean(nats_B) for name, nats_B in changed.items()},
        'accuracy': jnp.mean(masking.masked_accuracy(logits_BTV, batch['tok'], batch['mask'])),
        'caption_wins': jnp.mean((right_B < changed['shuffled']).astype(jnp.float32)),
    }
