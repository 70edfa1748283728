"""Runs the frozen nets over a source once and stores what the base trains on: picture tokens and text states.

Three things go on at once: data workers make pictures, the device encodes, and a thread writes records. A split is
written shard by shard; each depends on the seed and its own number alone, so a broken-off run goes on at the first
missing one.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from muse.config import DataConfig
from muse.data.pipeline import make_loader
from muse.data.precomputed import Meta, Writer, encode_record
from muse.data.sources import open_source
from muse.errors import UserError
from muse.mesh import shard_batch
from muse.release.format import VOCABULARY, load_part
from muse.train.frozen import CaptionEncoder, Net, encode_captions, encode_pictures, place

_QUEUED_BATCHES = 8
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # tok_BT, txt_BSD, len_B, captions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nets:
    """The two frozen nets and the vocabulary of one precomputation."""

    tokenizer: Net
    text_encoder: Net
    encode_text: CaptionEncoder
    mesh: Mesh


def load_nets(tokenizer: str, text_encoder: str, text_length: int, mesh: Mesh) -> Nets:
    """Loads the parts from two release folders onto the mesh. Raises UserError when one is missing or damaged."""
    folder = Path(text_encoder)
    return Nets(
        tokenizer=place(load_part(tokenizer, 'tokenizer'), 'tokenizer', mesh),
        text_encoder=place(load_part(folder, 'text_encoder'), 'text_encoder', mesh),
        encode_text=CaptionEncoder(str(folder / VOCABULARY), text_length),
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
    progress: Callable[[int], None],
) -> int:
    """Writes one split of `folder` and returns how many examples it holds.

    Args:
        data: the source; `data.split` names the split on both sides.
        nets: frozen nets.
        folder: made when missing; may hold other splits made with the same nets.
        num: examples to draw from the endless shuffled source; 0 takes each record of it once, in order.
        shards: files to write; those that are there already are left alone.
        batch_size: pictures at a time; a multiple of the number of devices.
        seed: of the order and of the scenes.
        progress: called with the number of examples after each batch.

    Raises:
        UserError: a count that is no count, a source that does not fit, or a folder made with other nets.
    """
    if data.kind == 'precomputed':
        raise UserError("data.kind is 'precomputed' already: give a config whose data are pictures")
    for name, value, low in (('num', num, 0), ('shards', shards, 1), ('batch_size', batch_size, 1)):
        if value < low:
            raise UserError(f'--{name} is {value}: it must be at least {low}')
    factor = nets.tokenizer.config.factor
    meta = Meta(
        tokenizer_hash=nets.tokenizer.hash,
        text_encoder_hash=nets.text_encoder.hash,
        grid=(data.image_size // factor, data.image_size // factor),
        text_width=nets.text_encoder.config.width,
    )
    total = num or len(open_source(data))
    plan = _plan(total, shards, batch_size)
    files = [folder / f'{data.split}-{i:05d}-of-{len(plan):05d}.array_record' for i in range(len(plan))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    progress(sum(plan[i] for i in range(len(plan)) if i not in missing))
    if not missing:
        return total
    batches = make_loader(
        data,
        batch_size=batch_size,
        seed=seed,
        start_step=missing[0] * _steps(plan[0], batch_size),
        shard_index=0,
        shard_count=1,
        encode_text=nets.encode_text,
        repeat=num > 0,
    )
    for i in range(missing[0], len(plan)):
        share = itertools.islice(batches, _steps(plan[i], batch_size))
        if i in missing:
            with Writer(folder, data.split, meta, shards=len(plan), shard=i) as writer:
                _write(writer, _encode(share, nets, batch_size), plan[i], progress)
        else:
            for _ in share:  # written before: only keep the stream in step
                pass
    return total


def _steps(size: int, batch_size: int) -> int:
    return -(-size // batch_size)


def _plan(total: int, shards: int, batch_size: int) -> list[int]:
    """Sizes of the shards: whole batches each but for the very last; fewer shards where batches do not reach."""
    size = _steps(_steps(total, shards), batch_size) * batch_size
    return [min(size, total - start) for start in range(0, total, size)]


def _encode(batches: Iterator[dict[str, Any]], nets: Nets, batch_size: int) -> Iterator[Encoded]:
    """Encodes batch after batch; the device works on the next one while the last one is fetched."""
    waiting: tuple[jax.Array, jax.Array, dict[str, Any]] | None = None
    for batch in batches:
        rows = len(batch['img'])
        padded = {k: _pad(batch[k], batch_size - rows) for k in ('img', 'ids', 'len')}
        placed = shard_batch(nets.mesh, padded)
        tok_BT = encode_pictures(nets.tokenizer.graphdef, nets.tokenizer.params, placed['img'])
        text = nets.text_encoder
        txt_BSD = encode_captions(text.graphdef, text.params, placed['ids'], placed['len']).astype(jnp.bfloat16)
        if waiting:
            yield _fetch(*waiting)
        waiting = (tok_BT, txt_BSD, batch)
    if waiting:
        yield _fetch(*waiting)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) if rows else x


def _fetch(tok_BT: jax.Array, txt_BSD: jax.Array, batch: dict[str, Any]) -> Encoded:
    rows = len(batch['img'])
    return np.asarray(tok_BT)[:rows], np.asarray(txt_BSD)[:rows], batch['len'], batch['caption']


def _write(writer: Writer, batches: Iterator[Encoded], size: int, progress: Callable[[int], None]) -> None:
    """Writes `size` records in a thread of its own, so that neither the device nor the workers wait for a disk."""
    work: queue.Queue[Encoded | None] = queue.Queue(_QUEUED_BATCHES)
    failed: list[BaseException] = []

    def write() -> None:
        left = size
        while (batch := work.get()) is not None:
            if failed:
                continue  # keep taking, so that the sender never blocks
            try:
                rows = list(zip(*batch, strict=True))[:left]
                for tok_T, txt_SD, length, caption in rows:
                    writer.write(encode_record(tok_T, txt_SD[:length], caption))
                left -= len(rows)
                progress(len(rows))
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
