"""Precomputation and export on real files: stored rows are what the nets say, broken-off runs go on, parts must fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import save_toy_text_encoder, toy_run, with_model

from muse.config import DataConfig, MeshConfig, VQConfig
from muse.data.pipeline import make_loader
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN, to_float
from muse.release.format import load_part, load_release, save_part
from muse.train.frozen import load_frozen
from muse.train.precompute import load_nets, precompute

SOURCE = DataConfig(kind='scenes', image_size=16, max_objects=1, text_length=31)
TOKENIZER = VQConfig(channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=32, code_dim=4)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A tokenizer and a text encoder with random weights in one folder."""
    folder = tmp_path_factory.mktemp('parts')
    params = nnx.split(VQGAN(TOKENIZER, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    save_part(folder, 'tokenizer', config=TOKENIZER, params=params, storage='float32')
    batch = next(make_loader(SOURCE, batch_size=512, seed=0, shard_index=0, shard_count=1))
    save_toy_text_encoder(folder, list(batch['caption']))
    return folder


@pytest.fixture(scope='module')
def nets(parts):
    return load_nets(str(parts), str(parts), SOURCE.text_length, make_mesh(MeshConfig(), jax.devices()[:1]))


def write(nets, folder, data=SOURCE, num=44, shards=3):
    seen = []
    with jax.set_mesh(nets.mesh):
        precompute(data, nets, folder, num=num, shards=shards, batch_size=8, seed=5, progress=seen.append)
    return sum(seen)


@pytest.fixture(scope='module')
def stored(nets, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stored')
    assert write(nets, folder) == 44
    write(nets, folder, dataclasses.replace(SOURCE, split='heldout_pairs'), num=0, shards=1)
    return folder


def read(folder, split='train'):
    data = DataConfig(kind='precomputed', path=str(folder), split=split, image_size=16, text_length=31)
    batches = make_loader(data, batch_size=16, seed=0, shard_index=0, shard_count=1, repeat=False)
    return [{k: row for k, row in zip(b, rows, strict=True)} for b in batches for rows in zip(*b.values(), strict=True)]


def test_stored_rows_are_what_the_nets_say(nets, stored, parts):
    rows = read(stored)
    assert len(rows) == 44
    model = nnx.merge(nets.tokenizer.graphdef, nets.tokenizer.params)
    text = nnx.merge(nets.text_encoder.graphdef, nets.text_encoder.params)
    loader = make_loader(SOURCE, batch_size=8, seed=5, shard_index=0, shard_count=1, encode_text=nets.encode_text)
    for i, batch in enumerate(itertools.islice(loader, 2)):
        tok = np.asarray(model.encode(to_float(jnp.asarray(batch['img'])))).reshape(8, -1)
        txt = np.asarray(text(jnp.asarray(batch['ids']), jnp.asarray(batch['len'])), np.float32)
        for row in range(8):
            mine, length = rows[8 * i + row], int(batch['len'][row])
            np.testing.assert_array_equal(mine['tok'], tok[row])
            assert int(mine['len']) == length
            np.testing.assert_allclose(mine['txt'][:length].astype(np.float32), txt[row, :length], rtol=1e-2, atol=1e-3)
            assert not mine['txt'][length:].any()


def test_a_broken_off_run_goes_on(nets, stored, tmp_path):
    assert write(nets, tmp_path) == 44
    shard = tmp_path / 'train-00001-of-00003.array_record'
    shard.unlink()
    assert write(nets, tmp_path) == 44
    for mine, theirs in zip(read(tmp_path), read(stored), strict=True):
        np.testing.assert_array_equal(mine['tok'], theirs['tok'])
        np.testing.assert_array_equal(mine['txt'], theirs['txt'])


def test_a_held_out_split_is_taken_once(stored):
    tokens = {row['tok'].tobytes() for row in read(stored, 'heldout_pairs')}
    assert len(read(stored, 'heldout_pairs')) == 26 and len(tokens) > 13, 'every picture of its own'


def test_the_folder_must_fit_the_run(nets, stored, parts, tmp_path):
    data = DataConfig(kind='precomputed', path=str(stored), image_size=16, text_length=31)
    run = toy_run(data=data, eval_data=data, tokenizer=str(parts))
    mesh = make_mesh(MeshConfig())
    assert load_frozen(run, mesh).text_encoder_hash == load_part(parts, 'text_encoder').hash
    with pytest.raises(UserError, match=r'text_width 8, model.text_width is 16'):
        load_frozen(with_model(run, text_width=16), mesh)
    params = nnx.split(VQGAN(TOKENIZER, rngs=nnx.Rngs(params=1)), nnx.Param)[1]
    save_part(tmp_path, 'tokenizer', config=TOKENIZER, params=params, storage='float32')
    with pytest.raises(UserError, match='was made with tokenizer .*: run tools/precompute.py again'):
        load_frozen(dataclasses.replace(run, tokenizer=str(tmp_path)), mesh)


def test_pictures_are_encoded_on_the_way_as_well(stored, parts):
    """Training straight from pictures sees the rows that precomputation stores."""
    run = toy_run(data=SOURCE, eval_data=SOURCE, tokenizer=str(parts), text_encoder=str(parts))
    frozen = load_frozen(run, make_mesh(MeshConfig()))
    loader = make_loader(SOURCE, batch_size=8, seed=5, shard_index=0, shard_count=1, encode_text=frozen.encode_text)
    batch = frozen.encode({k: v for k, v in next(loader).items() if k in ('img', 'ids', 'len')})
    rows = read(stored)[:8]
    np.testing.assert_array_equal(batch['tok'], np.stack([row['tok'] for row in rows]))
    txt = np.stack([row['txt'] for row in rows]).astype(np.float32)
    np.testing.assert_allclose(batch['txt'], txt, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(('name', 'value'), [('num', -1), ('shards', 0)])
def test_counts_are_checked(nets, tmp_path, name, value):
    with pytest.raises(UserError, match=f'--{name} is {value}'):
        write(nets, tmp_path, **{name: value})


def test_export_joins_the_parts(parts, tmp_path):
    spec = importlib.util.spec_from_file_location('export', Path(__file__).parents[2] / 'tools' / 'export.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    run = toy_run()
    params = nnx.split(Transformer(run.model, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    extra = {'decode': {'steps': 3}, 'tokenizer_sha256': load_part(parts, 'tokenizer').hash}
    base = {'config': run.model, 'params': params, 'storage': 'float32'}
    good = extra | {'text_encoder_sha256': load_part(parts, 'text_encoder').hash}
    save_part(tmp_path / 'base', 'base', **base, extra=good)
    assert tool.export(parts, parts, tmp_path / 'base', tmp_path / 'release', 'int8') > 0
    release = load_release(tmp_path / 'release')
    assert release.decode.steps == 3
    save_part(tmp_path / 'other', 'base', **base, extra=good | {'tokenizer_sha256': 'f' * 64})
    with pytest.raises(UserError, match='was trained on tokenizer ffffffffffff'):
        tool.export(parts, parts, tmp_path / 'other', tmp_path / 'release2', 'int8')
    assert not (tmp_path / 'release2').exists(), 'nothing half-written'
