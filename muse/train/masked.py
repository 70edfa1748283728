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
from jaxtyping import Array, Bool, Float, Key

from muse import masking
from muse.config import BaseRun, SuperresRun
from muse.nn.layers import cast_matrices, restack, unstack
from muse.nn.rows import mean_rows
from muse.train.averages import Buckets
from muse.train.micro_batches import over_micro_batches
from muse.train.optim import make_optimizer, step_metrics, update_ema
from muse.train.row_weights import WEIGHT
from muse.train.task import Batch, Metrics, State

Predict = Callable[[Any, Batch], Array]  # (model, batch with 'tok', 'mask' and the condition) → logits_BTV
Change = Callable[[Batch], Batch]

BUCKETS = 5  # of the mask ratio: a fifth each


def corrupt(run: BaseRun | SuperresRun, batch: Batch, key: Key[Array, '']) -> Batch:
    """Adds the masks of §2.6 and drops the text of some rows (§2.7). Drawn for the whole batch at once."""
    ratio_key, mask_key, text_key = jax.random.split(key, 3)
    rows, tokens = batch['tok'].shape
    mask_BT = masking.random_mask(mask_key, masking.mask_ratio(ratio_key, rows), tokens)
    return {**batch, 'mask': mask_BT, 'len': masking.drop_text(text_key, batch['len'], run.loss.text_dropout)}


def by_mask_ratio(
    mask_BT: Bool[Array, 'B T'], weight_B: Float[Array, ' B'] | None = None, **rows: Float[Array, ' B']
) -> dict[str, Buckets]:
    """Sums of per-row numbers by the share of the row that is masked: '<name>_mask', fifths from 0 to 1 (§2.6).

    A loss near a ratio of 0 says how well neighbours are used, near 1 how well the text is.
    """
    ratio_B = jnp.mean(mask_BT.astype(jnp.float32), axis=1)
    which_BK = jax.nn.one_hot(jnp.minimum(ratio_B * BUCKETS, BUCKETS - 1).astype(jnp.int32), BUCKETS)
    if weight_B is not None:
        which_BK = which_BK * weight_B[:, None]
    count_K = jnp.sum(which_BK, axis=0)
    return {f'{name}_mask': Buckets(jnp.sum(which_BK * x_B[:, None], axis=0), count_K) for name, x_B in rows.items()}


def take_apart(graphdef: Any, params: nnx.State) -> tuple[Any, nnx.State]:
    """The model with its stacks taken apart where its config unrolls all layers; else as it is.

    The gradient is to be taken of what this returns, and `restack` is its way back: were the weights sliced out of
    their stacks within the differentiated function, each layer's gradient would be as large as a stack.
    """
    model = nnx.merge(graphdef, params)
    stacks = {name: layers for name, layers in model.stacks().items() if model.config.unroll >= layers}
    if not stacks:
        return graphdef, params
    model = nnx.merge(graphdef, cast_matrices(params, model.config.dtype))
    for name, layers in stacks.items():
        setattr(model, name, unstack(getattr(model, name), layers))
    return nnx.split(model, nnx.Param)


def gradients(
    predict: Predict, graphdef: Any, params: nnx.State, batch: Batch, label_smoothing: float, accumulate: int
) -> tuple[nnx.State, Metrics]:
    """Gradients and metrics of a corrupted batch, in `accumulate` micro-batches of equal size (the same result)."""

    apart_graphdef, apart = take_apart(graphdef, params)

    def loss(params: nnx.State, batch: Batch) -> tuple[Array, Metrics]:
        logits_BTV = predict(nnx.merge(apart_graphdef, params), batch)
        loss_B = masking.masked_ce(logits_BTV, batch['tok'], batch['mask'], label_smoothing)
        accuracy_B = masking.masked_accuracy(logits_BTV, batch['tok'], batch['mask'])
        buckets = by_mask_ratio(batch['mask'], batch.get(WEIGHT), loss=loss_B, accuracy=accuracy_B)
        return mean_rows(loss_B, batch.get(WEIGHT)), {'accuracy': mean_rows(accuracy_B, batch.get(WEIGHT)), **buckets}

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def of(batch: Batch) -> tuple[tuple[nnx.State, Metrics], tuple[()]]:
        (loss, metrics), grads = value_and_grad(apart, batch)
        return (restack(grads, params), {'loss': loss, **metrics}), ()

    return over_micro_batches(of, batch, accumulate)[0]


def update(
    run: BaseRun | SuperresRun, predict: Predict, graphdef: Any, state: State, batch: Batch
) -> tuple[State, Metrics]:
    """One step of the optimiser on a corrupted batch. Metrics: loss, accuracy on masked tokens (and both by
    mask ratio), norms, rate."""
    params = state['params']
    grads, metrics = gradients(predict, graphdef, params, batch, run.loss.label_smoothing, run.train.accumulate)
    step = state['step'] + 1
    with jax.named_scope('optimizer'):
        updates, opt = make_optimizer(run.optim, run.train.steps).update(grads, state['opt'], params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(state['ema'], params, step, run.train.ema_decay)
        metrics |= step_metrics(run.optim, run.train.steps, state['step'], grads, params, updates)
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
    model, weight_B = nnx.merge(graphdef, state['ema']), batch.get(WEIGHT)

    def nats(logits_BTV: Array) -> Array:
        return masking.masked_ce(logits_BTV, batch['tok'], batch['mask'])

    logits_BTV = predict(model, batch)
    right_B, accuracy_B = nats(logits_BTV), masking.masked_accuracy(logits_BTV, batch['tok'], batch['mask'])
    changes = {'shuffled': other_caption, 'no_text': no_text, **(others or {})}
    changed = {name: nats(predict(model, change(batch))) for name, change in changes.items()}
    return {
        'loss': mean_rows(right_B, weight_B),
        **{f'loss_{name}': mean_rows(nats_B, weight_B) for name, nats_B in changed.items()},
        'accuracy': mean_rows(accuracy_B, weight_B),
        'caption_wins': mean_rows((right_B < changed['shuffled']).astype(jnp.float32), weight_B),
        **by_mask_ratio(batch['mask'], weight_B, loss=right_B, accuracy=accuracy_B),
    }
