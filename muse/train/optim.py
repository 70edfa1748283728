"""Optimisers (Table 4: AdaFactor; Table 5: Adam), the learning rate, the moving average of the weights, and what a
state begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike

from muse.config import OptimConfig, Run
from muse.train.task import State

_STACKED = 'layers'  # logical axis that counts copies of a layer; it makes no vector a matrix


def learning_rate(config: OptimConfig, steps: int) -> Callable[[ArrayLike], Array]:
    """Linear warm-up from 0 to the peak, then a cosine down to `final_fraction` of it at step `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))

    def at(step: ArrayLike) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / (warmup + 1)
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        falling = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return config.learning_rate * jnp.where(step < warmup, rising, falling)

    return at


def is_matrix(variable: Any) -> bool:
    """True for kernels and tables: two or more dimensions beside the axis that counts stacked layers."""
    axes = variable.get_metadata().get('axes', ()) if isinstance(variable, nnx.Variable) else ()
    return variable.ndim - (_STACKED in axes) >= 2


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Adds rate·W to the update of every matrix; norms, biases and single vectors are left alone."""

    def is_leaf(x):
        return isinstance(x, nnx.Variable)

    def update(updates, state, params=None):
        def decay(update, param):
            return jax.tree.map(lambda u, p: u + rate * p, update, param) if is_matrix(param) else update

        return jax.tree.map(decay, updates, params, is_leaf=is_leaf), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _adafactor_decay(step: ArrayLike, limit: ArrayLike) -> Array:
    """Decay of the second moments: 1 − t^−0.8 as AdaFactor has it, never above the configured b2."""
    return jnp.minimum(1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -0.8, limit)


def _scale(config: OptimConfig) -> optax.GradientTransformation:
    if config.name == 'adamw':
        return optax.scale_by_adam(b1=config.b1, b2=config.b2)
    # Factored second moments, updates clipped to a root mean square of 1, and momentum (Table 4 has beta1 = 0.9).
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=config.b2, decay_rate_fn=_adafactor_decay),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False) if config.b1 else optax.identity(),
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config` for a run of `steps` steps: clip, scale, decay matrices, learning rate.

    Weight decay is decoupled: each step takes away learning_rate · weight_decay of a matrix.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip) if config.gradient_clip else optax.identity(),
        _scale(config),
        _decay_matrices(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def fresh_state(run: Run, model: nnx.Module) -> State:
    """The state of a fresh model: its weights, their average, and the optimiser's state."""
    params = nnx.split(model, nnx.Param)[1]
    optimizer = make_optimizer(run.optim, run.train.steps)
    ema = jax.tree.map(jnp.copy, params)
    return {'step': jnp.zeros((), jnp.int32), 'params': params, 'ema': ema, 'opt': optimizer.init(params)}


def step_metrics(
    config: OptimConfig, steps: int, step: Array, grads: Any, params: Any, updates: Any
) -> dict[str, Array]:
    """Norms of one step, and its rate. `step`: steps done before; `grads`: not clipped; `params`: with `updates` in."""
    return {
        'grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(params),
        'update_norm': optax.tree.norm(updates),
        'learning_rate': learning_rate(config, steps)(step),
    }


def update_ema(ema: Any, params: Any, step: Array, decay: float) -> Any:
    """Moving average of the weights after `step` steps, with decay min(decay, (1 + step) / (10 + step))."""
    step = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p, ema, params)
