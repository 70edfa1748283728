"""A folder of parquet files: pictures in a column, or (img2dataset's 'files' layout) lying beside as 00000/KEY.jpg.

Parquet is read a row group at a time. In order that is fast; shuffled, a whole group (100 rows as img2dataset writes
them) is decoded for each example. tools/precompute.py reads in order with --num=0.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muse.config import DataConfig
from muse.data.examples import BadExample, Source, make_example
from muse.errors import UserError, warn

_PICTURES = ('jpg', 'jpeg', 'png', 'webp')  # also what img2dataset calls the column
_CAPTIONS = ('txt', 'text')  # taken where there is no column `data.caption_key`
_NOTES = ('key', 'status', 'error_message')  # kept in memory, as Arrow arrays
_GROUPS = 4  # decoded row groups kept, for the readers of neighbouring rows


@dataclass(frozen=True)
class _Table:
    """All rows of all files, by number; row `r` is in the last group whose start is not above `r`."""

    files: list[Path]
    columns: tuple[str, ...]
    group_starts: np.ndarray  # int64 [G + 1]
    group_files: np.ndarray  # int64 [G]: the file of each group
    notes: dict[str, Any]  # column -> pyarrow array [rows]; those of _NOTES that exist

    def place(self, row: int) -> tuple[Path, int, int]:
        """The row's file, the number of its group in that file, and its number in the group."""
        group = int(np.searchsorted(self.group_starts, row, side='right')) - 1
        file = int(self.group_files[group])
        first = int(np.searchsorted(self.group_files, file))
        return self.files[file], group - first, row - int(self.group_starts[group])

    def name(self, row: int) -> str:
        """The row as messages call it."""
        file, group, inside = self.place(row)
        key = self.notes['key'][row].as_py() if 'key' in self.notes else None
        return f'{file.name}/{key if key is not None else f"group {group} row {inside}"}'


class Parquet(Source):
    """Pictures with captions named by parquet files."""

    def __init__(self, data: DataConfig):
        """Raises UserError: no folder, no or damaged parquet files, columns missing, or no picture at all."""
        self._data, self._table = data, _open_folder(Path(data.path), _stamps(Path(data.path)))
        ok = _downloaded(self._table)
        self._rows, self._failed = np.flatnonzero(ok), np.flatnonzero(~ok)
        if not len(self._rows):
            raise UserError(
                f"'{data.path}': none of {len(ok)} rows was downloaded (column 'status'): download them again"
            )
        self._picture, self._ending = self._find_pictures()
        self._caption = self._find_caption()
        if len(self._failed):
            shown = '; '.join(f'{name}: {why}' for (name, why), _ in zip(self.skipped(), range(5), strict=False))
            more = '; …' if len(self._failed) > 5 else ''
            warn(f'{data.path}: {len(self._failed)} of {len(ok)} rows were not downloaded, skipped: {shown}{more}')

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, record: int) -> str:
        return self._table.name(int(self._rows[record]))

    def skipped(self) -> Iterator[tuple[str, str]]:
        notes = self._table.notes
        for row in self._failed:
            why = notes['error_message'][row].as_py() if 'error_message' in notes else None
            line = ' '.join(str(why or notes['status'][row]).split())
            yield self._table.name(int(row)), f'not downloaded ({line[:200]})'

    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        row = int(self._rows[record])
        file, group, at = self._table.place(row)
        columns = tuple(column for column in (self._picture, self._caption) if column)
        values = {name: column[at].as_py() for name, column in _read_group(file, group, columns).items()}
        if self._picture:
            picture = values[self._picture]
            picture = picture.get('bytes') if isinstance(picture, dict) else picture
            if not isinstance(picture, bytes) or not picture:
                raise BadExample(self._table.name(row), f"its column '{self._picture}' holds no file's bytes")
        else:
            picture = self._beside(row, self._ending)
        caption = values.get(self._caption)
        return make_example(picture, '' if caption is None else str(caption), self._table.name(row), self._data, rng)

    def _beside(self, row: int, ending: str) -> Path:
        return self._table.place(row)[0].with_suffix('') / f'{self._table.notes["key"][row]}.{ending}'

    def _find_pictures(self) -> tuple[str, str]:
        """(column of pictures, '') or ('', ending of the files that lie beside)."""
        table, folder = self._table, self._data.path
        for column in (self._data.image_key, *_PICTURES):
            if column in table.columns:
                return column, ''
        for row in self._rows[:100] if 'key' in table.notes else ():
            for ending in _PICTURES:
                if os.path.isfile(self._beside(row, ending)):
                    return '', ending
        tars = "; they lie in .tar files: set data.kind to 'webdataset'" if any(Path(folder).glob('*.tar')) else ''
        raise UserError(
            f"'{folder}' has no pictures, neither in a column '{self._data.image_key}' or {', '.join(_PICTURES)} "
            f'(there are {", ".join(table.columns)}) nor beside as {table.files[0].stem}/KEY.jpg'
            f'{tars or ": set data.image_key"}'
        )

    def _find_caption(self) -> str:
        if not self._data.caption_key:
            return ''
        for column in (self._data.caption_key, *_CAPTIONS):
            if column in self._table.columns:
                return column
        raise UserError(
            f"'{self._data.path}' has no column '{self._data.caption_key}', only {', '.join(self._table.columns)}: set "
            'data.caption_key (empty: pictures without captions)'
        )


def _downloaded(table: _Table) -> np.ndarray:
    """bool [rows]: what img2dataset's column 'status' says; all of them where there is none."""
    if 'status' not in table.notes:
        return np.ones(table.group_starts[-1], bool)
    import pyarrow.compute

    equal = pyarrow.compute.equal(table.notes['status'], 'success')  # pyright: ignore[reportAttributeAccessIssue]
    return equal.fill_null(False).to_numpy(zero_copy_only=False)


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, bytes, time of change) of every parquet file, in the order of names."""
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}' is not a folder: set data.path to a folder of .parquet files")
    files = sorted(file for file in folder.iterdir() if file.suffix == '.parquet')
    if not files:
        raise UserError(f"'{folder}' holds no .parquet files: set data.path to a folder of .parquet files")
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=2)  # a run opens its source more than once
def _open_folder(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("kind 'parquet' needs pyarrow, which is not installed: pip install pyarrow") from None
    files = [folder / name for name, _, _ in stamps]
    columns, rows, group_files, notes = (), [], [], []
    for number, path in enumerate(files):
        try:
            with pq.ParquetFile(path) as file:
                found = tuple(file.schema_arrow.names)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                notes.append(file.read(columns=[name for name in _NOTES if name in found]))
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"'{path}' is truncated or no parquet file ({reason}): download it again") from None
        columns = columns or found
        if set(found) != set(columns):
            raise UserError(
                f"'{path}' has the columns {', '.join(found)}, '{files[0]}' {', '.join(columns)}: keep files of one "
                'kind in a folder'
            )
        rows += groups
        group_files += [number] * len(groups)
    table = pa.concat_tables(notes, promote_options='permissive')
    return _Table(
        files,
        columns,
        np.cumsum([0, *rows], dtype=np.int64),
        np.array(group_files, np.int64),
        {name: table[name].combine_chunks() for name in table.column_names},
    )


@functools.lru_cache(maxsize=_GROUPS)
def _read_group(file: Path, group: int, columns: tuple[str, ...]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not columns:
        return {}
    try:
        with pq.ParquetFile(file) as opened:
            table = opened.read_row_group(group, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise BadExample(f'{file.name}/group {group}', (str(error).splitlines() or [type(error).__name__])[0]) from None
    return {name: table[name] for name in table.column_names}
