"""Training of the VQGAN tokenizer (§2.2, Table 5): one pure step for the tokenizer and its adversary together.

The tokenizer's loss is the sum of l1 (and l2), perceptual distance, adversarial loss, commitment and codebook loss.
The critic learns from the same reconstructions, so one pass of the tokenizer serves both. Every code starts as idle:
after the first step the unused ones sit on encoder outputs, which is how the codebook is initialised from data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from muse.config import TokenizerRun, VQLossConfig
from muse.evals.reconstruction import psnr
from muse.mesh import replicated
from muse.models import discriminator as adversary
from muse.models import perceptual, quantize
from muse.models.discriminator import Discriminator
from muse.models.perceptual import Perceptual
from muse.models.vqgan import VQGAN, to_float, to_uint8
from muse.release.format import save_part
from muse.train.optim import learning_rate, make_optimizer, update_ema
from muse.train.task import Batch, Metrics, State, Task

GRID_PICTURES = 8
PERCEPTUAL = 'perceptual_net'  # batch key under which the frozen net travels: as a constant it would bloat the program


class Nets(NamedTuple):
    """The graphs of the two nets that learn."""

    tokenizer: Any
    critic: Any


class Gradients(NamedTuple):
    """What one (micro-)batch gives to a step."""

    tokenizer: nnx.State
    critic: nnx.State
    counts_V: Array
    metrics: Metrics


def make_nets(run: TokenizerRun) -> Nets:
    """Graphs alone; allocates nothing."""

    def graph(make: Callable[[], nnx.Module]) -> Any:
        return nnx.split(nnx.eval_shape(make), nnx.Param)[0]

    return Nets(
        graph(lambda: VQGAN(run.model, rngs=nnx.Rngs(params=0))), graph(lambda: _critic(run, jax.random.key(0)))
    )


def _critic(run: TokenizerRun, key: Key[Array, '']) -> Discriminator:
    return Discriminator(run.loss.discriminator_channels, run.model.dtype, rngs=nnx.Rngs(params=key))


def init_state(run: TokenizerRun, key: Key[Array, '']) -> State:
    """Fresh weights of both nets, the average of the tokenizer's, the optimisers, and idle steps of every code."""
    tokenizer_key, critic_key = jax.random.split(key)
    params = nnx.split(VQGAN(run.model, rngs=nnx.Rngs(params=tokenizer_key)), nnx.Param)[1]
    disc = nnx.split(_critic(run, critic_key), nnx.Param)[1]
    return {
        'step': jnp.zeros((), jnp.int32),
        'params': params,
        'ema': jax.tree.map(jnp.copy, params),
        'disc': disc,
        'opt': make_optimizer(run.optim, run.train.steps).init(params),
        'disc_opt': make_optimizer(run.discriminator_optim, run.train.steps).init(disc),
        'idle_steps': jnp.full((run.model.codebook_size,), run.loss.revive_after_steps, jnp.int32),
    }


def _losses(
    config: VQLossConfig, model: VQGAN, net: Perceptual, real_BHWC: Array
) -> tuple[Array, Metrics, dict[str, Array]]:
    """All terms but the adversarial one: total, metrics, and what the rest of the step needs."""
    result = model(real_BHWC)
    codes_VC = model.codes()
    codes_BhwC, latents_BhwC = codes_VC[result.ids_Bhw], result.latents_BhwC
    # A picture's own features need no gradient: XLA then keeps none of that pass.
    real_features = jax.lax.stop_gradient(perceptual.features(net, real_BHWC))
    distance_B = perceptual.distance(net, real_features, perceptual.features(net, result.img_BHWC))
    difference = result.img_BHWC - real_BHWC
    terms = {
        'l1': jnp.mean(jnp.abs(difference)),
        'l2': jnp.mean(jnp.square(difference)),
        'perceptual': jnp.mean(distance_B),
        'commitment': quantize.commitment_loss(latents_BhwC, codes_BhwC),
        'codebook': quantize.codebook_loss(latents_BhwC, codes_BhwC),
    }
    if config.entropy:
        terms['entropy'] = quantize.entropy_loss(latents_BhwC.reshape(-1, latents_BhwC.shape[-1]), codes_VC)
    total = sum((getattr(config, name) * term for name, term in terms.items()), jnp.zeros(()))
    metrics = terms | {'psnr': jnp.mean(psnr(result.img_BHWC, real_BHWC))}
    outputs = {
        'fake': result.img_BHWC,
        'latents': latents_BhwC.reshape(-1, latents_BhwC.shape[-1]),
        'counts': quantize.counts(result.ids_Bhw, codes_VC.shape[0]),
    }
    return total, metrics, outputs


def _tokenizer_gradients(
    run: TokenizerRun, nets: Nets, state: State, net: Perceptual, real_BHWC: Array, playing: Array
) -> tuple[nnx.State, Metrics, dict[str, Array]]:
    critic = nnx.merge(nets.critic, state['disc'])

    def judge(img_BHWC: Array) -> Array:
        return adversary.generator_loss(critic(img_BHWC))

    def loss(params: nnx.State) -> tuple[Array, tuple[Metrics, dict[str, Array]]]:
        total, metrics, outputs = _losses(run.loss, nnx.merge(nets.tokenizer, params), net, real_BHWC)
        adversarial = jnp.zeros(())
        if run.loss.adversarial:
            adversarial = jax.lax.cond(playing, judge, lambda _: jnp.zeros(()), outputs['fake'])
        total = total + run.loss.adversarial * adversarial
        return total, (metrics | {'loss': total, 'adversarial': adversarial}, outputs)

    grads, (metrics, outputs) = jax.grad(loss, has_aux=True)(state['params'])
    return grads, metrics, outputs


def _critic_gradients(
    run: TokenizerRun, nets: Nets, disc: nnx.State, real_BHWC: Array, fake_BHWC: Array, playing: Array, step: Array
) -> tuple[nnx.State, Metrics]:
    """Gradients of the critic; zeros, and no work, before it plays. R1 joins every `r1_every_steps` steps."""
    both_BHWC = jnp.concatenate([real_BHWC, fake_BHWC])

    def loss(disc: nnx.State, penalised: bool) -> tuple[Array, Metrics]:
        critic = nnx.merge(nets.critic, disc)
        real, fake = jnp.split(critic(both_BHWC), 2)
        value = adversary.discriminator_loss(real, fake)
        penalty = adversary.r1_penalty(critic, real_BHWC) if penalised else jnp.zeros(())
        # A rare penalty is weighed up by its period.
        weight = run.loss.r1 * run.loss.r1_every_steps
        return value + weight * penalty, {'disc': value, 'r1': penalty}

    def off(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        return jax.tree.map(jnp.zeros_like, disc), {'disc': jnp.zeros(()), 'r1': jnp.zeros(())}

    def plain(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        return jax.grad(loss, has_aux=True)(disc, False)

    def penalised(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        return jax.grad(loss, has_aux=True)(disc, True)

    if not run.loss.adversarial:
        return off(disc)
    branches = [off, plain] + ([penalised] if run.loss.r1 else [])
    due = step % run.loss.r1_every_steps == 0 if run.loss.r1 else jnp.array(False)
    return jax.lax.switch(jnp.where(playing, jnp.where(due, 2, 1), 0), branches, disc)


def gradients(
    run: TokenizerRun, nets: Nets, state: State, net: Perceptual, real_BHWC: Array, playing: Array
) -> tuple[Gradients, Array]:
    """Gradients of both nets over a batch in `accumulate` micro-batches, and the latents `[N, C]` seen."""

    def of(real_BHWC: Array) -> tuple[Gradients, Array]:
        grads, metrics, outputs = _tokenizer_gradients(run, nets, state, net, real_BHWC, playing)
        fake_BHWC = jax.lax.stop_gradient(outputs['fake'])
        disc, more = _critic_gradients(run, nets, state['disc'], real_BHWC, fake_BHWC, playing, state['step'])
        return Gradients(grads, disc, outputs['counts'], metrics | more), outputs['latents']

    accumulate = run.train.accumulate
    if accumulate == 1:
        return of(real_BHWC)

    def add(total: Gradients, real_BHWC: Array) -> tuple[Gradients, Array]:
        found, latents_NC = of(real_BHWC)
        return jax.tree.map(lambda t, x: t + x / accumulate, total, found), latents_NC

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, real_BHWC[::accumulate])[0])
    # Micro-batch i takes rows i, i + A, i + 2A …: each device keeps the rows it already holds.
    micro_batches = real_BHWC.reshape(-1, accumulate, *real_BHWC.shape[1:]).swapaxes(0, 1)
    total, latents_ANC = jax.lax.scan(add, zeros, micro_batches)
    return total, latents_ANC.reshape(-1, latents_ANC.shape[-1])


def _revive(run: TokenizerRun, state: State, counts_V: Array, latents_NC: Array, key: Array) -> State:
    """Moves dead codes of the weights and of their average, and counts the idle steps on."""
    idle_V = quantize.count_idle(state['idle_steps'], counts_V)
    if not run.loss.revive_after_steps:
        return state | {'idle_steps': idle_V}
    after = run.loss.revive_after_steps
    moved: State = {'idle_steps': idle_V}
    for name in ('params', 'ema'):
        # The same key and counts: both codebooks get the same latents.
        codes_VC = state[name]['codebook'][...]
        new_VC, moved['idle_steps'] = quantize.revive(codes_VC, idle_V, latents_NC, key, after)
        moved[name] = nnx.merge_state(state[name], nnx.State({'codebook': state[name]['codebook'].replace(new_VC)}))
    return state | moved


def train_step(run: TokenizerRun, nets: Nets, state: State, batch: Batch, key: Key[Array, '']) -> tuple[State, Metrics]:
    """One step of both optimisers. `batch`: 'img' uint8 `[B, H, W, 3]` and the frozen net that `prepare` added."""
    playing = state['step'] >= run.loss.adversarial_start_step
    found, latents_NC = gradients(run, nets, state, batch[PERCEPTUAL], to_float(batch['img']), playing)
    updates, opt = make_optimizer(run.optim, run.train.steps).update(found.tokenizer, state['opt'], state['params'])
    params = optax.apply_updates(state['params'], updates)

    def learn(disc: nnx.State, disc_opt: Any) -> tuple[nnx.State, Any]:
        optimizer = make_optimizer(run.discriminator_optim, run.train.steps)
        updates, disc_opt = optimizer.update(found.critic, disc_opt, disc)
        return optax.apply_updates(disc, updates), disc_opt  # pyright: ignore[reportReturnType]

    disc, disc_opt = state['disc'], state['disc_opt']
    if run.loss.adversarial:
        disc, disc_opt = jax.lax.cond(playing, learn, lambda *old: old, disc, disc_opt)
    step = state['step'] + 1
    ema = update_ema(state['ema'], params, step, run.train.ema_decay)
    new = {'step': step, 'params': params, 'ema': ema, 'disc': disc, 'opt': opt, 'disc_opt': disc_opt}
    new = _revive(run, new | {'idle_steps': state['idle_steps']}, found.counts_V, latents_NC, key)
    metrics = found.metrics | {
        'codebook_usage': quantize.usage(found.counts_V),
        'perplexity': quantize.perplexity(found.counts_V),
        'grad_norm': optax.tree.norm(found.tokenizer),
        'learning_rate': learning_rate(run.optim, run.train.steps)(state['step']),
    }
    return new, metrics


def evaluate(run: TokenizerRun, nets: Nets, state: State, batch: Batch) -> Metrics:
    """The averaged weights on a batch: 'loss' (without the adversarial term), its terms, PSNR, codebook use."""
    model = nnx.merge(nets.tokenizer, state['ema'])
    total, metrics, outputs = _losses(run.loss, model, batch[PERCEPTUAL], to_float(batch['img']))
    return metrics | {
        'loss': total,
        'codebook_usage': quantize.usage(outputs['counts']),
        'perplexity': quantize.perplexity(outputs['counts']),
    }


def draw(nets: Nets, params: nnx.State, img_BHWC: Array) -> Array:
    """Pictures and their reconstructions in turns: uint8 `[2N, H, W, 3]`."""
    model = nnx.merge(nets.tokenizer, params)
    pair_NHWC = jnp.stack([img_BHWC, to_uint8(model.decode(model.encode(to_float(img_BHWC))))], axis=1)
    return pair_NHWC.reshape(-1, *img_BHWC.shape[1:])


def load_net(run: TokenizerRun, mesh: Mesh | None) -> Perceptual:
    """The frozen perceptual net of a run in its compute dtype, on every device of `mesh`."""
    net = perceptual.load_lpips(run.loss.perceptual_net) if run.loss.perceptual_net else perceptual.random_net()
    net = net.astype(run.model.dtype)
    return jax.device_put(net, replicated(mesh)) if mesh else net


def export(run: TokenizerRun, state: State, folder: str) -> None:
    """Writes the averaged weights as the part 'tokenizer' of a release."""
    extra = {'step': int(state['step'])}
    save_part(folder, 'tokenizer', config=run.model, params=state['ema'], storage='float32', extra=extra)


def tokenizer_task(run: TokenizerRun, mesh: Mesh | None = None) -> Task:
    """The `Task` of a tokenizer run.

    Raises:
        UserError: the perceptual net is asked for and missing.
    """
    nets, net = make_nets(run), load_net(run, mesh)
    jitted_draw = jax.jit(lambda params, img_BHWC: draw(nets, params, img_BHWC))
    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, nets, state, batch, key),
        evaluate=lambda state, batch, key: evaluate(run, nets, state, batch),
        export=lambda state, folder: export(run, state, folder),
        grid=lambda state, batch, key: jitted_draw(state['ema'], batch['img'][:GRID_PICTURES]),
        prepare=lambda batch: {**batch, PERCEPTUAL: net},
    )
