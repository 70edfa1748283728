"""A run killed at any moment goes on to the very files of one that was never killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from muse.data import precomputed

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


def test_killed_at_any_moment_it_goes_on_to_the_same_files(tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert 'finished' in start(whole, 0).communicate()[0]
    chance, kills = random.Random(0), 0
    for _ in range(6):
        process = start(killed, 0.004)
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
