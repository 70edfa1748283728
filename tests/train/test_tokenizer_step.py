"""The tokenizer's train step: it learns, and each part of it acts when and where it should."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import DataConfig, MeshConfig, OptimConfig, TokenizerRun, TrainConfig, VQConfig, VQLossConfig
from muse.errors import UserError
from muse.mesh import make_mesh, shard_batch, shardings
from muse.models import quantize
from muse.models.discriminator import lecam_penalty
from muse.models.vqgan import VQGAN, to_float
from muse.release.format import load_part
from muse.train import adversary
from muse.train.tokenizer import PERCEPTUAL, _quantizer_terms, gradients, make_nets, tokenizer_task

KEY = jax.random.key(0)
# The critic starts at step 2 and is held back by R1 on every second step.
PLAYS = {'adversarial': 0.1, 'adversarial_start_step': 2, 'r1': 10.0, 'r1_every_steps': 2}


def toy_run(loss: dict | None = None, model: dict | None = None, train: dict | None = None) -> TokenizerRun:
    sizes = {'channels': 8, 'channel_mult': (1, 2), 'num_res_blocks': 1, 'codebook_size': 64, 'code_dim': 8}
    data = DataConfig(path='unused', image_size=16)
    terms = {'discriminator_channels': 4, 'revive_after_steps': 10, 'r1_every_steps': 4, 'adversarial': 0.0}
    return TokenizerRun(
        model=VQConfig(**(sizes | {'l2_normalize': True} | (model or {}))),
        train=TrainConfig(**({'steps': 200, 'batch_size': 8} | (train or {}))),
        data=data,
        eval_data=data,
        loss=VQLossConfig(**(terms | (loss or {}))),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=3, b2=0.99),
        discriminator_optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, b2=0.99),
    )


def shapes_batch(seed: int, rows: int = 8, size: int = 16) -> dict[str, np.ndarray]:
    """A disc and a bar of random colours on a plain ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    img = np.zeros((rows, size, size, 3))
    for row in range(rows):
        ground, disc, bar = rng.integers(0, 256, (3, 3))
        centre, radius, top = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3), rng.uniform(0, 0.8)
        img[row] = ground
        img[row][(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = disc
        img[row][(y > top) & (y < top + 0.15)] = bar
    return {'img': img.astype(np.uint8)}


def jit(function, **kwargs):
    """`jax.jit` that spends its time on running, not on compiling: each test steps a program of its own a few times."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': '0'}, **kwargs)


@functools.lru_cache
def compiled(run: TokenizerRun):
    task = tokenizer_task(run)
    return task, jit(task.step), jit(task.evaluate)


@functools.lru_cache
def initial():
    """A fresh state. It is the same for every loss and dtype."""
    return jit(tokenizer_task(toy_run()).init)(KEY)


def train(run: TokenizerRun, steps: int, begin: int = 0):
    """The state after `steps` steps and their metrics. The first counts as number `begin`."""
    task, step, _ = compiled(run)
    state, history = initial() | {'step': jnp.array(begin)}, []
    for i in range(steps):
        state, metrics = step(state, task.prepare(shapes_batch(i)), jax.random.fold_in(KEY, i))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture(scope='module')
def trained():
    return train(toy_run(), 120)


def test_training_lowers_the_loss_and_raises_psnr(trained):
    state, history = trained
    last = {name: np.mean([h[name] for h in history[-5:]]) for name in history[0]}
    assert all(np.isfinite(value) for h in history for value in h.values())
    assert last['loss'] < 0.55 * history[0]['loss']
    assert last['psnr'] > history[0]['psnr'] + 5
    assert last['codebook_usage'] > 0.3 and last['perplexity'] > 8
    # Held-out pictures, through the average of the weights.
    task, _, evaluate = compiled(toy_run())
    batch = task.prepare(shapes_batch(10**6))
    before, after = evaluate(initial(), batch, KEY), evaluate(state, batch, KEY)
    assert float(after['psnr']) > float(before['psnr']) + 4 and float(after['loss']) < float(before['loss'])
    assert {'loss', 'l1', 'perceptual', 'commitment', 'psnr', 'codebook_usage', 'perplexity'} <= after.keys()


def test_metrics_that_the_log_promises(trained):
    names = {'loss', 'l1', 'perceptual', 'adversarial', 'disc', 'commitment', 'codebook_usage', 'perplexity', 'psnr'}
    assert names <= trained[1][0].keys()


def test_first_step_puts_unused_codes_on_encoder_outputs_and_later_ones_wait():
    task, step, _ = compiled(toy_run())
    start = initial() | {'step': jnp.array(0)}  # as `train` begins: its program is compiled already
    state, metrics = step(start, task.prepare(shapes_batch(0)), KEY)
    old, new = (np.asarray(s['params']['codebook'][...]) for s in (start, state))
    moved = np.abs(new - old).max(-1) > 0.02  # the optimiser alone moves less
    assert moved.mean() == pytest.approx(1 - float(metrics['codebook_usage']))
    averaged = np.asarray(state['ema']['codebook'][...])
    np.testing.assert_array_equal(averaged[moved], new[moved])
    np.testing.assert_array_equal(state['idle_steps'], np.zeros(64))
    state, metrics = step(state, task.prepare(shapes_batch(1)), KEY)
    idle = np.asarray(state['idle_steps'])
    assert set(idle) <= {0, 1} and idle.mean() == pytest.approx(1 - float(metrics['codebook_usage']))


def test_grid_shows_pictures_beside_reconstructions(trained):
    task = compiled(toy_run())[0]
    batch = task.prepare(shapes_batch(5))
    img = np.asarray(task.grid(trained[0], batch, KEY))
    assert img.shape == (16, 16, 16, 3) and img.dtype == np.uint8
    np.testing.assert_array_equal(img[::2], batch['img'])
    assert np.abs(img[1::2].astype(int) - img[::2]).mean() < 60


def test_export_is_read_back(trained, tmp_path):
    run = toy_run()
    compiled(run)[0].export(trained[0], str(tmp_path))
    part = load_part(tmp_path, 'tokenizer')
    assert part.config == run.model and equal(part.params, trained[0]['ema'])


@pytest.mark.slow
def test_loss_is_the_weighted_sum_of_all_its_terms_and_revival_can_be_off():
    terms = {'l2': 0.5, 'perceptual': 0.3, 'commitment': 0.7, 'codebook': 2.0, 'entropy': 0.2, 'adversarial': 0.1}
    run = toy_run(terms | {'revive_after_steps': 0, 'r1': 0.0}, {'l2_normalize': False})
    state, history = train(run, 2)
    weights = dataclasses.asdict(run.loss)
    for metrics in history:
        assert all(metrics[name] != 0 for name in terms)
        assert metrics['loss'] == pytest.approx(sum(weights[name] * metrics[name] for name in ('l1', *terms)), rel=1e-5)
    assert np.asarray(state['idle_steps']).max() == np.asarray(initial()['idle_steps']).max() + 2


@pytest.mark.slow
def test_commitment_weight_is_on_the_commitment_term():
    """The codebook's gradient is that of the codebook term at its own weight, and nothing else."""
    run = toy_run({'commitment': 7.0, 'codebook': 3.0})
    graphdef, params = make_nets(run).maker, initial()['params']
    batch = compiled(run)[0].prepare(shapes_batch(0))
    real_BHWC = to_float(jnp.asarray(batch['img']))

    def total(params):
        model: VQGAN = nnx.merge(graphdef, params)
        return _quantizer_terms(run.loss, model, model(real_BHWC))[0]

    def alone(params):
        model: VQGAN = nnx.merge(graphdef, params)
        latents_BhwC = model.latents(real_BHWC)
        return 3.0 * quantize.codebook_loss(latents_BhwC, model.codes()[model.lookup(latents_BhwC)])

    def of(loss, codebook):
        return loss(nnx.merge_state(params, nnx.State({'codebook': codebook})))

    found, expected = jit(lambda c: [jax.grad(functools.partial(of, f))(c)[...] for f in (total, alone)])(
        params['codebook']
    )
    assert float(jnp.abs(expected).max()) > 0
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_step_is_deterministic():
    assert equal(train(toy_run(PLAYS), 3)[0], train(toy_run(PLAYS), 3)[0])


def test_critic_waits_for_its_start_then_learns_with_r1():
    state, history = train(toy_run(PLAYS), 2)
    start = initial()
    assert equal(state['disc'], start['disc']) and equal(state['disc_opt'], start['disc_opt'])
    assert [h['disc'] for h in history] == [0, 0] and [h['adversarial'] for h in history] == [0, 0]
    state, later = train(toy_run(PLAYS), 30, begin=2)
    assert not equal(state['disc'], start['disc'])
    assert all(h['disc'] > 0 and h['adversarial'] > 0 for h in later)
    assert later[0]['r1'] > 0 and later[1]['r1'] == 0 and later[2]['r1'] > 0
    weights = {'l1': 1.0, 'perceptual': 0.05, 'adversarial': 0.1, 'commitment': 0.25, 'codebook': 1.0}
    for metrics in later[:3]:
        assert metrics['loss'] == pytest.approx(sum(w * metrics[name] for name, w in weights.items()), rel=1e-5)


@pytest.mark.slow
def test_critic_learns_to_tell_real_from_made():
    """With little R1, against reconstructions of the first few hundred steps."""
    _, history = train(toy_run(PLAYS), 80, begin=2)
    assert np.mean([h['disc'] for h in history[-20:]]) < np.mean([h['disc'] for h in history[:5]])


@pytest.mark.slow
def test_bf16_is_finite_and_learns():
    _, history = train(toy_run(PLAYS, {'dtype': 'bfloat16'}), 8)
    assert all(np.isfinite(value) for h in history for value in h.values())
    assert history[-1]['l1'] < 0.9 * history[0]['l1'] and history[2]['r1'] > 0


@pytest.mark.slow
def test_micro_batches_give_the_same_gradients():
    """Every leaf of both nets' gradients, R1 and LeCam included, and the losses, counts and latents."""
    found = []
    for accumulate in (1, 4):
        run = toy_run(PLAYS | {'lecam': 0.1, 'entropy': 0.0}, train={'accumulate': accumulate})
        nets, state = make_nets(run), initial() | {'step': jnp.array(2), 'logit_means': jnp.array([0.1, -0.1])}
        img, net = to_float(jnp.asarray(shapes_batch(0)['img'])), compiled(run)[0].prepare({})[PERCEPTUAL]
        of = jit(lambda state, img, run=run, nets=nets, net=net: gradients(run, nets, state, net, img, jnp.array(True)))
        found.append(of(state, img))
    (whole, latents), (parts, part_latents) = found
    assert float(whole.metrics['r1']) > 0
    for name in ('tokenizer', 'critic', 'metrics'):
        for one, other in zip(leaves(getattr(whole, name)), leaves(getattr(parts, name)), strict=True):
            np.testing.assert_allclose(other, one, rtol=2e-3, atol=1e-5 * max(1.0, np.abs(one).max()))
    np.testing.assert_array_equal(whole.counts_V, 4 * parts.counts_V)
    in_turns = part_latents.reshape(4, 2, -1).swapaxes(0, 1)  # micro-batch i holds pictures i and i + 4
    np.testing.assert_allclose(in_turns.reshape(latents.shape), latents, atol=1e-5)


def test_lecam_penalty_by_hand():
    """Real logits beyond the average of made ones (0.5) and made ones below that of real ones (1.0), squared."""
    real, fake = jnp.array([[[2.0, -1.0]]]), jnp.array([[[0.0, 3.0]]])
    found = lecam_penalty(real, fake, jnp.array([1.0, 0.5]))
    assert float(found) == pytest.approx((1.5**2 + 0) / 2 + (1.0**2 + 0) / 2)


@pytest.mark.slow
def test_lecam_follows_the_logits_and_holds_them_back():
    """The averages move by a hundredth of the step's mean logits; the penalty is in the critic's gradient alone."""
    state, history = train(toy_run(PLAYS | {'r1': 0.0, 'lecam': 5.0}), 1, begin=2)
    expected = [0.01 * history[0][f'logit_{side}'] for side in ('real', 'fake')]
    np.testing.assert_allclose(state['logit_means'], expected, rtol=1e-4)
    assert history[0]['r1'] == 0
    without, _ = train(toy_run(PLAYS | {'r1': 0.0}), 1, begin=2)
    assert not equal(state['disc'], without['disc']) and equal(state['params'], without['params'])


def test_adaptive_weight_by_hand():
    """Gradients that stand in for the last layer's: 0.1 · |(3, 4)| / |(0, 2)|, and bounded for a silent critic."""
    config = VQLossConfig(adversarial=0.1, adversarial_adaptive=True)
    others, own = jnp.array([3.0, 4.0]).reshape(1, 1, 2, 1), jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1)
    pad = [(0, 0), (0, 0), (0, 0), (0, 2)]
    found = adversary.Judgement(jnp.zeros(()), jnp.pad(others, pad), jnp.pad(own, pad), {})
    assert float(adversary.adversarial_weight(config, found, lambda g: g)) == pytest.approx(0.25, rel=1e-5)
    silent = found._replace(adversarial_BHWC=jnp.zeros_like(found.grad_BHWC))
    assert float(adversary.adversarial_weight(config, silent, lambda g: g)) == pytest.approx(1e3)


@pytest.mark.slow
def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    """Against whole backward passes: the tokenizer's gradient is the others' plus the weighed adversarial one."""
    runs = [toy_run(PLAYS | change) for change in ({}, {'adversarial': 1e-8}, {'adversarial_adaptive': True})]
    grads, img = [], to_float(jnp.asarray(shapes_batch(0)['img']))
    for run in runs:
        nets, net = make_nets(run), compiled(run)[0].prepare({})[PERCEPTUAL]
        of = jit(lambda state, img, run=run, nets=nets, net=net: gradients(run, nets, state, net, img, jnp.array(True)))
        grads.append(of(initial(), img)[0].tokenizer)
    last = [np.asarray(g['decoder']['conv_out']['kernel'][...]) for g in grads]
    own = (last[0] - last[1]) / 0.1
    weight = 0.1 * np.linalg.norm(last[1]) / np.linalg.norm(own)
    assert abs(weight / 0.1 - 1) > 0.1  # it does change something
    for fixed, others, adaptive in zip(*map(leaves, grads), strict=True):
        wanted = others + weight * (fixed - others) / 0.1
        np.testing.assert_allclose(adaptive, wanted, atol=5e-3 * (np.abs(wanted).max() + 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['fsq', 'lfq'])
def test_the_other_quantizers_train(kind):
    model = {'quantizer': kind, 'l2_normalize': False, 'code_dim': 3 if kind == 'fsq' else 6}
    model |= {'levels': (4, 4, 4)} if kind == 'fsq' else {}
    run = toy_run({'entropy': 0.1 if kind == 'lfq' else 0.0}, model)
    task, step, _ = compiled(run)
    state, history = jit(task.init)(KEY), []
    for i in range(25):
        state, metrics = step(state, task.prepare(shapes_batch(i)), jax.random.fold_in(KEY, i))
        history.append({name: float(value) for name, value in metrics.items()})
    assert 'codebook' not in state['params'] and history[-1]['l1'] < 0.85 * history[0]['l1']
    assert history[-1]['codebook_usage'] > 0.2
    assert ('commitment' in history[0]) == (kind == 'lfq')


@pytest.mark.slow
@pytest.mark.parametrize('loss', [{}, PLAYS])
def test_eight_devices_give_the_same_step(loss):
    run = toy_run(loss)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    task = tokenizer_task(run, mesh)
    with jax.set_mesh(mesh):
        layout = shardings(jax.eval_shape(task.init, KEY), mesh)
        split = ['fsdp' in sharding.spec for sharding in jax.tree.leaves(layout['params'])]
        assert sum(split) > 8  # kernels; norms and biases are whole everywhere
        state = jax.device_put(initial() | {'step': jnp.array(2)}, layout)
        batch = task.prepare(shard_batch(mesh, shapes_batch(0)))
        _, metrics = jit(task.step, in_shardings=(layout, None, None))(state, batch, jax.random.fold_in(KEY, 0))
    for name, value in train(run, 1, begin=2)[1][0].items():
        assert float(metrics[name]) == pytest.approx(value, rel=2e-3, abs=1e-6), name


def test_missing_perceptual_net(tmp_path):
    with pytest.raises(UserError, match='run tools/fetch_perceptual.py'):
        tokenizer_task(toy_run({'perceptual_net': str(tmp_path)}))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'loss': {'r1_every_steps': 0}}, 'loss.r1_every_steps is 0: give at least 1'),
        ({'loss': {'adversarial': -0.1}}, 'loss.adversarial is -0.1: give a weight of 0 or more'),
        ({'model': {'num_res_blocks': 0}}, 'model.num_res_blocks is 0: give at least 1'),
        ({'model': {'channel_mult': ()}}, r'model.channel_mult\[0\] is 0: give at least 1'),
        ({'model': {'decoder_channels': 0}}, 'model.decoder_channels is 0: give at least 1'),
        ({'model': {'quantizer': 'lfq', 'l2_normalize': False}}, r'must be 2\^code_dim'),
    ],
)
def test_sizes_and_losses_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        tokenizer_task(toy_run(**changes))


def test_pictures_that_are_no_whole_tokens():
    run = toy_run()
    wrong = dataclasses.replace(run, eval_data=dataclasses.replace(run.eval_data, image_size=17))
    with pytest.raises(UserError, match='eval_data.image_size is 17: a token covers 2 pixels, give a multiple of 2'):
        tokenizer_task(wrong)
