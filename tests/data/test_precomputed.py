"""Pre-tokenised records: what goes in comes out, and half-written folders are never read."""

import dataclasses
import json
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from muse.config import DataConfig
from muse.data import precomputed
from muse.data import shards as shards_module
from muse.data.pipeline import make_loader
from muse.errors import UserError

PLAN = {'--seed': 0}
META = precomputed.Meta(tokenizer_hash='t', text_encoder_hash='e', grid=(2, 3), text_width=4)


def record(i: int) -> tuple[np.ndarray, np.ndarray, str]:
    rng = np.random.default_rng(i)
    return rng.integers(0, 60_000, 6), rng.normal(size=(i % 5, 4)).astype(ml_dtypes.bfloat16), f'caption {i} é'


def write(folder, number=23, split='train', meta=META, shards=4, plan=PLAN):
    shards_module.begin_split(folder, split, meta, plan, shards)
    for shard in range(shards):
        with shards_module.ShardWriter(folder, split, shard, shards) as writer:
            for i in range(number * shard // shards, number * (shard + 1) // shards):
                writer.write(precomputed.encode_record(*record(i)), text=len(record(i)[1]), limit=4)
    return shards_module.finish_split(folder, split, [])


@pytest.mark.parametrize('top', [255, 65_535, 65_536, 2**31 - 1])
def test_round_trip(top, tmp_path):
    tok, txt, caption = np.array([0, 7, top]), record(3)[1], 'a “red” apple\n'
    data = precomputed.encode_record(tok, txt, caption)
    got = precomputed.decode_record(data, 5)
    assert got['tok'].dtype == np.int32 and got['tok'].tolist() == tok.tolist()
    assert got['txt'].dtype == ml_dtypes.bfloat16 and got['txt'].shape == (3, 4)
    assert (got['txt'] == txt).all() and got['len'] == 3
    stored = dict(safetensors.deserialize(data))['txt']  # any safetensors reader reads it
    assert stored['dtype'] == 'BF16' and bytes(stored['data']) == txt.tobytes()
    (tmp_path / 'record').write_bytes(data)
    with safetensors.safe_open(tmp_path / 'record', 'np') as file:
        assert file.metadata() == {'caption': caption}


def test_long_text_is_cut_and_no_text_is_empty():
    tok, txt = np.arange(3), np.ones((4, 2))
    cut = precomputed.decode_record(precomputed.encode_record(tok, txt, ''), 2)
    assert cut['len'] == 2 and (cut['txt'] == 1).all()
    none = precomputed.decode_record(precomputed.encode_record(tok, txt[:0], ''), 2)
    assert none['len'] == 0 and none['txt'].shape == (0, 2)


def padded(texts, length):
    """The reference: each text in zeros of its own."""
    return np.stack(
        [np.concatenate([text, np.zeros((length - len(text), text.shape[1]), text.dtype)]) for text in texts]
    )


def test_texts_are_padded_in_arrays_that_nobody_holds():
    rng, pad, held, places = np.random.default_rng(0), precomputed.TextPadder(5), [], set()
    for number in range(30):
        texts = [rng.normal(size=(rng.integers(0, 6), 3)).astype(ml_dtypes.bfloat16) for _ in range(4)]
        got = pad(np.concatenate(texts), np.array([len(text) for text in texts], np.int32))
        places.add(got.ctypes.data)
        np.testing.assert_array_equal(got, padded(texts, 5))
        if number % 10 == 0:
            held.append((got[1:], padded(texts, 5)[1:]))  # a view holds the whole
        if number % 10 == 5:
            held.append((jax.device_put(got), padded(texts, 5)))  # on a CPU the device may read it where it is
        del got
    assert len(places) <= 1 + len(held), 'filled again and again'
    for kept, wanted in held:
        np.testing.assert_array_equal(kept, wanted)


def test_loader_reads_every_record_of_its_split(tmp_path):
    write(tmp_path)
    write(tmp_path, 5, 'heldout_pairs')
    found = precomputed.read_splits(tmp_path)
    assert {name: split.records for name, split in found.items()} == {'train': 23, 'heldout_pairs': 5}
    assert found['train'].without_text == len(range(0, 23, 5)) and found['train'].full_text == len(range(4, 23, 5))
    data = DataConfig(kind='precomputed', path=str(tmp_path), text_length=4)
    loader = make_loader(data, batch_size=23, seed=0)
    batch = next(loader)
    assert set(batch) == {'tok', 'txt', 'len', 'index', 'weight', 'bad'} and batch['txt'].dtype == ml_dtypes.bfloat16
    assert batch['tok'].dtype == batch['len'].dtype == np.int32 and batch['txt'].shape == (23, 4, 4)
    wanted = {tuple(record(i)[0].tolist()): record(i)[1] for i in range(23)}
    assert {tuple(tok) for tok in batch['tok'].tolist()} == set(wanted)
    for tok, txt, length in zip(batch['tok'].tolist(), batch['txt'], batch['len'], strict=True):
        assert length == len(wanted[tuple(tok)]) and (txt[:length] == wanted[tuple(tok)]).all()


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    class Stop(Exception):
        pass

    shards_module.begin_split(tmp_path, 'train', META, PLAN, 4)
    before = set(tmp_path.iterdir())
    with pytest.raises(Stop), shards_module.ShardWriter(tmp_path, 'train', 1, 4) as writer:
        writer.write(precomputed.encode_record(*record(0)), text=0, limit=4)
        raise Stop
    assert set(tmp_path.iterdir()) == before
    (tmp_path / 'train-00001-of-00004.array_record.host.1.partial').write_bytes(b'of a run that was killed')
    write(tmp_path)
    assert len(list(tmp_path.glob('*.array_record'))) == 4 and not list(tmp_path.glob('*.partial'))


def test_rejects_are_named_and_counted(tmp_path):
    shards_module.begin_split(tmp_path, 'train', META, PLAN, 2)
    for shard in range(2):
        with shards_module.ShardWriter(tmp_path, 'train', shard, 2) as writer:
            if shard:  # one shard without any record
                writer.write(precomputed.encode_record(*record(1)), text=1, limit=4)
            writer.reject('a/1.jpg', 'truncated')
            writer.reject(f'a/{shard + 2}.jpg', 'too “small”')
    done = shards_module.finish_split(tmp_path, 'train', [('a/9.jpg', 'no caption')])
    assert (done.records, done.rejected, done.skipped) == (1, 4, 1)
    lines = [json.loads(line) for line in (tmp_path / 'train.rejects.jsonl').read_text().splitlines()]
    assert [(line['name'], line['reason'], line['times']) for line in lines] == [
        ('a/9.jpg', 'no caption', 0),
        ('a/1.jpg', 'truncated', 2),
        ('a/2.jpg', 'too “small”', 1),
        ('a/3.jpg', 'too “small”', 1),
    ]
    data = DataConfig(kind='precomputed', path=str(tmp_path), text_length=4)
    loader = make_loader(data, batch_size=1, seed=0, repeat=False)
    assert [batch['tok'].tolist() for batch in loader] == [[record(1)[0].tolist()]]


def test_a_split_of_rejects_alone_is_refused_and_taken_away(tmp_path):
    shards_module.begin_split(tmp_path, 'train', META, PLAN, 1)
    with shards_module.ShardWriter(tmp_path, 'train', 0, 1) as writer:
        writer.reject('a/1.jpg', 'truncated')
    with pytest.raises(UserError, match='none of 1 examples could be used .a/1.jpg: truncated'):
        shards_module.finish_split(tmp_path, 'train', [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ['meta.json', 'train.rejects.jsonl']


def one_line(caught):
    assert '\n' not in str(caught.value)


def test_refusals_of_writing(tmp_path):
    write(tmp_path)
    for changed, message in (
        ({'meta': dataclasses.replace(META, tokenizer_hash='x')}, 'made with tokenizer t, now it is x: choose another'),
        ({'meta': dataclasses.replace(META, grid=(4, 4))}, r'made with grid \(2, 3\), now it is \(4, 4\)'),
        ({'plan': {'--seed': 1}}, "the split 'train' was begun with --seed 0, now it is 1"),
        ({'shards': 5}, 'was begun with shards 4, now it is 5'),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write(tmp_path, **changed)
        one_line(caught)
    (tmp_path / 'other-00000-of-00001.array_record').write_bytes(b'')
    with pytest.raises(UserError, match="holds files of 'other' that are not described"):
        write(tmp_path, split='other')
    with pytest.raises(UserError, match='cannot write .*Not a directory') as caught:
        write(tmp_path / 'meta.json' / 'folder')
    one_line(caught)


def test_a_full_disk_is_one_line_and_no_shard(tmp_path, monkeypatch):
    shards_module.begin_split(tmp_path, 'train', META, PLAN, 1)
    writer = shards_module.ShardWriter(tmp_path, 'train', 0, 1)
    writer._partial.symlink_to('/dev/full')  # every write to it fails as on a full disk
    with pytest.raises(UserError, match='cannot write .*No space left on device.*make room') as caught, writer:
        for i in range(2000):
            writer.write(precomputed.encode_record(*record(i)), text=0, limit=4)
    one_line(caught)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['meta.json', 'train.split.json']


def test_refusals_of_reading(tmp_path):
    with pytest.raises(UserError, match='no meta.json'):
        precomputed.record_files(tmp_path, 'train')
    write(tmp_path)
    with pytest.raises(UserError, match="no split 'test', only train"):
        precomputed.record_files(tmp_path, 'test')
    shards_module.begin_split(tmp_path, 'begun', META, PLAN, 2)
    with pytest.raises(UserError, match="'begun' is not finished: run its"):
        precomputed.record_files(tmp_path, 'begun')
    shard = tmp_path / 'train-00002-of-00004.array_record'
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match='instead of'):
        precomputed.record_files(tmp_path, 'train')
    shard.unlink()
    with pytest.raises(UserError, match='shard 2 of 4'):
        precomputed.record_files(tmp_path, 'train')
    (tmp_path / 'train.split.json').write_text('{')
    with pytest.raises(UserError, match='train.split.json is damaged'):
        precomputed.record_files(tmp_path, 'train')
    (tmp_path / 'meta.json').write_text(json.dumps({'grid': [1, 1]}))
    with pytest.raises(UserError, match='damaged'):
        precomputed.read_meta(tmp_path)


def test_reading_is_fast_enough(tmp_path):
    """Feeding a fast accelerator takes thousands a second; a tenth of that is asked of a slow core.

    Counted is this thread's own time: others may share the core.
    """
    tok, txt = np.arange(256), np.ones((12, 256))
    data = precomputed.encode_record(tok, txt, 'a red apple, noto style')
    began = time.thread_time()
    for _ in range(300):
        precomputed.decode_record(data, 64)
    assert (time.thread_time() - began) / 300 < 1 / 300
