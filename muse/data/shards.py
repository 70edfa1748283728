"""Writes pre-tokenised records (`muse.data.precomputed`) so that a run may be broken off at any moment.

Every file appears under its name only when it is whole. In this order: meta.json and <split>.split.json (what is going
to be made), each shard's notes (counts and rejects) and then the shard, in the end the rejects of all shards and the
finished <split>.split.json. Whatever is missing of these is made by the next run; what is there is never made again.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from muse.data.precomputed import SPLIT_ENDING, Meta, Split, read_meta, read_splits, shard_file
from muse.errors import UserError
from muse.text.tokenizer import beginning

_CUT_NAMED = 3  # captions that were cut, of a split


def begin_split(folder: Path, split: str, meta: Meta, plan: dict[str, Any], shards: int) -> Split:
    """Claims a split of a folder; returns it as it is, perhaps finished by an earlier run.

    Args:
        folder: made when missing; may hold other splits made with the same nets.
        split: its name, the beginning of its files' names.
        meta: the nets that make the records.
        plan: all settings that decide the records, as JSON has them.
        shards: number of files.

    Raises:
        UserError: the folder cannot be written or holds records of other nets, or the split was begun otherwise.
    """
    plan = json.loads(json.dumps(plan))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / 'meta.json').exists():
            _put_json(folder / 'meta.json', dataclasses.asdict(meta))
        _check_meta(folder, read_meta(folder), meta)
        wanted = Split(plan=plan, shards=shards)
        if split not in (known := read_splits(folder)):
            if any(folder.glob(f'{glob.escape(split)}-*-of-*.array_record')):
                raise UserError(f"{folder} holds files of '{split}' that are not described: choose another folder")
            _put_json(folder / f'{split}{SPLIT_ENDING}', dataclasses.asdict(wanted))
            return wanted
    except OSError as error:
        raise _cannot_write(folder, error) from None
    found = known[split]
    before, now = ({**s.plan, 'shards': s.shards} for s in (found, wanted))
    if differ := [key for key in now if before.get(key) != now[key]]:
        key = differ[0]
        raise UserError(
            f"{folder}: the split '{split}' was begun with {key} {before.get(key)!r}, now it is {now[key]!r}: give the "
            f'same settings to go on, choose another folder, or delete its files {split}-* and {split}{SPLIT_ENDING}'
        )
    return found


def _check_meta(folder: Path, found: Meta, wanted: Meta) -> None:
    for field in dataclasses.fields(Meta):
        before, now = getattr(found, field.name), getattr(wanted, field.name)
        if before != now:
            what = field.name.removesuffix('_hash').replace('_', ' ')
            shown = [str(value)[:12] for value in (before, now)] if 'hash' in field.name else [before, now]
            raise UserError(
                f'{folder} holds (perhaps unfinished) records made with {what} {shown[0]}, now it is {shown[1]}: '
                'choose another folder'
            )


class ShardWriter:
    """Writes one shard; used with `with`. It and its notes appear when all is well, and nothing otherwise."""

    def __init__(self, folder: Path, split: str, number: int, shards: int):
        self._file = shard_file(folder, split, number, shards)
        # A name of its own, so that two runs by mistake do not write into one file.
        self._partial = self._file.with_name(f'{self._file.name}.{socket.gethostname()}.{os.getpid()}.partial')
        self._notes: dict[str, Any] = {'records': 0, 'without_text': 0, 'full_text': 0, 'cut': [], 'rejects': []}

    def __enter__(self) -> ShardWriter:
        from array_record.python.array_record_module import ArrayRecordWriter

        # group_size 1: records are read one by one in random order.
        self._writer: Any = ArrayRecordWriter(str(self._partial), 'group_size:1')
        return self

    def write(self, record: bytes, *, text: int, limit: int, cut: tuple[str, str] | None = None) -> None:
        """Adds one record from `encode_record`, whose text has `text` of at most `limit` tokens.

        `cut` is the caption and what of it did not fit, where it had more.
        """
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise _cannot_write(self._file, error) from None
        self._notes['records'] += 1
        self._notes['without_text'] += text == 0
        self._notes['full_text'] += text == limit
        if cut and len(self._notes['cut']) < _CUT_NAMED:
            self._notes['cut'].append([beginning(part) for part in cut])

    def reject(self, name: str, reason: str) -> None:
        """Notes an example that gives no record."""
        self._notes['rejects'].append((name, reason))

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._writer.close()
            if kind is None:
                self._publish()
        except (OSError, RuntimeError) as error:
            if kind is None:
                raise _cannot_write(self._file, error) from None
        finally:
            self._partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        reader: Any = ArrayRecordReader(str(self._partial))
        found, wanted = reader.num_records(), self._notes['records']
        reader.close()
        if found != wanted:  # ArrayRecord does not always say that a disk is full
            raise OSError(f'{found} of {wanted} records arrived')
        with open(self._partial, 'rb') as file:
            os.fsync(file.fileno())
        _put_json(_notes_file(self._file), self._notes)
        self._partial.replace(self._file)


def finish_split(folder: Path, split: str, skipped: Iterable[tuple[str, str]]) -> Split:
    """Describes a split all of whose shards are there, and writes <split>.rejects.jsonl.

    Args:
        folder, split: as `begin_split` was told.
        skipped: (name, reason) of what the source left out when it was opened.

    Raises:
        UserError: a shard is missing (hosts that write one split must share the folder), nothing was written because
            all was rejected, or the folder cannot be written.
    """
    begun = read_splits(folder)[split]
    files = [shard_file(folder, split, i, begun.shards) for i in range(begun.shards)]
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f'{folder}: {missing[0]} is missing at the end: all hosts must write to one shared folder')
    try:
        notes = [json.loads(_notes_file(file).read_text(encoding='utf-8')) for file in files]
        sizes = [file.stat().st_size for file in files]
        rejects = Counter((name, reason) for note in notes for name, reason in note['rejects'])
        counts = {key: sum(note[key] for note in notes) for key in ('records', 'without_text', 'full_text')}
        cut = [pair for note in notes for pair in note.get('cut', [])][:_CUT_NAMED]  # not in notes of before
        left_out = _put_rejects(folder / f'{split}.rejects.jsonl', rejects, skipped)
        done = dataclasses.replace(begun, sizes=sizes, rejected=rejects.total(), skipped=left_out, cut=cut, **counts)
        if done.records:
            _put_json(folder / f'{split}{SPLIT_ENDING}', dataclasses.asdict(done))
        else:
            _remove(folder, split, files)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    if not done.records:
        first = '; '.join(f'{name}: {reason}' for name, reason in list(rejects)[:3])
        raise UserError(f'none of {done.rejected} examples could be used ({first}): see {folder}/{split}.rejects.jsonl')
    for leftover in folder.glob(f'{glob.escape(split)}-*.partial'):  # of runs that were killed
        leftover.unlink(missing_ok=True)
    return done


def _put_rejects(file: Path, rejects: Counter[tuple[str, str]], skipped: Iterable[tuple[str, str]]) -> int:
    """Writes one line for each name and reason, if any; returns how many of `skipped` there are."""
    lines = [{'name': name, 'reason': reason, 'times': times} for (name, reason), times in sorted(rejects.items())]
    left_out = [{'name': name, 'reason': reason, 'times': 0} for name, reason in skipped]
    if lines or left_out:
        text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in [*left_out, *lines])
        _put(file, text)
    return len(left_out)


def _remove(folder: Path, split: str, files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
        _notes_file(file).unlink(missing_ok=True)
    (folder / f'{split}{SPLIT_ENDING}').unlink()


def _notes_file(shard: Path) -> Path:
    return shard.with_suffix('.notes.json')


def _put_json(file: Path, values: dict[str, Any]) -> None:
    _put(file, json.dumps(values, indent=1) + '\n')


def _put(file: Path, text: str) -> None:
    partial = file.with_name(f'{file.name}.{socket.gethostname()}.{os.getpid()}.partial')
    try:
        # Halves of a character, which JSON and names of files may hold, are written as JSON escapes them.
        with open(partial, 'w', encoding='utf-8', errors='backslashreplace') as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _cannot_write(where: Path, error: Exception) -> UserError:
    reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [type(error).__name__])[0].split(';')[0]
    return UserError(f'cannot write {where} ({reason}): make room or choose another folder, then run the command again')
