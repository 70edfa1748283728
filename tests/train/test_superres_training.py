"""The super-res's step: the same numbers on any mesh; it learns to read its low-res tokens; the loop runs it whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx
from toys import CODES, TEXT_LENGTH, TEXT_WIDTH, graphdef_of, save_toy_text_encoder, train, with_model

from muse.config import (
    DataConfig,
    DecodeConfig,
    MeshConfig,
    OptimConfig,
    SuperresConfig,
    SuperresLossConfig,
    SuperresRun,
    TrainConfig,
    VQConfig,
)
from muse.data.precomputed import Meta, encode_record
from muse.data.shards import ShardWriter, begin_split, finish_split
from muse.decode import decode_steps, noise_keys
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.models.superres import Superres
from muse.models.vqgan import VQGAN, to_float
from muse.release.format import load_part, save_part
from muse.train import loop, superres
from muse.train.superres_nets import SuperresNets, load_superres_nets, shrink, shrink_ratio

pytestmark = pytest.mark.usefixtures('quick_compiles')

LOW_CODES, SIDE, LOW_SIDE = 8, 4, 2
LOW_VQ = VQConfig(channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=LOW_CODES, code_dim=4)
HIGH_VQ = VQConfig(channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=CODES, code_dim=4)


def toy_run(**changes) -> SuperresRun:
    """16-pixel pictures of 4x4 tokens over 8-pixel ones of 2x2; `changes` replace whole fields of the run."""
    model = SuperresConfig(
        codebook_size=CODES,
        grid=(SIDE, SIDE),
        low_codebook_size=LOW_CODES,
        low_grid=(LOW_SIDE, LOW_SIDE),
        block=2,
        width=32,
        mlp_dim=64,
        heads=4,
        layers=2,
        low_layers=1,
        text_width=TEXT_WIDTH,
        text_length=TEXT_LENGTH,
        remat='none',
    )
    data = DataConfig(kind='precomputed', path='unused', image_size=16, text_length=TEXT_LENGTH)
    fields = {
        'model': model,
        'train': TrainConfig(steps=20, batch_size=16, save_every_minutes=0.0),
        'data': data,
        'eval_data': dataclasses.replace(data, split='heldout'),
        'tokenizer': 'unused',
        'superres_tokenizer': 'unused',
        'optim': OptimConfig(learning_rate=1e-2, warmup_steps=2),
        'decode': DecodeConfig(steps=3, guidance_scale=1.0),
        'mesh': MeshConfig(),
    }
    return SuperresRun(**(fields | changes))


def toy_batch(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    """The low-res tokens of a picture are one code, which says what four codes its high-res tokens are of.

    The text says nothing. That places are read as well is tested on the model itself: to learn it takes longer.
    """
    rng = np.random.default_rng(step)
    kind = rng.integers(0, LOW_CODES, (rows, 1))
    return {
        'tok': (4 * kind + rng.integers(0, 4, (rows, SIDE**2))).astype(np.int32),
        'low': np.repeat(kind, LOW_SIDE**2, axis=1).astype(np.int32),
        'txt': rng.normal(size=(rows, TEXT_LENGTH, TEXT_WIDTH)).astype(np.float32),
        'len': rng.integers(1, 4, rows).astype(np.int32),
    }


@pytest.fixture(scope='module')
def learned():
    run = toy_run(
        train=TrainConfig(steps=60, batch_size=16, ema_decay=0.9), optim=OptimConfig(learning_rate=1e-2, warmup_steps=5)
    )
    return run, *train(run, toy_batch, 60)


@pytest.mark.slow
def test_eight_devices_equal_one(learned):
    run, reference, _ = learned
    losses, state = train(dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), toy_batch, 4, devices=8)
    np.testing.assert_allclose(losses, reference[:4], rtol=1e-5)
    for blocks, layers in (('blocks', 2), ('low_blocks', 1)):
        kernel = state['params'][blocks]['self_attention']['query']['kernel'][...]
        assert kernel.addressable_shards[0].data.shape == (layers, 16, 16), 'the parameter itself must be split'


def test_it_learns_to_read_the_low_res_tokens(learned):
    run, losses, state = learned
    assert losses[-5:].mean() < losses[0] - 0.8
    evaluate = jax.jit(lambda s, b, k: superres.evaluate(graphdef_of(run), s, b, k))
    metrics = jax.device_get(evaluate(state, jax.tree.map(jnp.asarray, toy_batch(999, 64)), jax.random.key(5)))
    assert metrics['loss'] < np.log(4) + 0.4, 'nats per masked token; the low-res tokens leave 4 codes of 32'
    assert metrics['loss_other_low'] > metrics['loss'] + 1.0
    assert abs(metrics['loss_no_text'] - metrics['loss']) < 0.3, 'the text says nothing here'


@pytest.mark.slow
def test_the_one_decoder_draws_what_the_low_res_tokens_say(learned):
    run, _, state = learned
    batch = jax.tree.map(jnp.asarray, toy_batch(777, 32))

    @jax.jit
    def draw(params):
        model = nnx.merge(graphdef_of(run), params)
        memory = model.memory(batch['low'], batch['txt'])
        canvas = jnp.zeros((32, SIDE * SIDE), jnp.int32)
        return decode_steps(
            lambda tok, _: model.logits(tok, memory, batch['len']),
            canvas,
            canvas > 0,
            noise_keys(0, jnp.arange(32)),
            steps=4,
            temperature=1.0,
            choice_temperature=4.5,
            schedule='cosine',
        )[-1]

    right = np.asarray(draw(state['ema'])) // 4 == batch['tok'] // 4
    assert right.mean() > 0.5, 'by chance 1/8'


def test_only_text_is_dropped_and_low_res_tokens_are_wrong_here_and_there():
    run = toy_run(loss=SuperresLossConfig(text_dropout=0.1, low_corruption=0.2))
    batch = jax.tree.map(jnp.asarray, toy_batch(0, 4000))
    corrupted = superres.corrupt(run, batch, jax.random.key(0))
    assert 0.08 < np.mean(np.asarray(corrupted['len']) == 0) < 0.12
    assert (
        0.07 < np.mean(np.asarray(corrupted['low'] != batch['low'])) < 0.11
    )  # 10 %, an eighth of them by chance right
    np.testing.assert_array_equal(corrupted['tok'], batch['tok'])
    few = superres.corrupt(run, jax.tree.map(lambda x: x[:5], batch), jax.random.key(0))
    for name in ('mask', 'low', 'len'):
        np.testing.assert_array_equal(few[name], corrupted[name][:5])


def test_shrinking_takes_means_of_squares():
    img = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    expected = np.floor(img.reshape(2, 3, 2, 2, 2, 3).mean(axis=(2, 4)) + 0.5)
    np.testing.assert_array_equal(shrink(jnp.array(img), 2), expected)


def test_sizes_that_are_no_multiple_are_refused():
    low, high = VQConfig(channel_mult=(1, 1, 1, 1, 1)), VQConfig(channel_mult=(1, 1, 1, 1))
    assert shrink_ratio((64, 64), high, (16, 16), low) == 2
    with pytest.raises(UserError, match=r'makes pictures of 512x512, model.low_grid \(24, 24\) of 384x384'):
        shrink_ratio((64, 64), high, (24, 24), low)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """Folders of the frozen nets, and of precomputed examples that name them."""
    folder = tmp_path_factory.mktemp('parts')
    hashes = {}
    for name, config in (('low', LOW_VQ), ('high', HIGH_VQ)):
        params = nnx.split(filled(lambda config=config: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
        hashes[name] = save_part(folder / name, 'tokenizer', config=config, params=params, storage='float32')
    save_toy_text_encoder(folder / 'text', ['a red apple', 'a green pear', 'two blue stars'])
    meta = Meta(
        tokenizer_hash=hashes['high'],
        low_tokenizer_hash=hashes['low'],
        text_encoder_hash=load_part(folder / 'text', 'text_encoder').hash,
        grid=(SIDE, SIDE),
        low_grid=(LOW_SIDE, LOW_SIDE),
        text_width=TEXT_WIDTH,
    )
    for split, step in (('train', 0), ('heldout', 1)):
        batch = toy_batch(step, 32)
        begin_split(folder / 'tokens', split, meta, {}, 1)
        with ShardWriter(folder / 'tokens', split, 0, 1) as writer:
            for i, length in enumerate(batch['len']):
                record = encode_record(batch['tok'][i], batch['txt'][i, :length], 'a caption', batch['low'][i])
                writer.write(record, text=int(length), limit=TEXT_LENGTH)
        finish_split(folder / 'tokens', split, [])
    return folder


def run_over(parts: Path, **changes) -> SuperresRun:
    data = DataConfig(kind='precomputed', path=str(parts / 'tokens'), image_size=16, text_length=TEXT_LENGTH)
    return toy_run(
        data=data,
        eval_data=dataclasses.replace(data, split='heldout'),
        tokenizer=str(parts / 'low'),
        superres_tokenizer=str(parts / 'high'),
        text_encoder=str(parts / 'text'),
        **changes,
    )


def check_export(run: SuperresRun, folder: Path, parts: Path, state) -> None:
    """The averaged weights are there, and the frozen nets are named."""
    part = load_part(folder, 'superres')
    assert part.config == run.model
    assert part.extra['tokenizer_sha256'] == load_part(parts / 'low', 'tokenizer').hash
    assert part.extra['superres_tokenizer_sha256'] == load_part(parts / 'high', 'tokenizer').hash
    assert part.extra['decode']['steps'] == 3
    for ours, theirs in zip(jax.tree.leaves(part.params), jax.tree.leaves(state['ema']), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_export_is_the_average_and_names_the_frozen_nets(parts, tmp_path):
    run = run_over(parts)
    ema = nnx.split(filled(lambda: Superres(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
    state = {'step': jnp.array(7), 'ema': ema}
    superres.superres_task(run, make_mesh(run.mesh)).export(state, str(tmp_path))
    check_export(run, tmp_path, parts, state)
    assert load_part(tmp_path, 'superres').extra['step'] == 7


@pytest.mark.slow
def test_the_loop_trains_evaluates_draws_and_exports(parts, tmp_path):
    quick = TrainConfig(steps=4, batch_size=8, log_every_steps=2, save_every_minutes=0.0, eval_batches=1)
    run = run_over(parts, train=quick)
    state = loop.run(run, tmp_path / 'run')
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert {'eval_loss_other_low', 'eval_loss_no_text', 'loss'} <= set().union(*lines)
    assert list((tmp_path / 'run' / 'grids').iterdir())
    check_export(run, tmp_path / 'run' / 'export', parts, state)


def test_pictures_are_encoded_by_both_tokenizers(parts):
    run = run_over(parts)
    scenes = DataConfig(kind='scenes', image_size=16, text_length=TEXT_LENGTH)
    nets = load_superres_nets(dataclasses.replace(run, data=scenes, eval_data=scenes), make_mesh(MeshConfig()))
    assert isinstance(nets, SuperresNets) and nets.ratio == 2
    img = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    ids = np.ones((8, TEXT_LENGTH), np.int32)
    batch = nets.encode({'img': jnp.array(img), 'ids': jnp.array(ids), 'len': jnp.arange(8)})
    for name, net, pixels in (('tok', nets.high, img), ('low', nets.low, np.asarray(shrink(jnp.array(img), 2)))):
        encode = jax.jit(lambda x, net=net: nnx.merge(net.graphdef, net.params).encode(to_float(x)))
        np.testing.assert_array_equal(batch[name], np.asarray(encode(jnp.array(pixels))).reshape(8, -1))
        assert net.hash == load_part(parts / ('high' if name == 'tok' else 'low'), 'tokenizer').hash
    assert batch['txt'].shape == (8, TEXT_LENGTH, TEXT_WIDTH) and batch['len'].shape == (8,)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model': {'low_codebook_size': 16}}, r'has 8 codes, model.low_codebook_size is 16'),
        ({'model': {'codebook_size': 64}}, r'has 32 codes, model.codebook_size is 64'),
        ({'model': {'low_grid': (4, 4)}}, r'has low_grid \(2, 2\), model.low_grid is \(4, 4\)'),
        ({'model': {'text_width': 16}}, r'has text_width 8, model.text_width is 16'),
        ({'run': {'swap': True}}, r'has 32 codes, model.low_codebook_size is 8'),
        ({'run': {'loss': SuperresLossConfig(low_corruption=1.5)}}, r'loss.low_corruption is 1.5: give a share'),
    ],
)
def test_what_does_not_fit_is_refused(parts, changes, message):
    run = run_over(parts)
    if changes.get('run', {}).get('swap'):
        run = dataclasses.replace(run, tokenizer=run.superres_tokenizer)
    else:
        run = dataclasses.replace(with_model(run, **changes.get('model', {})), **changes.get('run', {}))
    with pytest.raises(UserError, match=message):
        superres.superres_task(run, make_mesh(run.mesh))


def test_records_without_low_res_tokens_or_of_another_tokenizer_are_refused(parts, tmp_path):
    run = run_over(parts)
    meta = json.loads((parts / 'tokens' / 'meta.json').read_text())
    none = {'low_tokenizer_hash': None, 'low_grid': None}
    elsewhere = dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(tmp_path)))
    for change, message in (
        (none, r'holds no low-res tokens: run tools/precompute.py with --low_tokenizer='),
        ({'low_tokenizer_hash': 'f' * 64}, r'low-res tokens of .* were made with tokenizer ffffffffffff'),
    ):
        (tmp_path / 'meta.json').write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            load_superres_nets(elsewhere, make_mesh(run.mesh))
