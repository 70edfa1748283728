"""A run as it is watched: its lines, sheets of prompts, judged pictures, profiles; and starting from a release."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import SUPERRES
from toys import CODES, SIDE, TEXT_LENGTH, TEXT_WIDTH, save_toy_text_encoder, toy_batch, toy_run, with_model, with_train

from muse.config import DataConfig, DecodeConfig, SuperresRun, TokenizerRun, VQConfig
from muse.data.precomputed import Meta, encode_record
from muse.data.shards import ShardWriter, begin_split, finish_split
from muse.errors import InputWarning, UserError
from muse.mesh import make_mesh
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN
from muse.release.format import load_part, save_part
from muse.train import base, judge, loop, profile, superres, tokenizer
from muse.train.checkpoint import flatten
from muse.train.init_from import start_from
from muse.train.metrics import Writer
from muse.train.task import Task

pytestmark = pytest.mark.usefixtures('quick_compiles')

VQ = VQConfig(channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=CODES, code_dim=4)
NO_TASK = Task(init=lambda key: {}, step=lambda *_: ({}, {}), evaluate=lambda *_: {}, export=lambda *_: None)
PROMPTS = ('a red cat', 'a dog', '')


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A tokenizer, and tokens that name it."""
    folder = tmp_path_factory.mktemp('parts')
    params = nnx.split(VQGAN(VQ, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    made = save_part(folder / 'tokenizer', 'tokenizer', config=VQ, params=params, storage='float32')
    tokens = folder / 'tokens'
    meta = Meta(tokenizer_hash=made, text_encoder_hash='of the text', grid=(SIDE, SIDE), text_width=TEXT_WIDTH)
    for seed, split in enumerate(('train', 'heldout')):
        begin_split(tokens, split, meta, {}, 1)
        batch = toy_batch(seed, 64)
        with ShardWriter(tokens, split, 0, 1) as shard:
            for tok_T, txt_SD, length in zip(batch['tok'], batch['txt'], batch['len'], strict=True):
                shard.write(encode_record(tok_T, txt_SD[:length], 'a cat'), text=int(length), limit=TEXT_LENGTH)
        finish_split(tokens, split, ())
    return folder


@pytest.fixture(scope='module')
def with_text(parts, tmp_path_factory):
    """The same with a text encoder that the tokens name."""
    folder = tmp_path_factory.mktemp('with_text')
    shutil.copytree(parts, folder, dirs_exist_ok=True)
    (folder / 'text').mkdir()
    save_toy_text_encoder(folder / 'text', ['a red cat on a mat', 'a dog in a blue house'])
    meta = json.loads((folder / 'tokens' / 'meta.json').read_text())
    meta['text_encoder_hash'] = load_part(folder / 'text', 'text_encoder').hash
    (folder / 'tokens' / 'meta.json').write_text(json.dumps(meta))
    return folder


def run_of(parts, prompts=(), **train):
    """A run over the tokens of `parts`."""
    data = DataConfig(kind='precomputed', path=str(parts / 'tokens'), image_size=16, text_length=TEXT_LENGTH)
    run = toy_run(
        data=data,
        eval_data=dataclasses.replace(data, split='heldout'),
        tokenizer=str(parts / 'tokenizer'),
        text_encoder=str(parts / 'text'),
        decode=DecodeConfig(steps=2),
        prompts=prompts,
    )
    settings = {'steps': 6, 'log_every_steps': 2, 'eval_every_steps': 6, 'grid_every_steps': 0, 'eval_batches': 2}
    return with_train(run, **(settings | train))


def one_device(config):
    return make_mesh(config, jax.devices()[:1])


def colours(img_BHWC):
    """Stands in for the feature net: mean colours of quarters of the picture."""
    rows = np.asarray(img_BHWC, np.float32).reshape(len(img_BHWC), 2, 8, 2, 8, 3).mean(axis=(2, 4))
    return rows.reshape(len(rows), -1), None


@pytest.fixture(scope='module')
def finished(parts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('watched')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'make_mesh', one_device)  # quicker to compile
        loop.run(run_of(parts, profile_at=3, profile_steps=2), workdir)
    return workdir


def test_lines_hold_what_is_promised(finished):
    lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {'loss', 'accuracy', 'grad_norm', 'param_norm', 'update_norm', 'learning_rate'} <= line.keys()
        assert {'images_per_s', 'tokens_per_s', 'data_wait', 'host_ms'} <= line.keys()
        assert line['tokens_per_s'] == pytest.approx(16 * line['images_per_s'])
        assert 0 <= line['data_wait'] <= 1 and line['host_ms'] >= 0
        assert not {'mfu', 'hbm_peak_gib'} & line.keys(), 'a CPU has no peak, and does not tell its memory'
        buckets = [value for name, value in line.items() if name.startswith('loss_mask_')]
        assert buckets and np.isfinite(list(line.values())).all()
        assert min(buckets) - 1 < line['loss'] < max(buckets) + 1
    assert {'eval_loss', 'eval_accuracy', 'eval_caption_wins', 'eval_loss_mask_80_100'} <= lines[-1].keys()


@pytest.mark.slow
def test_pictures_are_judged_and_the_sheet_shows_the_prompts(with_text, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, 'load_features', lambda folder: colours)
    monkeypatch.setattr(loop, 'make_mesh', one_device)
    judged = {'eval_features': 'colours', 'eval_pictures': len(PROMPTS)}
    loop.run(run_of(with_text, PROMPTS, steps=2, eval_every_steps=2, grid_every_steps=2, **judged), tmp_path)
    line = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    assert line['eval_frechet_lite0'] > 0 and 0 <= line['eval_own_nearest'] <= 1
    with Image.open(tmp_path / 'grids' / '00000002.png') as sheet:
        assert sheet.size == (2 * 16 + 2, 2 * 16 + 2), 'three pictures, two beside each other'


def test_the_judge_knows_perfect_pictures_from_others(monkeypatch):
    monkeypatch.setattr(judge, 'load_features', lambda folder: colours)
    img = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    found = {}
    for name, made in {'same': img, 'moved': np.roll(img, 1, axis=0), 'dark': img // 4}.items():

        def pictures(state, batch, key, number, made=made):
            rows = batch['tok'][:number]
            return jnp.asarray(made[rows]), jnp.asarray(img[rows])

        judged = judge.Judge(with_train(toy_run(), eval_features='x', eval_pictures=10).train)
        batches = [{'tok': np.arange(8)}, {'tok': np.arange(8, 12)}]
        found[name] = judged(dataclasses.replace(NO_TASK, pictures=pictures), {}, batches, jax.random.key(0))
    assert found['same'] == {'frechet_lite0': pytest.approx(0, abs=1e-3), 'own_nearest': 1.0}
    assert found['moved']['own_nearest'] <= 0.1, 'of ten pictures, the row above is at most the nearest by chance'
    assert found['dark']['frechet_lite0'] > 100


def test_a_profile_of_the_steps_asked_for(finished):
    (folder,) = (finished / 'tensorboard' / 'plugins' / 'profile').iterdir()
    assert f'profile of steps 3 to 4: {folder}' in (finished / 'log.txt').read_text()
    assert list(folder.glob('*.xplane.pb'))
    (trace,) = folder.glob('*.trace.json.gz')
    with gzip.open(trace, 'rt') as file:
        names = [event.get('args', {}).get('step_num') for event in json.load(file)['traceEvents']]
    assert {'3', '4'} <= set(names) and not {'2', '5'} & set(names)


@pytest.fixture
def traces(monkeypatch, tmp_path):
    """Starts and stops of traces, without any."""
    found = []

    def start(folder):
        found.append('start')
        (tmp_path / 'tensorboard' / 'plugins' / 'profile' / 'now').mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(jax.profiler, 'start_trace', start)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: found.append('stop'))
    return found


def test_a_file_in_the_workdir_asks_for_a_profile(tmp_path, traces):
    train = with_train(toy_run(), steps=10, log_every_steps=2, profile_steps=2).train
    writer = Writer(tmp_path, start_step=0, steps=10, batch_size=2, active=True)
    at = {}
    with profile.Profiler(tmp_path, train, writer) as profiler:
        for step in range(10):
            if step in (3, 9):
                (tmp_path / 'profile').touch()
            before = len(traces)
            profiler.turn(step, {'step': jax.numpy.zeros(())})
            at |= dict.fromkeys([(step, what) for what in traces[before:]])
    writer.close()
    assert list(at) == [(4, 'start'), (6, 'stop')], 'noticed when the next line is logged, and not after step 9'
    assert 'profile of steps 5 to 6: ' in (tmp_path / 'log.txt').read_text()
    assert (tmp_path / 'profile').exists(), 'asked for too late'


def test_a_run_that_ends_in_a_profile_keeps_it(tmp_path, traces):
    train = with_train(toy_run(), steps=4, profile_at=3, profile_steps=5).train
    writer = Writer(tmp_path, start_step=0, steps=4, batch_size=2, active=True)
    with profile.Profiler(tmp_path, train, writer) as profiler:
        for step in range(4):
            profiler.turn(step, {'step': jax.numpy.zeros(())})
    writer.close()
    assert traces == ['start', 'stop'] and 'profile of steps 3 to 4: ' in (tmp_path / 'log.txt').read_text()


@pytest.mark.parametrize(
    ('train', 'said'),
    [
        ({'profile_at': 7}, r'train\.profile_at is 7: give a step from 1 to 6'),
        ({'profile_steps': 0}, r'train\.profile_steps is 0'),
        ({'eval_features': 'nowhere'}, r"feature net 'nowhere/.*' does not exist"),
    ],
)
def test_settings_out_of_range(parts, tmp_path, train, said):
    with pytest.raises(UserError, match=said):
        loop.run(run_of(parts, **train), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_prompts_need_the_encoder_of_the_data(with_text, tmp_path):
    part = load_part(with_text / 'text', 'text_encoder')
    other = jax.tree.map(lambda x: 2 * x, part.params)
    save_part(tmp_path, 'text_encoder', config=part.config, params=other, storage='float32')
    shutil.copy(with_text / 'text' / 'spiece.model', tmp_path)
    run = dataclasses.replace(run_of(with_text, PROMPTS), text_encoder=str(tmp_path))
    with pytest.raises(UserError, match='prompts: the data were made with text encoder .* set text_encoder to'):
        base.base_task(run, make_mesh(run.mesh))


def same_weights(state, params):
    wanted = flatten(params)
    for name in ('params', 'ema'):
        for path, array in flatten(state[name]).items():
            np.testing.assert_array_equal(array, wanted[path])


def test_a_base_starts_from_exactly_the_weights_of_a_release(finished, parts):
    run = dataclasses.replace(run_of(parts), init_from=str(finished / 'export'))
    weights = load_part(finished / 'export', 'base').params
    fresh = {'step': 0, 'params': jax.tree.map(jnp.zeros_like, weights), 'ema': None, 'opt': object()}
    state = base.base_task(run, one_device(run.mesh)).start(fresh)
    same_weights(state, weights)
    assert state['step'] == 0 and state['opt'] is fresh['opt']
    params, ema = (jax.tree.leaves(state[name]) for name in ('params', 'ema'))
    assert all(p is not e for p, e in zip(params, ema, strict=True)), 'the step gives its state away: no array twice'


def test_a_release_of_another_shape_names_its_tensors(finished):
    run = with_model(toy_run(), mlp_dim=128)
    wanted = nnx.state(nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)
    with pytest.raises(UserError, match=r'init_from: the base in .* blocks/mlp/down/kernel is \(2, 64, 32\) float32, '):
        start_from(str(finished / 'export'), 'base', wanted, None)


@pytest.mark.parametrize(
    ('folder', 'said'), [('nowhere', "'nowhere' does not exist"), ('tokenizer', "no whole entry for 'base'")]
)
def test_a_folder_without_the_part_is_named(parts, folder, said):
    with pytest.raises(UserError, match=said):
        start_from(folder if folder == 'nowhere' else str(parts / folder), 'base', nnx.State({}), None)


def test_weights_of_other_tokens_are_warned_of(finished):
    folder, params = str(finished / 'export'), load_part(finished / 'export', 'base').params
    with pytest.warns(InputWarning, match='was trained on text_encoder of the text, this run has another'):
        start_from(folder, 'base', params, None, below={'text_encoder': 'another'})
    assert start_from('', 'base', params, None) is None


def test_a_tokenizer_starts_from_a_release_with_its_codes_in_use(parts):
    data = DataConfig(image_size=16)
    run = TokenizerRun(
        model=VQ,
        train=toy_run().train,
        data=data,
        eval_data=data,
        init_from=str(parts / 'tokenizer'),
    )
    fresh = jax.tree.map(jnp.zeros_like, load_part(parts / 'tokenizer', 'tokenizer').params)
    state = tokenizer.start_from_tokenizer(run, None)({'params': fresh, 'idle_steps': jnp.full((CODES,), 100)})
    same_weights(state, load_part(parts / 'tokenizer', 'tokenizer').params)
    assert not np.any(state['idle_steps']), 'codes of a trained codebook are not moved by the first step'


@pytest.mark.slow
def test_a_super_res_starts_from_a_release_and_shows_prompts_over_its_base(cascade_folder):
    folder, data = str(cascade_folder), DataConfig(image_size=32, text_length=SUPERRES.text_length)
    run = SuperresRun(
        model=SUPERRES,
        train=toy_run().train,
        data=data,
        eval_data=data,
        tokenizer=folder,
        superres_tokenizer=folder,
        text_encoder=folder,
        base=folder,
        prompts=('a red apple', 'the sun'),
        decode=DecodeConfig(steps=2),
        init_from=folder,
    )
    task = superres.superres_task(run, one_device(run.mesh))
    part = load_part(folder, 'superres')
    state = task.start({'params': jax.tree.map(jnp.zeros_like, part.params)})
    same_weights(state, part.params)
    img = np.asarray(task.grid(state, {}, jax.random.key(0)))
    assert img.shape == (4, 32, 32, 3) and img.dtype == np.uint8
    low, drawn = img[:2], img[2:]
    np.testing.assert_array_equal(low, low[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2))
    assert (low[0] != low[1]).any() and (drawn[0] != drawn[1]).any() and (low != drawn).any()
    with pytest.raises(UserError, match='set base to the folder of a trained base'):
        superres.superres_task(dataclasses.replace(run, base=''), one_device(run.mesh))
