"""Pre-tokenised records: what goes in comes out, and half-written folders are never read."""

import json
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors

from muse.config import DataConfig
from muse.data import precomputed
from muse.data.pipeline import make_loader
from muse.errors import UserError

META = precomputed.Meta(tokenizer_hash='t', text_encoder_hash='e', grid=(2, 3), text_width=4)


def record(i: int) -> tuple[np.ndarray, np.ndarray, str]:
    rng = np.random.default_rng(i)
    return rng.integers(0, 60_000, 6), rng.normal(size=(i % 5, 4)).astype(ml_dtypes.bfloat16), f'caption {i} é'


def write(folder, number=23, split='train', meta=META):
    with precomputed.Writer(folder, split, meta, shards=4) as writer:
        for i in range(number):
            writer.write(precomputed.encode_record(*record(i)))


@pytest.mark.parametrize('top', [255, 65_535, 65_536, 2**31 - 1])
def test_round_trip(top):
    tok, txt, caption = np.array([0, 7, top]), record(3)[1], 'a “red” apple\n'
    data = precomputed.encode_record(tok, txt, caption)
    got = precomputed.decode_record(data, 5)
    assert got['tok'].dtype == np.int32 and got['tok'].tolist() == tok.tolist()
    assert got['txt'].dtype == ml_dtypes.bfloat16 and got['txt'].shape == (5, 4)
    assert (got['txt'][:3] == txt).all() and (got['txt'][3:] == 0).all() and got['len'] == 3
    assert precomputed.record_caption(data) == caption
    stored = dict(safetensors.deserialize(data))['txt']  # any safetensors reader reads it
    assert stored['dtype'] == 'BF16' and bytes(stored['data']) == txt.tobytes()


def test_long_text_is_cut_and_no_text_is_zeros():
    tok, txt = np.arange(3), np.ones((4, 2))
    cut = precomputed.decode_record(precomputed.encode_record(tok, txt, ''), 2)
    assert cut['len'] == 2 and (cut['txt'] == 1).all()
    none = precomputed.decode_record(precomputed.encode_record(tok, txt[:0], ''), 2)
    assert none['len'] == 0 and none['txt'].shape == (2, 2) and (none['txt'] == 0).all()


def test_loader_reads_every_record_of_its_split(tmp_path):
    write(tmp_path)
    write(tmp_path, 5, 'heldout_pairs')
    assert precomputed.read_meta(tmp_path).counts == {'train': 23, 'heldout_pairs': 5}
    data = DataConfig(kind='precomputed', path=str(tmp_path), text_length=4)
    loader = make_loader(data, batch_size=23, seed=0, shard_index=0, shard_count=1)
    batch = next(loader)
    assert set(batch) == {'tok', 'txt', 'len', 'index'} and batch['txt'].dtype == ml_dtypes.bfloat16
    assert batch['tok'].dtype == batch['len'].dtype == np.int32 and batch['txt'].shape == (23, 4, 4)
    wanted = {tuple(record(i)[0].tolist()): record(i)[1] for i in range(23)}
    assert {tuple(tok) for tok in batch['tok'].tolist()} == set(wanted)
    for tok, txt, length in zip(batch['tok'].tolist(), batch['txt'], batch['len'], strict=True):
        assert length == len(wanted[tuple(tok)]) and (txt[:length] == wanted[tuple(tok)]).all()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), precomputed.Writer(tmp_path, 'train', META) as writer:
        writer.write(precomputed.encode_record(*record(0)))
        raise Stop
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    assert len(list(tmp_path.glob('*.array_record'))) == 4 and not list(tmp_path.glob('*.partial'))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match='no meta.json'):
        precomputed.record_files(tmp_path, 'train')
    write(tmp_path)
    with pytest.raises(UserError, match="already holds the split 'train'"):
        write(tmp_path)
    with pytest.raises(UserError, match='another tokenizer'):
        write(
            tmp_path,
            split='other',
            meta=precomputed.Meta(tokenizer_hash='x', text_encoder_hash='e', grid=(2, 3), text_width=4),
        )
    with pytest.raises(UserError, match="no split 'test', only train"):
        precomputed.record_files(tmp_path, 'test')
    (tmp_path / 'train-00002-of-00004.array_record').unlink()
    with pytest.raises(UserError, match='shard 2 of 4'):
        precomputed.record_files(tmp_path, 'train')
    (tmp_path / 'meta.json').write_text(json.dumps({'grid': [1, 1]}))
    with pytest.raises(UserError, match='damaged'):
        precomputed.read_meta(tmp_path)


def test_reading_is_fast_enough(tmp_path):
    """Feeding a fast accelerator takes thousands a second; a tenth of that is asked of a busy machine."""
    tok, txt = np.arange(256), np.ones((12, 256))
    data = precomputed.encode_record(tok, txt, 'a red apple, noto style')
    began = time.perf_counter()
    for _ in range(300):
        precomputed.decode_record(data, 64)
    assert (time.perf_counter() - began) / 300 < 1 / 300
