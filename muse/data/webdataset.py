"""A folder of WebDataset tars as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json side by side in 00000.tar, ….

Where every member lies is looked up once and kept beside the tars (or only in memory, where the folder cannot be
written); an example then costs one read at a known place, so records come in any order. Nothing is unpacked.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from muse.config import DataConfig
from muse.data.examples import BadExample, Source, make_example
from muse.errors import UserError, warn

INDEX_FILE = '.muse_index.npz'
_VERSION = 1
_PICTURES = ('jpg', 'jpeg', 'png', 'webp')
# One example: its tar, and (offset, bytes) of each member; bytes -1: there is none.
_ROW = np.dtype(
    [('tar', 'i4'), *((f'{name}{part}', 'i8') for name in ('img', 'txt', 'json') for part in ('', '_size'))]
)


@dataclass(frozen=True)
class _Index:
    """All examples of some tars. Plain arrays: millions of examples take 60 bytes each."""

    rows: np.ndarray  # _ROW [N]
    keys: np.ndarray  # bytes [N]
    skipped: list[tuple[str, str]]  # (name, reason)


class WebDataset(Source):
    """Pictures with captions out of tars."""

    def __init__(self, data: DataConfig):
        """Raises UserError: no such folder, no tars, a damaged one, no pictures in them, or none with a caption."""
        self._tars, index = _open_folder(Path(data.path), _stamps(Path(data.path)))
        captioned = (index.rows['txt_size'] >= 0) | (index.rows['json_size'] >= 0)
        self._bare = [] if not data.caption_key else np.flatnonzero(~captioned)
        usable = np.arange(len(index.rows)) if not data.caption_key else np.flatnonzero(captioned)
        self._rows, self._keys, self._index, self._data = index.rows[usable], index.keys[usable], index, data
        _check(Path(data.path), index, len(usable))
        self._check_json()
        if count := len(index.skipped) + len(self._bare):
            shown = '; '.join(f'{name}: {reason}' for (name, reason), _ in zip(self.skipped(), range(5), strict=False))
            warn(f'{data.path}: {count} members are unusable and were skipped: {shown}{"; …" if count > 5 else ""}')

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, record: int) -> str:
        return f'{self._tars[self._rows[record]["tar"]].name}/{self._keys[record].decode()}'

    def skipped(self) -> Iterator[tuple[str, str]]:
        yield from self._index.skipped
        for row in self._bare:
            tar = self._tars[self._index.rows[row]['tar']]
            yield f'{tar.name}/{self._index.keys[row].decode()}', 'it has no .txt or .json beside it'

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        row, name = self._rows[record], self.name(record)
        return make_example(self._read(row, 'img', name), self._caption(row, name), name, self._data, rng)

    def _read(self, row: np.void, member: str, name: str) -> bytes:
        size = int(row[f'{member}_size'])
        try:
            with open(self._tars[row['tar']], 'rb') as file:
                read = os.pread(file.fileno(), size, int(row[member]))
        except OSError as error:
            raise BadExample(name, f'its tar cannot be read ({error.strerror})') from None
        if len(read) != size:
            raise BadExample(name, 'its tar has become shorter')
        return read

    def _caption(self, row: np.void, name: str) -> str:
        """KEY.txt, else the text under `data.caption_key` in KEY.json."""
        if not self._data.caption_key:
            return ''
        if row['txt_size'] >= 0:
            return self._read(row, 'txt', name).decode(errors='replace')
        caption = self._fields(row, name).get(self._data.caption_key)
        if not isinstance(caption, str):
            raise BadExample(name, f"its .json has no text '{self._data.caption_key}'")
        return caption

    def _fields(self, row: np.void, name: str) -> dict[str, Any]:
        try:
            fields = json.loads(self._read(row, 'json', name))
        except ValueError:
            raise BadExample(name, 'its .json is not readable') from None
        return fields if isinstance(fields, dict) else {}

    def _check_json(self) -> None:
        """Says at the start, by the first example, that captions in .json have another name."""
        if self._data.caption_key and len(self) and self._rows[0]['txt_size'] < 0:
            fields = self._fields(self._rows[0], self._keys[0].decode())
            if self._data.caption_key not in fields:
                raise UserError(
                    f"{self._data.path}: no .txt members, and the .json ones have no '{self._data.caption_key}', only "
                    f'{", ".join(sorted(fields)) or "nothing"}: set data.caption_key (empty: pictures without captions)'
                )


def _check(folder: Path, index: _Index, usable: int) -> None:
    if not len(index.rows):
        raise UserError(
            f"the tars in '{folder}' hold no pictures ({', '.join(_PICTURES)}): set data.path to those that do"
        )
    if not usable:
        raise UserError(
            f"none of the {len(index.rows)} pictures in '{folder}' has a KEY.txt or KEY.json beside it: write the tars "
            "with captions, or read pictures alone with data.caption_key=''"
        )


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, bytes, time of change) of every tar, in the order of names."""
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}' is not a folder: set data.path to a folder of .tar files")
    tars = sorted(file for file in folder.iterdir() if file.suffix == '.tar')
    if not tars:
        packed = [file.name for file in folder.iterdir() if file.name.endswith(('.tar.gz', '.tgz', '.tar.zst'))]
        way = (
            f'unpack {packed[0]} and the others to .tar first' if packed else 'set data.path to a folder of .tar files'
        )
        raise UserError(f"'{folder}' holds no .tar files: {way}")
    return tuple((tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars)


@functools.lru_cache(maxsize=2)  # a run opens its source more than once
def _open_folder(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[list[Path], _Index]:
    tars = [folder / name for name, _, _ in stamps]
    kept = _load(folder / INDEX_FILE)
    fresh = [tar for tar, stamp in zip(tars, stamps, strict=True) if stamp not in kept]
    scanned = {tar.name: _scan(tar) for tar in tqdm(fresh, desc='indexing tars', delay=5, leave=False)}
    parts = [scanned[stamp[0]] if stamp[0] in scanned else kept[stamp] for stamp in stamps]
    if fresh:
        _save(folder / INDEX_FILE, stamps, parts)
    return tars, _join(parts)


def _join(parts: Sequence[_Index]) -> _Index:
    rows = np.concatenate([part.rows for part in parts])
    rows['tar'] = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    return _Index(rows, np.concatenate([part.keys for part in parts]), [s for part in parts for s in part.skipped])


def _scan(tar: Path) -> _Index:
    """The examples of one tar. Raises UserError for a file that is no tar or ends too early."""
    found: dict[str, np.ndarray] = {}
    skipped: list[tuple[str, str]] = []
    try:
        with tarfile.open(tar, 'r:') as archive:
            while (member := archive.next()) is not None:
                _add(member, found, skipped, tar)
                cast(Any, archive).members.clear()  # all of them would stay otherwise
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"'{tar}' is truncated or no tar ({error}): download it again or take it away") from None
    with open(tar, 'rb') as file:
        # tarfile takes garbage after the first member for the end; a whole tar says so with a block of zeros.
        if os.pread(file.fileno(), 512, end) != bytes(512):
            raise UserError(f"'{tar}' is truncated or damaged at byte {end}: download it again or take it away")
    rows = {key: row for key, row in found.items() if row['img_size'] >= 0}
    skipped += [(f'{tar.name}/{key}', 'it has no picture') for key in found.keys() - rows.keys()]
    keys = np.array([key.encode() for key in rows], dtype=np.bytes_)
    return _Index(np.array(list(rows.values()), _ROW), keys, sorted(skipped))


def _add(member: tarfile.TarInfo, found: dict[str, np.ndarray], skipped: list[tuple[str, str]], tar: Path) -> None:
    """Notes where a member lies in the row of its key: its name up to the first dot of its last part."""
    if member.isdir():
        return
    folder, _, base = member.name.rpartition('/')
    stem, _, kind = base.partition('.')
    kind = 'img' if kind.lower() in _PICTURES else kind.lower()
    if kind not in ('img', 'txt', 'json'):
        return
    row = found.setdefault(f'{folder}/{stem}' if folder else stem, np.array((0, *(0, -1) * 3), _ROW))
    if not member.isreg():
        skipped.append((f'{tar.name}/{member.name}', 'it is no ordinary file'))
    elif kind == 'img' and member.size == 0:
        skipped.append((f'{tar.name}/{member.name}', 'it is empty'))
    elif row[f'{kind}_size'] >= 0:
        skipped.append(
            (f'{tar.name}/{member.name}', f'a second {"picture" if kind == "img" else kind} of the same key')
        )
    else:
        row[kind], row[f'{kind}_size'] = member.offset_data, member.size


def _load(file: Path) -> dict[tuple[str, int, int], _Index]:
    """What was kept, by the stamps of the tars; nothing where it cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            note = json.loads(str(kept['note']))
            if note['version'] != _VERSION:
                return {}
            rows, keys, ends = kept['rows'], kept['keys'], np.cumsum(note['counts'])
        starts = ends - note['counts']
        return {
            tuple(stamp): _Index(rows[start:end], keys[start:end], [(name, reason) for name, reason in skipped])
            for stamp, start, end, skipped in zip(note['stamps'], starts, ends, note['skipped'], strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}


def _save(file: Path, stamps: Sequence[tuple[str, int, int]], parts: Sequence[_Index]) -> None:
    """Best effort: data may lie on a read-only disk, and several hosts may write at once."""
    index = _join(parts)
    note = {
        'version': _VERSION,
        'stamps': stamps,
        'counts': [len(part.rows) for part in parts],
        'skipped': [part.skipped for part in parts],
    }
    partial = file.with_name(f'{file.name}.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as out:
            np.savez(out, rows=index.rows, keys=index.keys, note=np.array(json.dumps(note)))
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
