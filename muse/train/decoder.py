"""Decoder finetuning (appendix A.2): a new, larger decoder for a trained tokenizer, everything else frozen.

The paper trains it after all else: the transformers stay as they are, for encoder and codebook are untouched and the
ids mean what they meant. The exported tokenizer says so by naming the tokenizer whose ids it reads. Pictures are
encoded ahead of the step by the frozen tokenizer; the losses and the critic are those of `muse.train.tokenizer`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from muse.config import DecoderRun, VQConfig
from muse.errors import UserError
from muse.models.vqgan import VQGAN, Decoder, to_float, to_uint8
from muse.release.format import Part, load_part, save_part
from muse.train import adversary
from muse.train.adversary import Nets
from muse.train.frozen import Net, place
from muse.train.init_from import start_from
from muse.train.micro_batches import over_micro_batches
from muse.train.optim import make_optimizer, step_metrics, update_ema
from muse.train.row_weights import WEIGHT
from muse.train.task import Batch, Metrics, State, Task
from muse.train.tokenizer import GRID_PICTURES, PERCEPTUAL, check_sides, load_net

_FREE = ('decoder_channels', 'decoder_num_res_blocks', 'dtype')  # model keys that may differ from the tokenizer's
CODES = 'codes'  # batch key of the code vectors that the frozen tokenizer made of the pictures


def make_nets(run: DecoderRun) -> Nets:
    """Graphs alone; allocates nothing."""
    return adversary.make_nets(run, lambda key: Decoder(run.model, rngs=nnx.Rngs(params=key)))


def init_state(run: DecoderRun, key: Key[Array, '']) -> State:
    """Fresh weights of the decoder and its critic, the decoder's average, and the optimisers."""
    return adversary.init_state(run, lambda key: Decoder(run.model, rngs=nnx.Rngs(params=key)), key)


def _decode(run: DecoderRun, nets: Nets, params: nnx.State, codes_BhwC: Array) -> Float[Array, 'B H W 3']:
    return nnx.merge(nets.maker, params)(codes_BhwC.astype(run.model.dtype)).astype(jnp.float32)


def train_step(run: DecoderRun, nets: Nets, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One step of both optimisers. `batch`: 'img' uint8, and what `prepare` added: codes and the perceptual net."""
    playing = state['step'] >= run.loss.adversarial_start_step

    def of(rows: dict[str, Array]) -> tuple[Any, tuple[()]]:
        real_BHWC, weight_B = to_float(rows['img']), rows.get(WEIGHT)
        fake_BHWC, pull = jax.vjp(lambda params: _decode(run, nets, params, rows[CODES]), state['params'])
        critic = nnx.merge(nets.critic, state['disc'])
        found = adversary.judge(run.loss, batch[PERCEPTUAL], critic, real_BHWC, fake_BHWC, playing, weight_B)
        weight = adversary.adversarial_weight(run.loss, found, lambda g: pull(g)[0]['conv_out']['kernel'][...])
        (grads,) = pull(found.grad_BHWC + weight * found.adversarial_BHWC)
        disc, more = adversary.critic_gradients(run.loss, nets.critic, state, real_BHWC, fake_BHWC, playing, weight_B)
        loss = found.loss + weight * found.metrics['adversarial']
        return (grads, disc, found.metrics | more | {'loss': loss}), ()

    rows = {name: batch[name] for name in ('img', CODES, WEIGHT) if name in batch}
    (grads, disc, metrics), _ = over_micro_batches(of, rows, run.train.accumulate)
    updates, opt = make_optimizer(run.optim, run.train.steps).update(grads, state['opt'], state['params'])
    params, step = optax.apply_updates(state['params'], updates), state['step'] + 1
    new = {
        'step': step,
        'params': params,
        'ema': update_ema(state['ema'], params, step, run.train.ema_decay),
        'opt': opt,
        **adversary.update_critic(run, state, disc, metrics),
    }
    return new, metrics | step_metrics(run.optim, run.train.steps, state['step'], grads, params, updates)


def evaluate(run: DecoderRun, nets: Nets, state: State, batch: Batch) -> Metrics:
    """The averaged decoder on a batch: 'loss' (without the adversarial term), its terms, PSNR."""
    made_BHWC = _decode(run, nets, state['ema'], batch[CODES])
    real_BHWC = to_float(batch['img'])
    loss, metrics = adversary.picture_terms(run.loss, batch[PERCEPTUAL], real_BHWC, made_BHWC, batch.get(WEIGHT))
    return metrics | {'loss': loss}


def load_frozen(run: DecoderRun) -> Part:
    """The tokenizer whose decoder is replaced.

    Raises:
        UserError: it is missing or damaged, not one of ours, or `run.model` is not its shape.
    """
    part = load_part(run.tokenizer, 'tokenizer')
    if not isinstance(part.config, VQConfig):
        raise UserError(f"'{run.tokenizer}' holds a public tokenizer: only a decoder trained here can be finetuned")
    for field in dataclasses.fields(VQConfig):
        wanted, found = getattr(run.model, field.name), getattr(part.config, field.name)
        if field.name not in _FREE and wanted != found:
            raise UserError(
                f"model.{field.name} is {wanted}, the tokenizer '{run.tokenizer}' has {found}: set it to {found}"
            )
    return part


def encode(net: Net, img_BHWC: UInt8[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
    """The code vectors that the frozen tokenizer stores a batch of pictures as."""
    model: VQGAN = nnx.merge(net.graphdef, net.params)
    return model.codes()[model.encode(to_float(img_BHWC))]


def export(run: DecoderRun, part: Part, state: State, folder: str) -> None:
    """Writes the frozen encoder and codebook with the averaged decoder as a tokenizer of the same ids."""
    params = nnx.State({**part.params, 'decoder': state['ema']})
    config = dataclasses.replace(part.config, **{name: getattr(run.model, name) for name in _FREE if name != 'dtype'})
    extra = {**part.extra, 'ids_sha256': part.ids_hash, 'decoder_step': int(state['step'])}
    save_part(folder, 'tokenizer', config=config, params=params, storage='float32', extra=extra)


def decoder_task(run: DecoderRun, mesh: Mesh) -> Task:
    """The `Task` of a decoder run.

    Raises:
        UserError: as `load_frozen`, losses out of range, or the perceptual net is asked for and missing.
    """
    adversary.check_losses(run.loss)
    check_sides(run)
    part, nets, net = load_frozen(run), make_nets(run), load_net(run.loss, run.model, mesh)
    frozen = place(part, 'tokenizer', mesh)
    codes = jax.jit(lambda params, img_BHWC: encode(dataclasses.replace(frozen, params=params), img_BHWC))

    @jax.jit
    def draw(params: nnx.State, img_BHWC: Array, codes_BhwC: Array) -> Array:
        pair_NHWC = jnp.stack([img_BHWC, to_uint8(_decode(run, nets, params, codes_BhwC))], axis=1)
        return pair_NHWC.reshape(-1, *img_BHWC.shape[1:])

    def pictures(state: State, batch: Batch, key: Key[Array, ''], number: int) -> tuple[Array, Array]:
        pair_NHWC = draw(state['ema'], batch['img'][:number], batch[CODES][:number])
        return pair_NHWC[1::2], pair_NHWC[::2]

    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)
    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, nets, state, batch),
        evaluate=lambda state, batch, key: evaluate(run, nets, state, batch),
        export=lambda state, folder: export(run, part, state, folder),
        grid=lambda state, batch, key: draw(state['ema'], batch['img'][:GRID_PICTURES], batch[CODES][:GRID_PICTURES]),
        prepare=lambda batch: {**batch, CODES: codes(frozen.params, batch['img']), PERCEPTUAL: net},
        pictures=pictures,
        start=start_from(run.init_from, 'tokenizer', shapes, mesh, inside='decoder'),
    )
