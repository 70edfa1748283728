"""The input pipeline (grain): from a source to this host's batches.

The global batch of a step depends on the seed and the step alone. Hosts take strided shares of it, so their number does
not matter, and a run resumes from its step without any saved state.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from muse.config import DataConfig
from muse.data.sources import Source, open_source
from muse.errors import UserError

EncodeText = Callable[[str], tuple[np.ndarray, int]]

_MAX_THREADS = 8


def make_loader(
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard_index: int | None = None,
    shard_count: int | None = None,
    encode_text: EncodeText | None = None,
    repeat: bool = True,
) -> Iterator[dict[str, Any]]:
    """Batches of one source, from `start_step` on.

    Args:
        data: the source.
        batch_size: examples a batch on this host: the global batch over `shard_count`.
        seed: decides the order of every epoch and the chance in every example.
        start_step: batches to leave out at the beginning, at no cost.
        shard_index: this host's number; default `jax.process_index()`.
        shard_count: number of hosts; default `jax.process_count()`.
        encode_text: caption -> (ids int32 [S], length); adds 'ids' and 'len' to the batch. It runs in this process.
            Pre-tokenised records have no need of it.
        repeat: True gives endless shuffled epochs. False gives one pass in the order of the records; its last batch
            may be short, and hosts may differ in their number of batches by one.

    Returns:
        An iterator of {'img': uint8 [b,H,W,3], 'caption': object [b] of str, 'index': int64 [b], and with
        `encode_text` 'ids': int32 [b,S], 'len': int32 [b]}; for kind 'precomputed' of {'tok': int32 [b,T],
        'txt': bfloat16 [b,S,D], 'len': int32 [b], 'index': int64 [b]}. 'index' counts examples over the whole run.

    Raises:
        UserError: the source does not exist or a setting does not fit it; see `open_source`.
    """
    if shard_index is None or shard_count is None:
        import jax

        shard_index, shard_count = jax.process_index(), jax.process_count()
    if batch_size < 1 or start_step < 0 or data.workers < 0 or not 0 <= shard_index < shard_count:
        raise UserError(
            f'batch_size {batch_size} must be at least 1, start_step {start_step} and workers {data.workers} not '
            f'negative, and shard {shard_index} one of {shard_count}'
        )
    batches = _host_batches(open_source(data), batch_size, seed, start_step, (shard_index, shard_count), repeat)
    return _Loader(_read(batches, data.workers), None if data.kind == 'precomputed' else encode_text)


class _Loader:
    """The iterator handed out: adds the text, and stops grain's threads and workers when it goes."""

    def __init__(self, batches: grain.DatasetIterator[dict[str, Any]], encode_text: EncodeText | None):
        # In a list, to be let go of by the finalizer: it runs at the latest before the interpreter tears its modules
        # down, on which grain's own clean-up stumbles.
        self._batches, self._encode_text = [batches], encode_text
        weakref.finalize(self, self._batches.clear)

    def __iter__(self) -> _Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        # Copied out of the workers' shared memory, which would outlive them in the caller's hands.
        batch = {key: np.array(value) for key, value in next(self._batches[0]).items()}
        if self._encode_text is not None:
            encoded = [self._encode_text(caption) for caption in batch['caption']]
            batch['ids'] = np.stack([ids for ids, _ in encoded]).astype(np.int32)
            batch['len'] = np.array([length for _, length in encoded], np.int32)
        return batch


def _host_batches(
    source: Source, batch_size: int, seed: int, start_step: int, shard: tuple[int, int], repeat: bool
) -> grain.MapDataset[dict[str, Any]]:
    shard_index, shard_count = shard
    records = grain.MapDataset.range(len(source))
    if repeat:
        records = records.seed(seed % 2**32).shuffle().repeat()  # shuffled anew in each epoch
    examples = records.map_with_index(_MakeExample(source, seed % 2**32))
    share = examples[start_step * batch_size * shard_count + shard_index :: shard_count]
    # Batched before it is read: worker processes then take turns batch by batch, and their number does not matter.
    return share.batch(batch_size, batch_fn=_collate)


class _MakeExample:
    """(index over the run, record) -> example; a class, for workers receive it pickled."""

    def __init__(self, source: Source, seed: int):
        self._source, self._seed = source, seed

    def __call__(self, index: int, record: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._seed, index))
        return {**self._source.example(int(record), rng), 'index': np.int64(index)}


def _collate(examples: Any) -> dict[str, np.ndarray]:
    batch = {key: np.stack([e[key] for e in examples]) for key in examples[0] if key != 'caption'}
    if 'caption' in examples[0]:
        batch['caption'] = np.array([e['caption'] for e in examples], dtype=object)
    return batch


def _read(batches: grain.MapDataset[dict[str, Any]], workers: int) -> grain.DatasetIterator[dict[str, Any]]:
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    if workers == 0:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(batches.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which a library user never parsed
    lines = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return iter(lines.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)))
