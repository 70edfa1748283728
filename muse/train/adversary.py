"""What judges the pictures that a tokenizer's decoder makes (§2.2, Table 5): perceptual net and critic.

`judge` turns pictures and their reconstructions into losses and gradients at the pixels, for whatever made them: the
whole tokenizer, or a decoder alone (appendix A.2). The critic learns from the same reconstructions. The paper gives the
weights of the losses alone; the penalty that keeps the critic in bounds is R1 (Mescheder et al. 2018) or LeCam (Tseng
et al. 2021) here, and the adaptive weight is that of VQGAN (Esser et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from muse.config import DecoderRun, TokenizerRun, VQLossConfig
from muse.errors import UserError
from muse.evals.reconstruction import psnr
from muse.models import discriminator as adversary
from muse.models import perceptual
from muse.models.discriminator import Discriminator
from muse.models.perceptual import Perceptual
from muse.nn.rows import mean_rows
from muse.train.optim import fresh_state, make_optimizer
from muse.train.task import Metrics, State

_LECAM_DECAY = 0.99  # of the averages of the critic's logits
_MOST_ADAPTIVE = 1e4

AdversarialRun = TokenizerRun | DecoderRun
MakeMaker = Callable[[Key[Array, '']], nnx.Module]


class Nets(NamedTuple):
    """The graphs of the two nets that learn."""

    maker: Any  # of pictures: the tokenizer, or its decoder
    critic: Any


class Judgement(NamedTuple):
    """Losses of reconstructions: their weighted sum without the adversarial one, and gradients at the pixels."""

    loss: Float[Array, '']
    grad_BHWC: Float[Array, 'B H W 3']  # of `loss`
    adversarial_BHWC: Float[Array, 'B H W 3']  # of the adversarial loss, unweighted; 0 while the critic does not play
    metrics: Metrics


def check_losses(config: VQLossConfig) -> None:
    """Raises UserError when a weight is negative or a count of the losses is out of range."""
    for name in ('l1', 'l2', 'perceptual', 'adversarial', 'r1', 'lecam', 'commitment', 'codebook', 'entropy'):
        if getattr(config, name) < 0:
            raise UserError(f'loss.{name} is {getattr(config, name)}: give a weight of 0 or more')
    for name, low in (
        ('r1_every_steps', 1),
        ('discriminator_channels', 1),
        ('adversarial_start_step', 0),
        ('revive_after_steps', 0),
    ):
        if getattr(config, name) < low:
            raise UserError(f'loss.{name} is {getattr(config, name)}: give at least {low}')


def make_nets(run: AdversarialRun, maker: MakeMaker) -> Nets:
    """Graphs alone; allocates nothing. `maker`: the net that makes pictures, out of its key."""
    key = jax.random.key(0)
    graphs = (nnx.split(nnx.eval_shape(make), nnx.Param)[0] for make in (lambda: maker(key), lambda: _critic(run, key)))
    return Nets(*graphs)


def init_state(run: AdversarialRun, maker: MakeMaker, key: Key[Array, '']) -> State:
    """Fresh weights of both nets, the average of the maker's, and the optimisers."""
    maker_key, critic_key = jax.random.split(key)
    disc = nnx.split(_critic(run, critic_key), nnx.Param)[1]
    disc_opt = make_optimizer(run.discriminator_optim, run.train.steps).init(disc)
    critic = {'disc': disc, 'disc_opt': disc_opt, 'logit_means': jnp.zeros((2,))}
    return fresh_state(run, maker(maker_key)) | critic


def _critic(run: AdversarialRun, key: Key[Array, '']) -> Discriminator:
    """A fresh critic, computing in the tokenizer's dtype."""
    return Discriminator(run.loss.discriminator_channels, run.model.dtype, rngs=nnx.Rngs(params=key))


def picture_terms(
    config: VQLossConfig,
    net: Perceptual,
    real_BHWC: Array,
    fake_BHWC: Array,
    weight_B: Float[Array, ' B'] | None = None,
) -> tuple[Array, Metrics]:
    """l1, l2 and perceptual distance of reconstructions: their weighted sum, and each. `weight_B`: how rows count."""
    terms = {
        'l1': mean_rows(jnp.abs(fake_BHWC - real_BHWC), weight_B),
        'l2': mean_rows(jnp.square(fake_BHWC - real_BHWC), weight_B),
        'perceptual': jnp.zeros(()),
    }
    if config.perceptual:
        # A picture's own features need no gradient: XLA then keeps none of that pass.
        with jax.named_scope('perceptual'):
            real_features = jax.lax.stop_gradient(perceptual.features(net, real_BHWC))
            distance_B = perceptual.distance(net, real_features, perceptual.features(net, fake_BHWC))
        terms['perceptual'] = mean_rows(distance_B, weight_B)
    total = sum((getattr(config, name) * term for name, term in terms.items()), jnp.zeros(()))
    return total, terms | {'psnr': mean_rows(psnr(fake_BHWC, real_BHWC), weight_B)}


def judge(
    config: VQLossConfig,
    net: Perceptual,
    critic: Callable[[Array], Array],
    real_BHWC: Float[Array, 'B H W 3'],
    fake_BHWC: Float[Array, 'B H W 3'],
    playing: Array,
    weight_B: Float[Array, ' B'] | None = None,
) -> Judgement:
    """Losses of reconstructions and their gradients at the pixels.

    `playing`: whether the critic has a say yet; `weight_B`: how rows count.
    """
    fake_BHWC = jax.lax.stop_gradient(fake_BHWC)
    (loss, metrics), grad_BHWC = jax.value_and_grad(
        lambda fake_BHWC: picture_terms(config, net, real_BHWC, fake_BHWC, weight_B), has_aux=True
    )(fake_BHWC)
    silent = jnp.zeros(()), jnp.zeros_like(fake_BHWC)
    adversarial, adversarial_BHWC = silent
    if config.adversarial:
        fool = jax.value_and_grad(lambda fake_BHWC: adversary.generator_loss(critic(fake_BHWC), weight_B))
        with jax.named_scope('critic'):
            adversarial, adversarial_BHWC = jax.lax.cond(playing, fool, lambda _: silent, fake_BHWC)
    return Judgement(loss, grad_BHWC, adversarial_BHWC, metrics | {'adversarial': adversarial})


def adversarial_weight(
    config: VQLossConfig, judgement: Judgement, last_layer: Callable[[Array], Array]
) -> Float[Array, '']:
    """The weight of the adversarial loss.

    Adaptive: times the length of the other losses' gradient at the decoder's last kernel over that of the adversarial
    one's, so that its say does not depend on the critic's scale.

    Args:
        config: the losses.
        judgement: what `judge` gave.
        last_layer: gradient at the pixels → gradient of the decoder's last kernel.
    """
    if not config.adversarial_adaptive:
        return jnp.asarray(config.adversarial)
    own, others = (jnp.linalg.norm(last_layer(g)) for g in (judgement.adversarial_BHWC, judgement.grad_BHWC))
    return config.adversarial * jnp.minimum(others / (own + 1e-6), _MOST_ADAPTIVE)


def critic_gradients(
    config: VQLossConfig,
    graph: Any,
    state: State,
    real_BHWC: Array,
    fake_BHWC: Array,
    playing: Array,
    weight_B: Float[Array, ' B'] | None = None,
) -> tuple[nnx.State, Metrics]:
    """Gradients of the critic; zeros, and no work, before it plays. R1 joins every `r1_every_steps` steps."""
    both_BHWC = jnp.concatenate([real_BHWC, jax.lax.stop_gradient(fake_BHWC)])
    disc, means = state['disc'], state['logit_means']

    def loss(disc: nnx.State, penalised: bool) -> tuple[Array, Metrics]:
        critic = nnx.merge(graph, disc)
        real, fake = jnp.split(critic(both_BHWC), 2)
        value = adversary.discriminator_loss(real, fake, weight_B)
        penalty = adversary.r1_penalty(critic, real_BHWC, weight_B) if penalised else jnp.zeros(())
        # A rare penalty is weighed up by its period.
        total = value + config.r1 * config.r1_every_steps * penalty
        if config.lecam:
            total = total + config.lecam * adversary.lecam_penalty(real, fake, means, weight_B)
        means_now = {'logit_real': mean_rows(real, weight_B), 'logit_fake': mean_rows(fake, weight_B)}
        return total, {'disc': value, 'r1': penalty, **means_now}

    def off(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        names = ('disc', 'r1', 'logit_real', 'logit_fake')
        return jax.tree.map(jnp.zeros_like, disc), {name: jnp.zeros(()) for name in names}

    def plain(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        return jax.grad(loss, has_aux=True)(disc, False)

    def penalised(disc: nnx.State) -> tuple[nnx.State, Metrics]:
        return jax.grad(loss, has_aux=True)(disc, True)

    if not config.adversarial:
        return off(disc)
    branches = [off, plain] + ([penalised] if config.r1 else [])
    due = state['step'] % config.r1_every_steps == 0 if config.r1 else jnp.array(False)
    with jax.named_scope('critic'):
        return jax.lax.switch(jnp.where(playing, jnp.where(due, 2, 1), 0), branches, disc)


def update_critic(run: AdversarialRun, state: State, grads: nnx.State, metrics: Metrics) -> dict[str, Any]:
    """The critic's part of the state after a step; as it was before the critic plays."""
    old = {name: state[name] for name in ('disc', 'disc_opt', 'logit_means')}

    def learn(old: dict[str, Any]) -> dict[str, Any]:
        optimizer = make_optimizer(run.discriminator_optim, run.train.steps)
        updates, disc_opt = optimizer.update(grads, old['disc_opt'], old['disc'])
        found = jnp.stack([metrics['logit_real'], metrics['logit_fake']])
        means = _LECAM_DECAY * old['logit_means'] + (1 - _LECAM_DECAY) * found
        return {'disc': optax.apply_updates(old['disc'], updates), 'disc_opt': disc_opt, 'logit_means': means}

    if not run.loss.adversarial:
        return old
    return jax.lax.cond(state['step'] >= run.loss.adversarial_start_step, learn, lambda old: old, old)
