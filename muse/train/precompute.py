"""Runs the frozen nets over a source once and stores what the base trains on: picture tokens and text states. With a
second tokenizer it stores what the super-res trains on: the tokens of both.

Three things go on at once: data workers make pictures, the device encodes, and a thread writes records. A split is
written shard by shard; each depends on the settings and its own number alone, so a broken-off run goes on at the first
missing one, and processes share the shards out among them without a word.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from muse.config import DataConfig, Dtype, to_dict
from muse.data.pipeline import read_spans
from muse.data.precomputed import Meta, Split, encode_record, read_splits, shard_file
from muse.data.shards import ShardWriter, begin_split, finish_split
from muse.data.sources import open_source
from muse.data.splits import TRAIN
from muse.errors import InputWarning, UserError
from muse.mesh import shard_batch
from muse.release.format import load_part, load_superres_tokenizer
from muse.release.text_encoder import load_text_encoder
from muse.train.frozen import CaptionEncoder, Net, encode_captions, encode_pictures, place
from muse.train.superres_nets import encode_shrunk

_QUEUED_BATCHES = 8
# {'tok', 'txt', 'len', 'caption', 'index'} and perhaps 'low', one row an example; and 'bad', those that are none
Encoded = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nets:
    """The frozen nets and the vocabulary of one precomputation.

    `low_tokenizer`, where there is one, reads the pictures at 1/`low_ratio` of their size.
    """

    tokenizer: Net
    text_encoder: Net
    encode_text: CaptionEncoder
    mesh: Mesh
    low_tokenizer: Net | None = None
    low_ratio: int = 1


def load_nets(
    tokenizer: str,
    text_encoder: str,
    text_length: int,
    mesh: Mesh,
    low_tokenizer: str = '',
    low_ratio: int = 2,
    text_dtype: Dtype | None = None,
) -> Nets:
    """Loads the nets onto the mesh. Raises UserError when one is missing or damaged.

    Args:
        tokenizer: folder of the tokenizer; of the high-res one for the super-res.
        text_encoder: a release folder, a T5 checkpoint's folder or its name on the hub: see `load_text_encoder`.
        text_length: most tokens of a text, with </s>.
        mesh: devices of this process.
        low_tokenizer: for the super-res, the folder of the base's tokenizer; '' for the base.
        low_ratio: how much smaller the low-res tokenizer's pictures are.
        text_dtype: of the text encoder's weights and compute; None as `load_text_encoder` says.
    """
    high = load_superres_tokenizer(tokenizer) if low_tokenizer else load_part(tokenizer, 'tokenizer')
    text = load_text_encoder(text_encoder, dtype=text_dtype, mesh=mesh)
    return Nets(
        tokenizer=place(high, 'tokenizer', mesh),
        low_tokenizer=place(load_part(low_tokenizer, 'tokenizer'), 'tokenizer', mesh) if low_tokenizer else None,
        low_ratio=low_ratio,
        text_encoder=place(text.part, 'text_encoder', mesh),
        encode_text=CaptionEncoder(str(text.vocabulary), text_length),
        mesh=mesh,
    )


def precompute(
    data: DataConfig,
    nets: Nets,
    folder: Path,
    *,
    num: int,
    shards: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Split:
    """Writes one split of `folder` and returns what it holds.

    Called by all processes of a job it spreads the shards over them; `folder` must then be shared. The files are the
    same bytes whatever the number of processes, where each has devices of the same kind and number and the same
    `batch_size`; otherwise states may round differently.

    Args:
        data: the source; `data.split` names the split on both sides.
        nets: frozen nets, on devices of this process.
        folder: made when missing; may hold other splits made with the same nets.
        num: examples to draw from the endless shuffled source; 0 takes each record of it once, in order.
        shards: files to write, fewer where there is not a batch for each; those that are there are left alone.
        batch_size: pictures at a time; a multiple of the number of devices of this process.
        seed: of the order and of the scenes.
        progress: called with this process's finished examples and all of its examples, after each batch.

    Raises:
        UserError: a count that is no count, a source that does not fit or holds nothing usable, a folder that cannot be
            written, was made with other nets, or holds this split made in another way.
    """
    _check(data, nets, num=num, shards=shards, batch_size=batch_size)
    source, split = open_source(data), data.split or TRAIN
    total = num or len(source)
    shards = min(shards, -(-total // batch_size))  # a shard's last batch is filled up: not of a few examples each
    ranges = [(total * i // shards, total * (i + 1) // shards) for i in range(shards)]
    found = begin_split(folder, split, _meta(data, nets), _plan(data, nets, num, total, seed), shards)
    mine = range(jax.process_index(), shards, jax.process_count())
    todo = [i for i in mine if not _is_there(shard_file(folder, split, i, shards), found, i)]
    bar = _Progress(progress, total=sum(stop - start for start, stop in (ranges[i] for i in mine)))
    bar.add(bar.total - sum(stop - start for start, stop in (ranges[i] for i in todo)))
    spans = [_spans(*ranges[i], batch_size) for i in todo]
    encode_text = _quiet(nets.encode_text)
    batches = read_spans(data, list(itertools.chain(*spans)), seed=seed, encode_text=encode_text, repeat=num > 0)
    for i, share in zip(todo, spans, strict=True):
        with ShardWriter(folder, split, i, shards) as writer:
            encoded = _encode(itertools.islice(batches, len(share)), nets, batch_size)
            _write(writer, encoded, nets.encode_text, bar)
    next(batches, None)  # at its end a loader's workers leave nothing behind
    _wait_for_all('written')
    if jax.process_index() == 0 and (todo or found.sizes is None):
        finish_split(folder, split, source.skipped())
    _wait_for_all('described')
    return read_splits(folder)[split]


def _check(data: DataConfig, nets: Nets, **counts: int) -> None:
    if data.kind == 'precomputed':
        raise UserError("data.kind is 'precomputed' already: give a config whose data are pictures")
    for name, value in counts.items():
        if value < (low := 0 if name == 'num' else 1):
            raise UserError(f'--{name} is {value}: it must be at least {low}')
    if counts['batch_size'] % nets.mesh.size:
        raise UserError(f'--batch_size is {counts["batch_size"]}: it must be a multiple of {nets.mesh.size} devices')
    if data.text_length > (most := nets.text_encoder.config.max_length):
        raise UserError(f'data.text_length is {data.text_length}: the text encoder reads at most {most} tokens')


def _plan(data: DataConfig, nets: Nets, num: int, total: int, seed: int) -> dict[str, Any]:
    """What decides every record, apart from the nets' weights. The source's folder may have moved meanwhile."""
    source = {f'data.{key}': value for key, value in to_dict(data).items() if key not in ('path', 'workers', 'split')}
    dtype = nets.text_encoder.config.dtype
    return {'--num': num, '--seed': seed, 'number of examples': total, 'text encoder dtype': dtype, **source}


def _is_there(file: Path, found: Split, number: int) -> bool:
    return file.exists() and (found.sizes is None or file.stat().st_size == found.sizes[number])


def _spans(start: int, stop: int, batch_size: int) -> list[tuple[int, int]]:
    return [(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]


def _quiet(encode_text: CaptionEncoder) -> Callable[[str], tuple[np.ndarray, int]]:
    """Without a warning for each long caption: those are counted."""

    def encode(caption: str) -> tuple[np.ndarray, int]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', InputWarning)
            return encode_text(caption)

    return encode


def _wait_for_all(what: str) -> None:
    """Returns when every process of the job is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'precompute {what}')


class _Progress:
    """Counts examples; `add` is called from the writing thread."""

    def __init__(self, show: Callable[[int, int], None], total: int):
        self._show, self.total, self._done = show, total, 0

    def add(self, examples: int) -> None:
        self._done += examples
        self._show(self._done, self.total)


def _meta(data: DataConfig, nets: Nets) -> Meta:
    side, rest = divmod(data.image_size, nets.tokenizer.config.factor)
    if rest:
        factor = nets.tokenizer.config.factor
        raise UserError(f'data.image_size is {data.image_size}: the tokenizer needs a multiple of {factor} pixels')
    meta = Meta(
        tokenizer_hash=nets.tokenizer.hash,
        text_encoder_hash=nets.text_encoder.hash,
        grid=(side, side),
        text_width=nets.text_encoder.config.width,
    )
    if nets.low_tokenizer is None:
        return meta
    pixels = nets.low_ratio * nets.low_tokenizer.config.factor
    if nets.low_ratio < 1 or data.image_size % pixels:
        raise UserError(
            f'data.image_size is {data.image_size}: at 1/{nets.low_ratio} of it the low-res tokenizer needs whole '
            f'tokens of {pixels // nets.low_ratio} pixels; change --low_ratio'
        )
    low_side = data.image_size // pixels
    return dataclasses.replace(meta, low_tokenizer_hash=nets.low_tokenizer.hash, low_grid=(low_side, low_side))


def _encode(batches: Iterator[dict[str, Any]], nets: Nets, batch_size: int) -> Iterator[Encoded]:
    """Encodes batch after batch; the device works on the next one while the last one is fetched."""
    waiting: tuple[dict[str, jax.Array], dict[str, Any]] | None = None
    for batch in batches:
        encoded = _on_device(batch, nets, batch_size) if len(batch['index']) else {}
        if waiting:
            yield _fetch(*waiting)
        waiting = (encoded, batch)
    if waiting:
        yield _fetch(*waiting)


def _on_device(batch: dict[str, Any], nets: Nets, batch_size: int) -> dict[str, jax.Array]:
    """Tokens and text states of a batch filled up to `batch_size`, so that one program serves all."""
    padded = {k: _pad(batch[k], batch_size - len(batch['img'])) for k in ('img', 'ids', 'len')}
    placed = shard_batch(nets.mesh, padded)
    encoded = {'tok': encode_pictures(nets.tokenizer.graphdef, nets.tokenizer.params, placed['img'])}
    if (low := nets.low_tokenizer) is not None:
        encoded['low'] = encode_shrunk(low.graphdef, low.params, placed['img'], nets.low_ratio)
    text = nets.text_encoder
    txt_BSD = encode_captions(text.graphdef, text.params, placed['ids'], placed['len'])
    encoded['txt'] = txt_BSD.astype(jnp.bfloat16)
    return encoded


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) if rows else x


def _fetch(encoded: dict[str, jax.Array], batch: dict[str, Any]) -> Encoded:
    fetched = {name: np.asarray(x)[: len(batch['index'])] for name, x in encoded.items()}
    if 'txt' in fetched and not np.isfinite(fetched['txt']).all():
        raise UserError('the text encoder gives states that are not finite: its weights are damaged; copy them again')
    return fetched | {name: batch[name] for name in ('index', 'len', 'caption', 'bad') if name in batch}


def _write(writer: ShardWriter, batches: Iterator[Encoded], encode_text: CaptionEncoder, bar: _Progress) -> None:
    """Writes records in a thread of its own, so that neither the device nor the workers wait for a disk."""
    work: queue.Queue[Encoded | None] = queue.Queue(_QUEUED_BATCHES)
    failed: list[BaseException] = []

    def write() -> None:
        while (batch := work.get()) is not None:
            if failed:
                continue  # keep taking, so that the sender never blocks
            try:
                _write_batch(writer, batch, encode_text)
                bar.add(len(batch['index']) + len(batch['bad']))
            except BaseException as error:
                failed.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        for batch in batches:
            work.put(batch)
            if failed:
                break
    finally:
        work.put(None)
        thread.join()
    if failed:
        raise failed[0]


def _write_batch(writer: ShardWriter, batch: Encoded, encode_text: CaptionEncoder) -> None:
    for row in range(len(batch['index'])):
        low_T = batch['low'][row] if 'low' in batch else None
        length = int(batch['len'][row])
        caption = batch['caption'][row]
        writer.write(
            encode_record(batch['tok'][row], batch['txt'][row, :length], caption, low_T),
            text=length,
            limit=encode_text.length,
            cut=(caption, lost) if length == encode_text.length and (lost := encode_text.lost(caption)) else None,
        )
    for name, reason in batch['bad']:
        writer.reject(name, reason)
