"""Training of the VQGAN tokenizer (§2.2, Table 5): one pure step for the tokenizer and its adversary together.

The tokenizer's loss is the sum of what `muse.train.adversary` says of the pictures and of the quantizer's own terms
(commitment and codebook loss, entropy). The critic learns from the same reconstructions, so one pass of the tokenizer
serves both. Every code starts as idle: after the first step the unused ones sit on encoder outputs, which is how the
codebook is initialised from data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from muse.config import DecoderRun, TokenizerRun, VQConfig, VQLossConfig
from muse.errors import UserError
from muse.mesh import replicated
from muse.models import perceptual, quantize
from muse.models.perceptual import Perceptual
from muse.models.vqgan import VQGAN, Reconstruction, to_float, to_uint8
from muse.nn.rows import weigh
from muse.release.format import save_part
from muse.train import adversary
from muse.train.adversary import Nets
from muse.train.init_from import start_from
from muse.train.micro_batches import over_micro_batches
from muse.train.optim import make_optimizer, step_metrics, update_ema
from muse.train.row_weights import WEIGHT
from muse.train.task import Batch, Metrics, State, Task

GRID_PICTURES = 8
PERCEPTUAL = 'perceptual_net'  # batch key under which the frozen net travels: as a constant it would bloat the program


class Gradients(NamedTuple):
    """What one (micro-)batch gives to a step."""

    tokenizer: nnx.State
    critic: nnx.State
    counts_V: Array
    metrics: Metrics


def make_nets(run: TokenizerRun) -> Nets:
    """Graphs alone; allocates nothing."""
    return adversary.make_nets(run, lambda key: VQGAN(run.model, rngs=nnx.Rngs(params=key)))


def init_state(run: TokenizerRun, key: Key[Array, '']) -> State:
    """Fresh weights of both nets, the average of the tokenizer's, the optimisers, and idle steps of every code."""
    state = adversary.init_state(run, lambda key: VQGAN(run.model, rngs=nnx.Rngs(params=key)), key)
    return state | {'idle_steps': jnp.full((run.model.codebook_size,), run.loss.revive_after_steps, jnp.int32)}


def _quantizer_terms(
    config: VQLossConfig, model: VQGAN, result: Reconstruction, weight_B: Array | None = None
) -> tuple[Array, Metrics]:
    """What the quantizer adds to the loss: the weighted sum of its terms, and each. `weight_B`: how rows count."""
    codes_VC, latents_BhwC = model.codes(), result.latents_BhwC
    chosen_BhwC = codes_VC[result.ids_Bhw]
    if weight_B is None:
        terms = model.quantizer.losses(latents_BhwC, chosen_BhwC)
    else:  # the terms are squares
        root_B = jnp.sqrt(weight_B)
        terms = model.quantizer.losses(weigh(latents_BhwC, root_B), weigh(chosen_BhwC, root_B))
        # The entropy is of all codes in use: a row that does not count is seen, and pulls at nothing.
        counts_B111 = weight_B[:, None, None, None] > 0
        latents_BhwC = jnp.where(counts_B111, latents_BhwC, jax.lax.stop_gradient(latents_BhwC))
    if config.entropy:
        terms['entropy'] = model.quantizer.entropy(latents_BhwC.reshape(-1, latents_BhwC.shape[-1]), codes_VC)
    return sum((getattr(config, name) * term for name, term in terms.items()), jnp.zeros(())), terms


def _tokenizer_gradients(
    run: TokenizerRun,
    nets: Nets,
    state: State,
    net: Perceptual,
    real_BHWC: Array,
    playing: Array,
    weight_B: Array | None,
) -> tuple[nnx.State, Metrics, Reconstruction]:
    def forward(params: nnx.State) -> tuple[tuple[Array, Array], tuple[Reconstruction, Metrics]]:
        model = nnx.merge(nets.maker, params)
        result = model(real_BHWC)
        own, terms = _quantizer_terms(run.loss, model, result, weight_B)
        return (result.img_BHWC, own), (result, terms)

    (fake_BHWC, own), pull, (result, terms) = jax.vjp(forward, state['params'], has_aux=True)
    critic = nnx.merge(nets.critic, state['disc'])
    found = adversary.judge(run.loss, net, critic, real_BHWC, fake_BHWC, playing, weight_B)

    def last_layer(grad_BHWC: Array) -> Array:
        # XLA drops all of this backward pass but the last layer.
        return pull((grad_BHWC, jnp.zeros(())))[0]['decoder']['conv_out']['kernel'][...]

    weight = adversary.adversarial_weight(run.loss, found, last_layer)
    (grads,) = pull((found.grad_BHWC + weight * found.adversarial_BHWC, jnp.ones(())))
    total = found.loss + own + weight * found.metrics['adversarial']
    return grads, found.metrics | terms | {'loss': total}, result


def gradients(
    run: TokenizerRun,
    nets: Nets,
    state: State,
    net: Perceptual,
    real_BHWC: Array,
    playing: Array,
    weight_B: Array | None = None,
) -> tuple[Gradients, Array]:
    """Gradients of both nets over a batch in `accumulate` micro-batches, and the latents `[N, C]` seen."""

    def of(rows: dict[str, Array]) -> tuple[Gradients, Array]:
        real_BHWC, weight_B = rows['img'], rows.get(WEIGHT)
        grads, metrics, result = _tokenizer_gradients(run, nets, state, net, real_BHWC, playing, weight_B)
        disc, more = adversary.critic_gradients(
            run.loss, nets.critic, state, real_BHWC, result.img_BHWC, playing, weight_B
        )
        latents_BhwC = jax.lax.stop_gradient(result.latents_BhwC)
        counts_V = quantize.counts(result.ids_Bhw, run.model.codebook_size)
        return Gradients(grads, disc, counts_V, metrics | more), latents_BhwC.reshape(-1, latents_BhwC.shape[-1])

    rows = {'img': real_BHWC} if weight_B is None else {'img': real_BHWC, WEIGHT: weight_B}
    return over_micro_batches(of, rows, run.train.accumulate)


def _revive(run: TokenizerRun, state: State, counts_V: Array, latents_NC: Array, key: Array) -> State:
    """Moves dead codes of the weights and of their average, and counts the idle steps on."""
    idle_V = quantize.count_idle(state['idle_steps'], counts_V)
    after = run.loss.revive_after_steps
    if not after or run.model.quantizer != 'vq':
        return state | {'idle_steps': idle_V}
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
    real_BHWC, weight_B = to_float(batch['img']), batch.get(WEIGHT)
    found, latents_NC = gradients(run, nets, state, batch[PERCEPTUAL], real_BHWC, playing, weight_B)
    with jax.named_scope('optimizer'):
        updates, opt = make_optimizer(run.optim, run.train.steps).update(found.tokenizer, state['opt'], state['params'])
        params, step = optax.apply_updates(state['params'], updates), state['step'] + 1
    new = {
        'step': step,
        'params': params,
        'ema': update_ema(state['ema'], params, step, run.train.ema_decay),
        'opt': opt,
        'idle_steps': state['idle_steps'],
        **adversary.update_critic(run, state, found.critic, found.metrics),
    }
    metrics = found.metrics | {
        'codebook_usage': quantize.usage(found.counts_V),
        'perplexity': quantize.perplexity(found.counts_V),
    }
    metrics |= step_metrics(run.optim, run.train.steps, state['step'], found.tokenizer, params, updates)
    with jax.named_scope('revival'):
        return _revive(run, new, found.counts_V, latents_NC, key), metrics


def evaluate(run: TokenizerRun, nets: Nets, state: State, batch: Batch) -> Metrics:
    """The averaged weights on a batch: 'loss' (without the adversarial term), its terms, PSNR, codebook use."""
    model, real_BHWC = nnx.merge(nets.maker, state['ema']), to_float(batch['img'])
    result = model(real_BHWC)
    weight_B = batch.get(WEIGHT)
    pictures, metrics = adversary.picture_terms(run.loss, batch[PERCEPTUAL], real_BHWC, result.img_BHWC, weight_B)
    own, terms = _quantizer_terms(run.loss, model, result, weight_B)
    counts_V = quantize.counts(result.ids_Bhw, run.model.codebook_size)
    use = {'codebook_usage': quantize.usage(counts_V), 'perplexity': quantize.perplexity(counts_V)}
    return metrics | terms | {'loss': pictures + own} | use


def draw(nets: Nets, params: nnx.State, img_BHWC: Array) -> Array:
    """Pictures and their reconstructions in turns: uint8 `[2N, H, W, 3]`."""
    model = nnx.merge(nets.maker, params)
    pair_NHWC = jnp.stack([img_BHWC, to_uint8(model.decode(model.encode(to_float(img_BHWC))))], axis=1)
    return pair_NHWC.reshape(-1, *img_BHWC.shape[1:])


def load_net(loss: VQLossConfig, model: VQConfig, mesh: Mesh | None) -> Perceptual:
    """The frozen perceptual net of a run in the model's compute dtype, on every device of `mesh`."""
    net = perceptual.load_lpips(loss.perceptual_net) if loss.perceptual_net else perceptual.random_net()
    net = net.astype(model.dtype)
    return jax.device_put(net, replicated(mesh)) if mesh else net


def export(run: TokenizerRun, state: State, folder: str) -> None:
    """Writes the averaged weights as the part 'tokenizer' of a release."""
    extra = {'step': int(state['step'])}
    save_part(folder, 'tokenizer', config=run.model, params=state['ema'], storage='float32', extra=extra)


def start_from_tokenizer(run: TokenizerRun, mesh: Mesh | None) -> Callable[[State], State] | None:
    """`start_from` for a tokenizer, whose codes count as used: those of a fresh one are put on encoder outputs."""
    shapes = nnx.state(nnx.eval_shape(lambda: VQGAN(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)
    start = start_from(run.init_from, 'tokenizer', shapes, mesh)
    if start is None:
        return None
    return lambda state: {**start(state), 'idle_steps': jnp.zeros_like(state['idle_steps'])}


def check_sides(run: TokenizerRun | DecoderRun) -> None:
    """Raises UserError when the sources' pictures are no whole number of tokens."""
    factor = run.model.factor
    for name, data in (('data', run.data), ('eval_data', run.eval_data)):
        if data.image_size < 1 or data.image_size % factor:
            raise UserError(
                f'{name}.image_size is {data.image_size}: a token covers {factor} pixels, give a multiple of {factor}'
            )


def tokenizer_task(run: TokenizerRun, mesh: Mesh | None = None) -> Task:
    """The `Task` of a tokenizer run.

    Raises:
        UserError: sizes or losses out of range, or the perceptual net is asked for and missing.
    """
    adversary.check_losses(run.loss)
    check_sides(run)
    nets, net = make_nets(run), load_net(run.loss, run.model, mesh)
    jitted_draw = jax.jit(lambda params, img_BHWC: draw(nets, params, img_BHWC))

    def pictures(state: State, batch: Batch, key: Key[Array, ''], number: int) -> tuple[Array, Array]:
        pair_NHWC = jitted_draw(state['ema'], batch['img'][:number])
        return pair_NHWC[1::2], pair_NHWC[::2]

    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, nets, state, batch, key),
        evaluate=lambda state, batch, key: evaluate(run, nets, state, batch),
        export=lambda state, folder: export(run, state, folder),
        grid=lambda state, batch, key: jitted_draw(state['ema'], batch['img'][:GRID_PICTURES]),
        prepare=lambda batch: {**batch, PERCEPTUAL: net},
        pictures=pictures,
        start=start_from_tokenizer(run, mesh),
    )
