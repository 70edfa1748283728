"""The loader of precomputed tokens: examples a second, CPU time of each, and the wait beside a training step.

    python tools/bench.py data                                  T5-XXL states (4096 wide), then 768 wide; 0 to 8 workers
    python tools/bench.py data --width=768 --workers=0,4 --batches=20

Shards of random tokens and text states are made in --shards (a temporary folder when not given), with texts as long as
real captions: about 20 tokens, 3 to 127. Then the loader is read in two ways: as fast as it goes, and with a simulated
step of batch / --images_per_s seconds between two batches, in which this process sleeps as it does when an accelerator
works. `data_wait` is the share of the time spent waiting for the next batch, as training logs it. `cpu_us` is the CPU
time of an example in all processes; `examples_per_core_s` is what one core makes of it in a second.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from muse.config import DataConfig
from muse.data.pipeline import make_loader
from muse.data.precomputed import Meta, encode_record, read_splits
from muse.data.shards import ShardWriter, begin_split, finish_split

SPLIT, TEXT_LENGTH, TOKENS, CODES = 'train', 127, 256, 8192


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument('--width', default='4096,768', help='of the text states, with commas')
    parser.add_argument('--workers', default='0,1,2,4,8', help='worker processes to measure, with commas; 0: threads')
    parser.add_argument('--batch', type=int, default=512, help='examples a batch')
    parser.add_argument('--batches', type=int, default=12, help='batches timed')
    parser.add_argument('--records', type=int, default=2048, help='records made, read again and again')
    parser.add_argument('--images_per_s', type=float, default=2000.0, help='speed of the simulated training')
    parser.add_argument('--shards', default='', help='folder of the shards; made where it is empty and kept')


def make_shards(folder: Path, width: int, records: int) -> float:
    """Writes the shards unless they are there; returns the mean length of their texts."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(2.9, 0.45, records)), 3, TEXT_LENGTH).astype(int)
    meta = Meta(tokenizer_hash='random', text_encoder_hash='random', grid=(16, 16), text_width=width)
    begin_split(folder, SPLIT, meta, {'records': records}, 1)
    if read_splits(folder)[SPLIT].sizes is None:
        with ShardWriter(folder, SPLIT, 0, 1) as shard:
            for length in lengths:
                txt_SD = rng.standard_normal((length, width), np.float32).astype(ml_dtypes.bfloat16)
                record = encode_record(rng.integers(0, CODES, TOKENS), txt_SD, 'random')
                shard.write(record, text=int(length), limit=TEXT_LENGTH)
        finish_split(folder, SPLIT, ())
    return float(lengths.mean())


def _cpu_seconds() -> float:
    """CPU time of this process and of the living processes below it."""
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
            tasks = list(Path(f'/proc/{pid}/task').iterdir())
            waiting += [int(child) for task in tasks for child in (task / 'children').read_text().split()]
        except FileNotFoundError:  # it ended meanwhile
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return total


def _read(loader: Iterator[Any], batches: int, pause: float) -> tuple[float, list[float]]:
    """Seconds in all, and the wait for each batch."""
    waits, start = [], time.perf_counter()
    for _ in range(batches):
        before = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - before)
        time.sleep(pause)
    return time.perf_counter() - start, waits


def measure(data: DataConfig, batch: int, batches: int, images_per_s: float) -> dict[str, Any]:
    """Reads one loader in both ways."""
    loader, pause = make_loader(data, batch_size=batch, seed=0), batch / images_per_s
    first, _ = _read(loader, 1, 0.0)  # workers start
    for _ in itertools.repeat(None, 2 * max(data.workers, 1)):  # what they prepared meanwhile
        next(loader)
    cpu = _cpu_seconds()
    seconds, _ = _read(loader, batches, 0.0)
    cpu = _cpu_seconds() - cpu
    stepped, waits = _read(loader, batches, pause)
    return {
        'examples_per_s': round(batches * batch / seconds, 1),
        'cpu_us': round(1e6 * cpu / (batches * batch), 1),
        'examples_per_core_s': round(batches * batch / cpu, 1) if cpu else None,
        'data_wait': round(sum(waits) / stepped, 4),
        'wait_ms_median': round(1e3 * statistics.median(waits), 2),
        'step_ms': round(1e3 * pause, 1),
        'first_batch_s': round(first, 2),
    }


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case for each width and number of workers."""
    with tempfile.TemporaryDirectory() as temporary:
        for width in map(int, args.width.split(',')):
            folder = Path(args.shards or temporary) / f'width{width}'
            length = make_shards(folder, width, args.records)
            for workers in map(int, args.workers.split(',')):
                data = DataConfig(
                    kind='precomputed', path=str(folder), split=SPLIT, text_length=TEXT_LENGTH, workers=workers
                )
                yield {
                    'width': width,
                    'mean_text_tokens': round(length, 1),
                    'batch': args.batch,
                    'workers': workers,
                    'cores': os.cpu_count(),
                    'load': round(os.getloadavg()[0], 1),
                    **measure(data, args.batch, args.batches, args.images_per_s),
                }
