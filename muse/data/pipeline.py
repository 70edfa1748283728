"""The input pipeline (grain): from a source to this host's batches.

The global batch of a step depends on the seed and the step alone, rows in their order. Each host reads the rows that
its devices hold, so the number of hosts does not matter, and a run resumes from its step without any saved state. A
record that cannot be used keeps its place too: another stands in for it, with weight 0.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from muse.config import DataConfig
from muse.data.examples import BadExample, Source
from muse.data.precomputed import TextPadder
from muse.data.sources import open_source
from muse.errors import UserError, warn

EncodeText = Callable[[str], tuple[np.ndarray, int]]

_MAX_THREADS = 8
_MOST_BAD = 1000  # unusable records in a row that are passed over
_NAMED = 5  # of them that a loader names


def make_loader(
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    encode_text: EncodeText | None = None,
    repeat: bool = True,
) -> Iterator[dict[str, Any]]:
    """Batches of one source, from `start_step` on.

    Args:
        data: the source.
        batch_size: examples a batch, over all hosts.
        seed: decides the order of every epoch and the chance in every example.
        start_step: batches to leave out at the beginning, at no cost.
        rows: which rows of each batch to read, in this order; default all. They are b in number.
        encode_text: caption -> (ids int32 [S], length); adds 'ids' and 'len' to the batch. It runs in this process.
            Pre-tokenised records have no need of it.
        repeat: True gives endless shuffled epochs. False gives one pass in the order of the records; its last batch
            may be short, and is left out where none of its rows is wanted.

    Returns:
        An iterator of {'img': uint8 [b,H,W,3], 'caption': object [b] of str, 'index': int64 [b], 'weight': float32 [b],
        'bad': object [b] of str, and with `encode_text` 'ids': int32 [b,S], 'len': int32 [b]}; for kind 'precomputed'
        of {'tok': int32 [b,T], 'txt': bfloat16 [b,S,D], 'len': int32 [b]} beside 'index', 'weight' and 'bad', and 'low'
        int32 [b,T2] where stored. 'index' counts examples over the whole run. In the place of a record that cannot be
        used is the next one that can, the same in every run; the row's 'weight' is 0 instead of 1, its 'bad' says which
        record and why instead of '', and a warning names it.

    Raises:
        UserError: the source does not exist or a setting does not fit it; see `open_source`.
    """
    wanted = range(batch_size) if rows is None else rows
    if batch_size < 1 or start_step < 0 or data.workers < 0 or not all(0 <= row < batch_size for row in wanted):
        raise UserError(
            f'batch_size {batch_size} must be at least 1, start_step {start_step} and workers {data.workers} not '
            f'negative, and rows from 0 to below the batch size'
        )
    source = open_source(data)
    examples = _examples(source, _Substitute(source, seed % 2**32), seed, repeat)
    # Batched before it is read: worker processes then take turns batch by batch, and their number does not matter.
    numbers = range(start_step, max(start_step, -(-(len(examples) - min(wanted)) // batch_size)))
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(_ReadRows(examples, batch_size, wanted))
    return _Loader(_read(batches, data), None if data.kind == 'precomputed' else encode_text)


def source_names(data: DataConfig, indices: Sequence[int], seed: int) -> list[str]:
    """What the source calls the records behind examples of an endless run, by their 'index'."""
    source = open_source(data)
    records: Any = _records(source, seed, repeat=True)
    return [source.name(int(records[int(index)])) for index in indices]


def read_spans(
    data: DataConfig, spans: Sequence[tuple[int, int]], *, seed: int, encode_text: EncodeText, repeat: bool
) -> Iterator[dict[str, Any]]:
    """One batch for each span (start, stop) of examples, which are those that `make_loader` numbers so by 'index'.

    Nothing is put in the place of a record that cannot be used: its row is missing, and 'bad' names it.

    Args:
        data: the source, not 'precomputed'.
        spans: any parts of the run in any order; with `repeat` False none may go past the source's end.
        seed, encode_text, repeat: as for `make_loader`.

    Returns:
        An iterator of batches as `make_loader` gives, perhaps with fewer rows than the span or none at all, each with
        'bad': object [n] of (name, reason).

    Raises:
        UserError: as `make_loader`.
    """
    if not spans:
        return iter(())
    source = open_source(data)
    examples = _examples(source, _Mark(source, seed % 2**32), seed, repeat)
    batches = grain.MapDataset.source(list(spans)).map(_ReadSpan(examples))
    return _Loader(_read(batches, data), encode_text)


class _Loader:
    """The iterator handed out: adds the text, and stops grain's threads and workers when it goes."""

    def __init__(self, batches: grain.DatasetIterator[dict[str, Any]], encode_text: EncodeText | None):
        # In a list, to be let go of by the finalizer: it runs at the latest before the interpreter tears its modules
        # down, on which grain's own clean-up stumbles.
        self._batches, self._encode_text, self._named = [batches], encode_text, 0
        weakref.finalize(self, self._batches.clear)

    def __iter__(self) -> _Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches[0])
        for reason in batch['bad'] if 'weight' in batch else ():
            self._name(reason)
        if self._encode_text is not None and 'caption' in batch:
            encoded = [self._encode_text(caption) for caption in batch['caption']]
            batch['ids'] = np.stack([ids for ids, _ in encoded]).astype(np.int32)
            batch['len'] = np.array([length for _, length in encoded], np.int32)
        return batch

    def _name(self, reason: str) -> None:
        if reason and self._named < _NAMED:
            self._named += 1
            rest = ' (no more are named)' if self._named == _NAMED else ''
            warn(f'{reason}; the next record takes its place, with weight 0{rest}')


def _records(source: Source, seed: int, repeat: bool) -> grain.MapDataset[int]:
    """Index over the run -> record."""
    records = grain.MapDataset.range(len(source))
    return records.seed(seed % 2**32).shuffle().repeat() if repeat else records  # shuffled anew in each epoch


def _examples(
    source: Source, make: Callable[[int, int], dict[str, Any]], seed: int, repeat: bool
) -> grain.MapDataset[dict[str, Any]]:
    return _records(source, seed, repeat).map_with_index(make)


def _make(source: Source, seed: int, index: int, record: int) -> dict[str, Any]:
    return {**source.example(record, np.random.default_rng((seed, index))), 'index': np.int64(index)}


class _Substitute:
    """(index over the run, record) -> example; in the place of a record that cannot be used comes the next that can.

    A class, for workers receive it pickled.
    """

    def __init__(self, source: Source, seed: int):
        self._source, self._seed = source, seed

    def __call__(self, index: int, record: int) -> dict[str, Any]:
        first, reason = '', ''
        for step in range(_MOST_BAD):
            try:
                example = _make(self._source, self._seed, index, (int(record) + step) % len(self._source))
            except BadExample as error:
                reason = str(error)
                first = first or reason
            else:
                return {**example, 'weight': np.float32(step == 0), 'bad': first}
        raise UserError(f'{_MOST_BAD} records in a row cannot be used, the last: {reason}')


class _Mark:
    """(index over the run, record) -> example, or {'bad': (name, reason)} for a record that cannot be used."""

    def __init__(self, source: Source, seed: int):
        self._source, self._seed = source, seed

    def __call__(self, index: int, record: int) -> dict[str, Any]:
        try:
            return _make(self._source, self._seed, index, int(record))
        except BadExample as error:
            return {'bad': (error.name, error.reason)}


class _ReadRows:
    """Number of a batch -> its wanted rows."""

    def __init__(self, examples: grain.MapDataset[dict[str, Any]], batch_size: int, rows: Sequence[int]):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        first = int(number) * self._batch_size
        return _collate([self._examples[first + row] for row in self._rows if first + row < len(self._examples)])


class _ReadSpan:
    """(start, stop) -> a batch of the good examples, and what was wrong with the others."""

    def __init__(self, examples: grain.MapDataset[dict[str, Any]]):
        self._examples = examples

    def __call__(self, span: tuple[int, int]) -> dict[str, np.ndarray]:
        found: list[Any] = [self._examples[i] for i in range(*span)]
        good = [example for example in found if 'bad' not in example]
        bad = np.empty(len(found) - len(good), object)  # filled one by one: numpy would take pairs for a matrix
        for i, example in enumerate(example for example in found if 'bad' in example):
            bad[i] = example['bad']
        return {**(_collate(good) if good else {'index': np.zeros(0, np.int64)}), 'bad': bad}


def _collate(examples: Any) -> dict[str, np.ndarray]:
    def column(key: str) -> np.ndarray:
        values = [example[key] for example in examples]
        if key == 'txt':  # texts travel without their pads, most of the bytes: `_Own` puts them in
            return np.concatenate(values)
        return np.array(values, object) if isinstance(values[0], str) else np.stack(values)

    return {key: column(key) for key in examples[0]}


class _Own:
    """A batch in memory of its own: that of the workers is shared, and would outlive them in the caller's hands."""

    def __init__(self, text_length: int):
        self._pad = TextPadder(text_length)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        owned = {key: np.array(value) for key, value in batch.items() if key != 'txt'}
        owned |= {'txt': self._pad(batch['txt'], batch['len'])} if 'txt' in batch else {}
        batch.clear()  # the last one would lie in frames of grain until the process ends, which warns of a leak then
        return owned


def _read(batches: grain.MapDataset[dict[str, Any]], data: DataConfig) -> grain.DatasetIterator[dict[str, Any]]:
    """Batches read by threads or worker processes, and copied out by one more thread ahead of the caller."""
    lines = _read_ahead(batches, data.workers).map(_Own(data.text_length))
    return iter(grain.experimental.ThreadPrefetchIterDataset(lines, prefetch_buffer_size=1))


def _read_ahead(batches: grain.MapDataset[dict[str, Any]], workers: int) -> grain.IterDataset[dict[str, Any]]:
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    if workers == 0:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return batches.to_iter_dataset(options)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which a library user never parsed
    lines = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return lines.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
