"""Decoder finetuning: only the decoder learns, the ids stay what they were, and a base takes the new tokenizer."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_tokenizer_step import shapes_batch
from tiny import VQ, random_params

from muse.config import DataConfig, DecoderRun, MeshConfig, OptimConfig, TrainConfig, VQLossConfig
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.models.vqgan import VQGAN, to_float
from muse.release.format import load_part, load_release, save_part
from muse.train.decoder import decoder_task, export, load_frozen
from muse.train.frozen import encode_pictures, place

KEY = jax.random.key(0)


def toy_run(folder, model=None, **loss) -> DecoderRun:
    """A decoder of twice the width and depth for the tokenizer in `folder`; the critic plays from the start."""
    data = DataConfig(path='unused', image_size=16)
    larger = {'decoder_channels': 16, 'decoder_num_res_blocks': 2}
    return DecoderRun(
        model=dataclasses.replace(VQ, **(larger | (model or {}))),
        train=TrainConfig(steps=40, batch_size=8, ema_decay=0.9),
        data=data,
        eval_data=data,
        tokenizer=str(folder),
        loss=VQLossConfig(discriminator_channels=4, r1=0.0, **loss),  # R1 is tested, and compiled, with the tokenizer
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=3, b2=0.99),
        discriminator_optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, b2=0.99),
    )


@pytest.fixture(scope='module')
def finetuned(tmp_path_factory):
    """(folder of the frozen tokenizer, folder of the finetuned one, metrics of every step)."""
    folder = tmp_path_factory.mktemp('decoder')
    save_part(folder / 'old', 'tokenizer', config=VQ, params=random_params('tokenizer', VQ), storage='float32')
    run, mesh = toy_run(folder / 'old'), make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = decoder_task(run, mesh)
        quick = {'compiler_options': {'xla_backend_optimization_level': '0'}}
        state, step, history = jax.jit(task.init, **quick)(KEY), jax.jit(task.step, **quick), []
        for i in range(20):
            batch = task.prepare(jax.device_put(shapes_batch(i)))
            state, metrics = step(state, batch, jax.random.fold_in(KEY, i))
            history.append({name: float(value) for name, value in metrics.items()})
        task.export(state, str(folder / 'new'))
        assert task.grid(state, batch, KEY).shape == (16, 16, 16, 3)
    return folder / 'old', folder / 'new', history


def test_it_learns(finetuned):
    history = finetuned[2]
    assert np.mean([h['l1'] for h in history[-5:]]) < 0.9 * history[0]['l1']
    assert all(h['adversarial'] > 0 and h['disc'] > 0 for h in history)


def test_encoder_codebook_and_ids_are_bit_identical(finetuned):
    old, new = (load_part(folder, 'tokenizer') for folder in finetuned[:2])
    frozen = [dict(nnx.to_flat_state(part.params)) for part in (old, new)]
    kept = [path for path in frozen[0] if path[0] != 'decoder']
    assert ('codebook',) in kept and ('encoder', 'conv_in', 'kernel') in kept
    for path in kept:
        np.testing.assert_array_equal(frozen[0][path][...], frozen[1][path][...])
    assert new.config == dataclasses.replace(VQ, decoder_channels=16, decoder_num_res_blocks=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    nets = [place(part, 'tokenizer', mesh) for part in (old, new)]
    img_BHWC = jnp.asarray(np.concatenate([shapes_batch(i)['img'] for i in range(4)]))
    ids = [np.asarray(encode_pictures(net.graphdef, net.params, img_BHWC)) for net in nets]
    np.testing.assert_array_equal(*ids)
    assert len(np.unique(ids[0])) > 8
    # And the picture that they decode to is another, nearer one.
    errors = []
    for net, part in zip(nets, (old, new), strict=True):
        decode = jax.jit(lambda params, ids, graphdef=net.graphdef: nnx.merge(graphdef, params).decode(ids))
        made = decode(part.params, ids[0].reshape(-1, 4, 4))
        errors.append(float(np.abs(made - to_float(img_BHWC)).mean()))
    assert errors[1] < 0.8 * errors[0]


def test_its_ids_are_named_and_a_base_takes_it(finetuned, release_folder, tmp_path):
    old, new = (load_part(folder, 'tokenizer') for folder in finetuned[:2])
    assert new.hash != old.hash and new.ids_hash == old.ids_hash == old.hash
    assert place(new, 'tokenizer', make_mesh(MeshConfig(), jax.devices()[:1])).hash == old.hash
    shutil.copytree(release_folder, tmp_path / 'release')
    assert load_release(release_folder).tokenizer.hash == old.hash
    kept = {'config': new.config, 'params': new.params, 'storage': 'float32', 'extra': new.extra}
    save_part(tmp_path / 'release', 'tokenizer', **kept)
    assert load_release(tmp_path / 'release').tokenizer.config.decoder_channels == 16
    other = {**kept, 'extra': {'ids_sha256': '0' * 64}}
    save_part(tmp_path / 'release', 'tokenizer', **other)
    with pytest.raises(UserError, match='put the tokenizer it was trained on'):
        load_release(tmp_path / 'release')


def test_export_over_an_int8_tokenizer_keeps_its_values(tmp_path):
    """Stored as int8 and read back, the encoder is what the base saw: exported in float32 it is that, bit for bit."""
    save_part(tmp_path / 'old', 'tokenizer', config=VQ, params=random_params('tokenizer', VQ), storage='int8')
    run = toy_run(tmp_path / 'old')
    old = load_frozen(run)
    export(
        run, old, {'ema': random_params('tokenizer', run.model, seed=3)['decoder'], 'step': 5}, str(tmp_path / 'new')
    )
    new = load_part(tmp_path / 'new', 'tokenizer')
    assert new.ids_hash == old.hash and new.extra['decoder_step'] == 5
    for name in ('encoder', 'codebook'):
        for one, other in zip(jax.tree.leaves(old.params[name]), jax.tree.leaves(new.params[name]), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('model', 'message'),
    [({'code_dim': 4}, 'model.code_dim is 4, .* has 8: set it to 8'), ({'channels': 4}, 'set it to 8')],
)
def test_another_shape_is_refused(release_folder, model, message):
    with pytest.raises(UserError, match=message):
        load_frozen(toy_run(release_folder, model))


def test_graph_of_the_decoder_is_that_of_the_whole(release_folder):
    run = toy_run(release_folder)
    shapes = jax.eval_shape(decoder_task(run, make_mesh(MeshConfig(), jax.devices()[:1])).init, KEY)['params']
    whole = nnx.split(nnx.eval_shape(lambda: VQGAN(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[1]['decoder']
    assert jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(shapes)) == jax.tree.map(
        lambda x: x.shape, nnx.to_pure_dict(whole)
    )
