"""Precomputation and export on real files: stored rows are what the nets say, broken-off runs go on, parts must fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from photos import colour, picture, write_tar, write_tars
from t5_folders import add_vocabulary, write_huggingface
from toys import save_toy_text_encoder, toy_run, with_model

from muse.config import DataConfig, MaskedLossConfig, MeshConfig, VQConfig
from muse.data.pipeline import make_loader
from muse.data.precomputed import read_meta, read_splits
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.models.transformer import Transformer
from muse.models.vqgan import VQGAN, to_float
from muse.release.format import graphdef_and_template, load_part, load_release, save_part
from muse.release.join import join_release
from muse.release.text_encoder import load_text_encoder
from muse.text.encode import encode_prompts
from muse.text.tokenizer import Tokenizer
from muse.train import masked
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
    batch = next(make_loader(SOURCE, batch_size=512, seed=0))
    save_toy_text_encoder(folder, list(batch['caption']))
    return folder


@pytest.fixture(scope='module')
def nets(parts):
    return load_nets(str(parts), str(parts), SOURCE.text_length, make_mesh(MeshConfig(), jax.devices()[:1]))


def write(nets, folder, data=SOURCE, num=44, shards=3):
    seen = []
    with jax.set_mesh(nets.mesh):
        found = precompute(
            data, nets, folder, num=num, shards=shards, batch_size=8, seed=5, progress=lambda *n: seen.append(n)
        )
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    return found.records


@pytest.fixture(scope='module')
def stored(nets, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stored')
    assert write(nets, folder) == 44
    write(nets, folder, dataclasses.replace(SOURCE, split='heldout_pairs'), num=0, shards=1)
    return folder


def read(folder, split='train'):
    data = DataConfig(kind='precomputed', path=str(folder), split=split, image_size=16, text_length=31)
    batches = make_loader(data, batch_size=16, seed=0, repeat=False)
    return [{k: row for k, row in zip(b, rows, strict=True)} for b in batches for rows in zip(*b.values(), strict=True)]


def test_stored_rows_are_what_the_nets_say(nets, stored, parts):
    rows = read(stored)
    assert len(rows) == 44
    model = nnx.merge(nets.tokenizer.graphdef, nets.tokenizer.params)
    text = nnx.merge(nets.text_encoder.graphdef, nets.text_encoder.params)
    loader = make_loader(SOURCE, batch_size=8, seed=5, encode_text=nets.encode_text)
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
    loader = make_loader(SOURCE, batch_size=8, seed=5, encode_text=frozen.text.encode)
    batch = frozen.encode({k: v for k, v in next(loader).items() if k in ('img', 'ids', 'len')})
    rows = read(stored)[:8]
    np.testing.assert_array_equal(batch['tok'], np.stack([row['tok'] for row in rows]))
    txt = np.stack([row['txt'] for row in rows]).astype(np.float32)
    np.testing.assert_allclose(batch['txt'], txt, rtol=1e-2, atol=1e-3)


def test_devices_change_nothing(parts, stored, tmp_path):
    """Rows of a batch are spread over eight devices; a state may round the other way."""
    write(load_nets(str(parts), str(parts), SOURCE.text_length, make_mesh(MeshConfig())), tmp_path)
    for mine, theirs in zip(read(tmp_path), read(stored), strict=True):
        np.testing.assert_array_equal(mine['tok'], theirs['tok'])
        txt = [row['txt'].astype(np.float32) for row in (mine, theirs)]
        np.testing.assert_allclose(*txt, rtol=1 / 128, atol=1e-3)


def test_dropped_text_of_stored_rows_is_no_text(stored):
    """Guidance needs the base to learn "no text" from precomputed rows too (§2.7): what is stored there is not read."""
    run = toy_run(loss=MaskedLossConfig(text_dropout=0.5))
    data = DataConfig(kind='precomputed', path=str(stored), image_size=16, text_length=31)
    batch = next(make_loader(data, batch_size=16, seed=0))
    batch = {name: jnp.asarray(batch[name]) for name in ('tok', 'txt', 'len')}
    dropped = np.asarray(masked.corrupt(run, batch, jax.random.key(0))['len']) == 0
    assert 2 < dropped.sum() < 14 and (np.asarray(batch['len']) > 0).all()
    graphdef, shapes = graphdef_and_template('base', run.model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    model = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    length = jnp.where(dropped, 0, batch['len'])
    logits = np.asarray(model(params, batch['tok'], batch['txt'], length))
    none = np.asarray(model(params, batch['tok'], jnp.zeros_like(batch['txt']), jnp.zeros_like(length)))
    np.testing.assert_array_equal(logits[dropped], none[dropped])
    assert (np.abs(logits - none).max(axis=(1, 2))[~dropped] > 1e-3).all()


@pytest.mark.filterwarnings('ignore:not in the vocabulary', 'ignore:prompt is longer')
def test_a_t5_checkpoint_is_a_text_encoder(parts, tmp_path):
    folder = add_vocabulary(write_huggingface(tmp_path / 't5', 't5_v1_1'), 'spiece.model')
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    nets = load_nets(str(parts), str(folder), SOURCE.text_length, mesh, text_dtype='bfloat16')
    assert write(nets, tmp_path / 'out', num=8, shards=1) == 8
    assert read_meta(tmp_path / 'out').text_width == 48
    loaded = load_text_encoder(folder)
    encoder = nnx.merge(graphdef_and_template('text_encoder', loaded.part.config)[0], loaded.part.params)
    batch = next(make_loader(SOURCE, batch_size=8, seed=5))
    txt_BSD, len_B = encode_prompts(encoder, Tokenizer(loaded.vocabulary), list(batch['caption']), SOURCE.text_length)
    rows = read(tmp_path / 'out')
    assert [int(row['len']) for row in rows] == len_B.tolist()
    for row, txt_SD, length in zip(rows, np.asarray(txt_BSD), len_B, strict=True):
        assert np.abs(row['txt'].astype(np.float32) - txt_SD)[:length].max() < 0.02 * np.abs(txt_SD).max()


@pytest.fixture
def tars(tmp_path):
    """Nine good pictures in tars, and one without a caption, one cut off, one too small, and two without words."""
    write_tars(tmp_path / 'tars', tars=3, each=3)
    cut, tiny = picture(5)[:60], picture(5, size=(9, 9))
    files = {'bare.png': picture(1), 'cut.png': cut, 'cut.txt': b'cut', 'tiny.png': tiny, 'tiny.txt': b'tiny'}
    words = {'a.png': picture(2), 'a.txt': b'', 'b.png': picture(3), 'b.txt': b' \n', 'c.png': picture(4)}
    write_tar(tmp_path / 'tars' / '9.tar', files | words | {'c.txt': b'a long text of words ' * 30})
    return DataConfig(kind='webdataset', path=str(tmp_path / 'tars'), image_size=16, min_side=10, text_length=31)


@pytest.mark.filterwarnings('ignore:.*members are unusable')
def test_from_tars_with_rejects_counted_and_named(nets, tars, tmp_path):
    assert write(nets, tmp_path / 'out', tars, num=0) == 12
    found = read_splits(tmp_path / 'out')['train']
    assert (found.rejected, found.skipped, found.without_text, found.full_text) == (2, 1, 2, 1)
    (begin, lost), whole = found.cut[0], (b'a long text of words ' * 30).decode().split()
    pieces = sentencepiece.SentencePieceProcessor(nets.encode_text.vocabulary).EncodeAsPieces(' '.join(whole))
    first = sum(piece.startswith('▁') for piece in pieces[:31]) - 1  # the word of the first piece that does not fit
    assert len(found.cut) == 1 and begin == 'a long text of words …'
    assert lost == ' '.join(whole[first:][:5]) + ' …'
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'train.rejects.jsonl').read_text().splitlines()]
    assert [(line['name'], line['times']) for line in lines] == [('9.tar/bare', 0), ('9.tar/cut', 1), ('9.tar/tiny', 1)]
    assert lines[2]['reason'] == '9x9 is under 10 pixels on its shorter side'
    rows, model = read(tmp_path / 'out'), nnx.merge(nets.tokenizer.graphdef, nets.tokenizer.params)
    numbers = [*range(9), 2, 3, 4]
    img = np.stack([np.full((16, 16, 3), colour(i), np.uint8) for i in numbers])
    tok = np.asarray(model.encode(to_float(jnp.asarray(img)))).reshape(12, -1)
    np.testing.assert_array_equal(np.stack([row['tok'] for row in rows]), tok)
    assert [int(row['len']) == 0 for row in rows] == [False] * 9 + [True, True, False] and rows[11]['len'] == 31


@pytest.mark.filterwarnings('ignore:.*members are unusable')
def test_rejects_leave_their_place_empty_in_a_shuffled_stream_too(nets, tars, tmp_path):
    assert write(nets, tmp_path / 'out', tars, num=28) == 24  # each of the 14 records came twice
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'train.rejects.jsonl').read_text().splitlines()]
    assert [line['times'] for line in lines] == [0, 2, 2]


def test_nothing_usable_is_one_line_and_nothing_written(nets, tmp_path):
    write_tars(tmp_path / 'tars', tars=1)
    data = DataConfig(kind='webdataset', path=str(tmp_path / 'tars'), image_size=16, min_side=99, text_length=31)
    with pytest.raises(UserError, match='none of 4 examples could be used'):
        write(nets, tmp_path / 'out', data, num=0)
    assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == ['meta.json', 'train.rejects.jsonl']


def test_a_text_encoder_of_nan_is_refused(nets, tmp_path):
    spoiled = jax.tree.map(lambda x: x * jnp.nan, nets.text_encoder.params)
    broken = dataclasses.replace(nets, text_encoder=dataclasses.replace(nets.text_encoder, params=spoiled))
    with pytest.raises(UserError, match='states that are not finite'):
        write(broken, tmp_path, num=8, shards=1)
    assert not list(tmp_path.glob('*.array_record'))


def test_another_run_s_folder_is_refused(nets, stored, parts, tmp_path):
    params = nnx.split(VQGAN(TOKENIZER, rngs=nnx.Rngs(params=1)), nnx.Param)[1]
    save_part(tmp_path, 'tokenizer', config=TOKENIZER, params=params, storage='float32')
    other = load_nets(str(tmp_path), str(parts), SOURCE.text_length, nets.mesh)
    before = {file: file.stat().st_mtime_ns for file in stored.iterdir()}
    with pytest.raises(UserError, match='perhaps unfinished. records made with tokenizer .*choose another folder'):
        write(other, stored, dataclasses.replace(SOURCE, split='heldout_labels'), num=0)
    with pytest.raises(UserError, match="the split 'train' was begun with --num 44, now it is 45: give the same"):
        write(nets, stored, num=45)
    with pytest.raises(UserError, match='begun with data.max_objects 1, now it is 2'):
        write(nets, stored, dataclasses.replace(SOURCE, max_objects=2))
    assert {file: file.stat().st_mtime_ns for file in stored.iterdir()} == before


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num': -1}, '--num is -1'),
        ({'shards': 0}, '--shards is 0'),
        ({'data': dataclasses.replace(SOURCE, image_size=18)}, 'image_size is 18: the tokenizer needs a multiple of 4'),
        ({'data': dataclasses.replace(SOURCE, text_length=32)}, 'text_length is 32: the text encoder reads at most 31'),
        ({'data': dataclasses.replace(SOURCE, kind='precomputed')}, "'precomputed' already"),
        ({'data': dataclasses.replace(SOURCE, kind='webdataset', path='/nowhere')}, 'is not a folder'),
    ],
)
def test_wrong_input_is_one_line_and_nothing_written(nets, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        write(nets, tmp_path / 'out', **changes)
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


# Rank, number of processes, coordinator, nets' folder, output.
PROCESS = """
import sys, warnings
from pathlib import Path
import jax
rank, count, address, parts, out = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(address, num_processes=int(count), process_id=int(rank))
from muse.config import DataConfig, MeshConfig
from muse.mesh import make_mesh
from muse.train.precompute import load_nets, precompute
data = DataConfig(kind='scenes', image_size=16, max_objects=1, text_length=31)
mesh = make_mesh(MeshConfig(), jax.local_devices())
nets = load_nets(parts, parts, 31, mesh)
options = {'num': 44, 'shards': 3, 'batch_size': 8, 'seed': 5}
with jax.set_mesh(mesh):
    found = precompute(data, nets, Path(out), progress=lambda *_: None, **options)
print(jax.process_count(), found.records)
"""


def run_processes(count: int, parts, out) -> list[str]:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    quick = '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0'
    started = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, str(rank), str(count), address, str(parts), str(out)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': quick},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    return [process.communicate(timeout=600)[0].splitlines()[-1] for process in started]


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(parts, tmp_path):
    assert run_processes(1, parts, tmp_path / 'one') == ['1 44']
    assert run_processes(2, parts, tmp_path / 'two') == ['2 44', '2 44']
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ('one', 'two'))
    assert one == two and len(one) == 2 + 2 * 3


def test_export_joins_the_parts(parts, tmp_path):
    run = toy_run()
    params = nnx.split(Transformer(run.model, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    extra = {'decode': {'steps': 3}, 'tokenizer_sha256': load_part(parts, 'tokenizer').hash}
    base = {'config': run.model, 'params': params, 'storage': 'float32'}
    good = extra | {'text_encoder_sha256': load_part(parts, 'text_encoder').hash}
    save_part(tmp_path / 'base', 'base', **base, extra=good)
    assert join_release(parts, parts, tmp_path / 'base', tmp_path / 'release', 'int8', text_dtype='bfloat16') > 0
    release = load_release(tmp_path / 'release')
    assert release.decode.steps == 3
    assert release.text_encoder.config.dtype == 'bfloat16' and release.base.config.dtype == 'float32'
    save_part(tmp_path / 'other', 'base', **base, extra=good | {'tokenizer_sha256': 'f' * 64})
    with pytest.raises(UserError, match='was trained on tokenizer ffffffffffff'):
        join_release(parts, parts, tmp_path / 'other', tmp_path / 'release2', 'int8')
    assert not (tmp_path / 'release2').exists(), 'nothing half-written'
