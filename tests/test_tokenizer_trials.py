"""The commands that compare tokenizers: what they run, what they count, and (slow) that they run at all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import DataConfig, VQConfig, VQLossConfig
from muse.errors import InputWarning, UserError
from muse.models import perceptual
from muse.models.discriminator import Discriminator
from muse.models.quantizers import make_quantizer
from muse.models.vqgan import VQGAN
from muse.train import flops
from tools import ablate_tokenizer, bench_tokenizer, curve_tokenizer, tokenizer_case, tokenizer_trials

ROOT = Path(__file__).resolve().parents[1]
EMOJI = str(ROOT / 'configs' / 'emoji' / 'tokenizer.py')
TINY = str(ROOT / 'configs' / 'tiny' / 'tokenizer.py')


def count(call, *args) -> float:
    """2·m·n·k of each convolution and matrix product of a program; of alternatives the first, of searches nothing."""

    def walk(jaxpr) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == 'conv_general_dilated':
                kernel = eqn.invars[1].aval.shape
                total += 2 * np.prod(eqn.outvars[0].aval.shape) * np.prod(kernel[:-1])
            elif eqn.primitive.name == 'cond':
                total += walk(eqn.params['branches'][0].jaxpr)
            else:
                inner = (value for value in eqn.params.values() if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'))
                total += sum(walk(getattr(value, 'jaxpr', value)) for value in inner)
        return total

    return walk(jax.make_jaxpr(call)(*args).jaxpr)


@pytest.mark.parametrize('larger', [{}, {'decoder_channels': 24, 'decoder_num_res_blocks': 3}])
def test_flops_of_the_tokenizer(larger):
    sizes = {'channels': 8, 'channel_mult': (1, 1, 2), 'codebook_size': 32, 'code_dim': 6}
    config = VQConfig(**sizes, num_res_blocks=2, **larger)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    img, ids = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32), jax.ShapeDtypeStruct((2, 4, 6), jnp.int32)
    encoded = count(lambda params, img: nnx.merge(graphdef, params).latents(img), params, img)
    search = 2 * (2 * 4 * 6) * 32 * 6
    assert flops.encoder_flops(config, 2 * 16 * 24) == encoded + search
    decoded = count(lambda params, ids: nnx.merge(graphdef, params).decode(ids), params, ids)
    assert flops.decoder_flops(config, 2 * 16 * 24) == decoded


def test_flops_of_the_judges():
    img = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in perceptual.shapes('vgg').items()}
    seen = count(lambda weights, img: perceptual.features(perceptual.Perceptual(weights, 'vgg'), img), weights, img)
    assert flops.vgg_flops(32 * 32) == seen
    make = lambda: Discriminator(8, 'float32', rngs=nnx.Rngs(params=0))  # noqa: E731
    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    judged = count(lambda params, img: nnx.merge(graphdef, params)(img), params, img)
    assert flops.critic_flops(8, 32 * 32) == judged


def test_flops_of_a_step_leave_out_what_is_off():
    model, pixels = VQConfig(), 2 * 64 * 64
    own = 3 * (flops.encoder_flops(model, pixels) + flops.decoder_flops(model, pixels))
    assert flops.tokenizer_step_flops(model, VQLossConfig(perceptual=0.0, adversarial=0.0), 2, 64) == own
    whole = flops.tokenizer_step_flops(model, VQLossConfig(), 2, 64)
    assert whole == own + 3 * flops.vgg_flops(pixels) + (8 + 6 / 16) * flops.critic_flops(64, pixels)


@pytest.mark.parametrize('most', [250, 800])
def test_webp_keeps_to_its_bytes_and_uses_them(most):
    y, x = np.mgrid[0:64, 0:64]
    img = np.stack([4 * x, 4 * y, 128 + 100 * np.sin(x * y / 200)], axis=-1).astype(np.uint8)
    made, size = curve_tokenizer.webp(img, most)
    coarse, _ = curve_tokenizer.webp(img, most // 2)
    assert most / 2 < size <= most and made.shape == img.shape
    assert np.square(made - img.astype(float)).mean() < np.square(coarse - img.astype(float)).mean()
    assert curve_tokenizer.webp(img, 20) is None


def test_every_variant_is_a_whole_run_and_differs_from_the_full_one():
    args = argparse.Namespace(
        config=EMOJI, data='', perceptual='', image_size=32, workers=0, codes=64, channels=8, steps=50, batch_size=4
    )
    known = ablate_tokenizer.variants(ablate_tokenizer.base_run(args))
    assert {'full', 'no_perceptual', 'no_adversarial', 'no_revival', 'fsq', 'lfq'} <= known.keys()
    assert len({str(run) for run in known.values()}) == len(known)
    for run in known.values():
        assert make_quantizer(run.model).project(jnp.ones((1, run.model.code_dim))).shape == (1, run.model.code_dim)
        assert run.train == known['full'].train and run.data == known['full'].data
    for codes, levels in ablate_tokenizer.LEVELS.items():
        assert np.prod(levels) == codes
    with pytest.raises(UserError, match='--codes=100'):
        ablate_tokenizer.variants(tokenizer_trials.changed(known['full'], model={'codebook_size': 100}))


def test_a_pool_is_drawn_once_and_trials_see_the_same_rows(tmp_path):
    data = DataConfig(kind='scenes', image_size=16, max_objects=1)
    path = tokenizer_trials.draw_pool(str(tmp_path), data, 20, seed=1)
    pool, stamp = np.load(path), path.stat().st_mtime_ns
    assert pool.shape == (20, 16, 16, 3) and len(np.unique(pool.reshape(20, -1), axis=0)) > 15
    assert tokenizer_trials.draw_pool(str(tmp_path), data, 20, seed=1).stat().st_mtime_ns == stamp
    run = tokenizer_trials.changed(
        tokenizer_trials.read_config(TINY, data='', perceptual='', image_size=16), train={'steps': 3, 'batch_size': 4}
    )
    other = tokenizer_trials.changed(run, loss={'perceptual': 0.0})
    rows = [list(tokenizer_trials._batches(tokenizer_trials.Trial(name='', run=r, crop=8), pool)) for r in (run, other)]
    assert len(rows[0]) == 3 and rows[0][0]['img'].shape == (4, 8, 8, 3)
    for one, same in zip(*rows, strict=True):
        np.testing.assert_array_equal(one['img'], same['img'])


def test_table_leaves_out_what_a_row_lacks():
    text = tokenizer_trials.table([{'a': 0.5, 'b': 2}, {'a': 0.25}], {'a': '.1%', 'b': 'd'})
    assert text.splitlines() == ['| a | b |', '|---|---|', '| 50.0% | 2 |', '| 25.0% |  |']


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def trial(name: str, perceptual: str = '') -> tokenizer_trials.Trial:
    run = tokenizer_trials.read_config(TINY, data='', perceptual=perceptual, image_size=16)
    run = tokenizer_trials.changed(run, model={'channels': 4, 'codebook_size': 64}, train={'steps': 2, 'batch_size': 4})
    return tokenizer_trials.Trial(name=name, run=run, crop=16)


def run_trials(tmp_path, *trials, minutes: float):
    setting = tokenizer_trials.Setting(pool=str(tmp_path), perceptual='', features='')
    sizes = {'jobs': 2, 'pool': 8, 'heldout': 4, 'out': tmp_path / 'rows.jsonl'}
    return tokenizer_trials.run_trials(trials, setting, deadline=time.monotonic() + 60 * minutes, **sizes)


def test_trials_that_find_no_time_are_named(tmp_path):
    with pytest.warns(InputWarning, match='not finished within the time limit: one, two; give more --minutes'):
        assert run_trials(tmp_path, trial('one'), trial('two'), minutes=-1) == []


@pytest.mark.slow
def test_a_trial_that_fails_leaves_the_others_alone(tmp_path):
    with pytest.warns(InputWarning, match='^bad: perceptual weights .* do not exist'):
        rows = run_trials(tmp_path, trial('bad', perceptual=str(tmp_path)), trial('good'), minutes=15)
    assert [row['name'] for row in rows] == ['good'] and np.isfinite(rows[0]['psnr'])
    assert json.loads((tmp_path / 'rows.jsonl').read_text())['name'] == 'good'


@pytest.mark.slow
def test_ablation_runs(tmp_path):
    small = '--steps=6 --batch_size=4 --image_size=32 --codes=64 --channels=4 --pool=32 --heldout=8 --jobs=2'
    done = run(
        'tools/ablate_tokenizer.py', f'--config={TINY}', f'--out={tmp_path}', '--variants=full,lecam', *small.split()
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'ablation.jsonl').read_text().splitlines()]
    found = {(row['name'], row['seed']) for row in rows}
    assert {('full', 0), ('full', 1), ('lecam', 0)} <= found <= {(n, s) for n in ('full', 'lecam') for s in (0, 1)}
    assert done.stdout.count('\n| full |') == 2, 'the table in the end'
    assert all(np.isfinite(row['psnr']) and row['pictures'] == 8 for row in rows)
    wrong = run('tools/ablate_tokenizer.py', f'--out={tmp_path}', '--variants=ful')
    assert wrong.returncode == 2 and "did you mean 'full'?" in wrong.stderr and wrong.stderr.count('\n') == 1


@pytest.mark.slow
def test_bench_runs_and_counts():
    done = run('tools/bench.py', 'tokenizer', '--tiny', '--batches=2', '--steps=2', '--profile=3')
    assert done.returncode == 0, done.stderr
    speed, profile = (json.loads(line) for line in done.stdout.splitlines())
    assert speed['images_per_s'] == pytest.approx(2e3 / speed['ms'], rel=1e-2) and np.isfinite(speed['loss_value'])
    assert speed['load_s'] < speed['compile_s'] / 2, 'the program comes from the cache'
    assert len(profile['profile']) == 9 and {'part', 'kind', 'op'} <= set().union(*profile['profile'])


def test_profile_is_summed_by_part_and_kind():
    """By hand: milliseconds of four operations of a program."""
    text = """
      %conv.1 = f32[2,4]{1,0} convolution(%a, %b), metadata={op_name="jit(f)/jvp(decoder)/conv_general_dilated"}
      %fusion.2 = bf16[8]{0} fusion(%a), metadata={op_name="jit(f)/transpose(jvp(decoder))/norm/mul"}
      ROOT %conv.3 = f32[4]{0} convolution(%a), metadata={op_name="jit(f)/transpose(jvp(decoder))/conv_general_dilated"}
    """
    rows = tokenizer_case.summed({'conv.1': 4.0, 'fusion.2': 3.0, 'conv.3': 2.0, 'memcpy': 1.0}, text, 2)
    assert [(r['part'], r['share']) for r in rows[:2]] == [('decoder', 0.4), ('back decoder norm', 0.3)]
    assert [(r['kind'], r['ms']) for r in rows[2:4]] == [('conv', 6.0), ('fusion', 3.0)]
    assert [(r['op'], r['shape']) for r in rows[4:]] == [('conv.1', 'f32[2,4]{1,0}'), ('fusion.2', 'bf16[8]{0}')]


def test_bench_prints_what_there_is_when_time_is_up(monkeypatch):
    """The second case still compiles when time is up: the first is timed, the second is said to have failed."""
    calls = []

    def case(setting, flags, cache, *, timed, seconds):
        calls.append((setting['variant'], timed))
        assert seconds < 60 and '--xla_gpu_enable_command_buffer=' in flags
        if setting['variant'] == 'no_r1':
            return {'failed': 'late'}
        measured = {
            'ms': 500.0,
            'side': 64,
            'model': dataclasses.asdict(VQConfig()),
            'loss': {},
            'profile': [{'ms': 1}],
        }
        return measured if timed else {'compile_s': 3.0}

    monkeypatch.setattr(bench_tokenizer, '_case', case)
    parser = argparse.ArgumentParser()
    bench_tokenizer.add_flags(parser)
    flags = ['--variants=now,no_r1', '--batches=4', '--profile=1', '--minutes=1', '--jobs=1']
    speed, profile, late = bench_tokenizer.cases(parser.parse_args(flags))
    assert calls == [('now', False), ('no_r1', False), ('now', True)]
    assert speed['images_per_s'] == 8 and speed['compile_s'] == 3 and profile['profile'] == [{'ms': 1}]
    assert late['variant'] == 'no_r1' and late['failed'] == 'late'
    for wrong in ('--jobs=0', '--minutes=-1', '--variants=nwo', '--config=configs/none.py'):
        with pytest.raises(UserError, match=wrong.split('=')[1]):
            list(bench_tokenizer.cases(parser.parse_args([wrong])))
