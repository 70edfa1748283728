"""A run killed at any moment goes on to the very files of one that was never killed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from muse.data import precomputed, shards

ROOT = Path(__file__).parents[2]

# Writes the shards that are missing, each record after a short while, and describes the split.
WRITE = """
import sys, time
from pathlib import Path
import numpy as np
from muse.data import precomputed, shards
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
meta = precomputed.Meta(tokenizer_hash='t', text_encoder_hash='e', grid=(4, 4), text_width=8)
print('ready', flush=True)
shards.begin_split(folder, 'train', meta, {'--seed': 0}, 4)
for number in range(4):
    if not precomputed.shard_file(folder, 'train', number, 4).exists():
        with shards.ShardWriter(folder, 'train', number, 4) as writer:
            for i in range(30):
                rng = np.random.default_rng((number, i))
                text = rng.normal(size=(i % 4, 8))
                record = precomputed.encode_record(rng.integers(0, 999, 16), text, f'caption {i}')
                writer.write(record, text=len(text), limit=3)
                time.sleep(pause)
            writer.reject('a/1.jpg', 'truncated')
shards.finish_split(folder, 'train', [('a/2.jpg', 'no caption')])
print('finished')
"""


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', WRITE, str(folder), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_first_captions_that_were_cut_are_named(tmp_path):
    """Three of a split, whatever the shards; notes that shards of before wrote have none."""
    meta = precomputed.Meta(tokenizer_hash='t', text_encoder_hash='e', grid=(1, 1), text_width=1)
    shards.begin_split(tmp_path, 'train', meta, {}, 3)
    record = precomputed.encode_record(np.zeros(1, np.int32), np.ones((2, 1)), 'x')
    for number in range(3):
        with shards.ShardWriter(tmp_path, 'train', number, 3) as writer:
            for i in range(number * 4):
                cut = (f'{number} {i} b c d e f', f'd{i} e f') if i % 2 else None
                writer.write(record, text=2, limit=2, cut=cut)
            writer.reject('\udcff.png', 'half a character')
    notes = next(tmp_path.glob('train-00000*.notes.json'))
    notes.write_text(json.dumps({k: v for k, v in json.loads(notes.read_text()).items() if k != 'cut'}))
    shards.finish_split(tmp_path, 'train', [])
    found = precomputed.read_splits(tmp_path)['train']
    assert found.cut == [['1 1 b c d …', 'd1 e f'], ['1 3 b c d …', 'd3 e f'], ['2 1 b c d …', 'd1 e f']]
    assert found.full_text == 12
    (reject,) = (json.loads(line) for line in (tmp_path / 'train.rejects.jsonl').read_text().splitlines())
    assert reject == {'name': '\udcff.png', 'reason': 'half a character', 'times': 3}


def test_killed_at_any_moment_it_goes_on_to_the_same_files(tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert 'finished' in start(whole, 0).communicate()[0]
    chance, kills = random.Random(0), 0
    for _ in range(6):
        process = start(killed, 0.008)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(chance.uniform(0, 0.35))
        process.send_signal(signal.SIGKILL)
        kills += 'finished' not in process.communicate()[0]
        for file in killed.glob('*.array_record'):  # what has its name is whole
            assert file.read_bytes() == (whole / file.name).read_bytes()
    assert kills >= 3
    assert 'finished' in start(killed, 0).communicate()[0]
    assert contents(killed) == contents(whole)
    assert precomputed.read_splits(killed)['train'].records == 120
    assert len(precomputed.record_files(killed, 'train')) == 4
