"""A folder of pictures with captions.jsonl or captions.csv: the index, checked once before training.

Rows that cannot be read and pictures that cannot be decoded are counted, named and skipped here, so that training never
meets one. What was found is kept beside the captions file and used again while no file has changed.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from muse.data.pictures import BadPicture, read_picture
from muse.errors import UserError, warn

_CAPTION_FILES = ('captions.jsonl', 'captions.csv')
_CHECK_SIZE = 64  # small: a JPEG is then decoded at a small scale, yet read to its end


Rows = list[tuple[Path, str]]
Skipped = list[tuple[str, str]]


def index_folder(folder: Path) -> tuple[Rows, Skipped]:
    """All usable (picture, caption) pairs in the order of the captions file, and (name, reason) of the others.

    A run opens its source more than once: while the captions file stays as it is, the pictures are looked at once.

    Raises:
        UserError: no such folder, no or two captions files, a wrong csv header, or nothing usable.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: set data.path to a folder of pictures with captions.jsonl")
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    if not found:
        way_out = 'write one with a line {"file": "1.jpg", "caption": "a cat"} for each picture'
        raise UserError(f"'{folder}' holds neither captions.jsonl nor captions.csv: {way_out}")
    if len(found) > 1:
        raise UserError(f"'{folder}' holds both captions.jsonl and captions.csv: keep one of them there")
    stat = found[0].stat()
    return _index(found[0], (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _index(captions_file: Path, stamp: tuple[int, int]) -> tuple[Rows, Skipped]:
    del stamp  # a part of the cache's key
    folder, rows, skipped = captions_file.parent, [], []
    for number, row in _read_rows(captions_file):
        file, caption = row if row else ('', '')
        reason = _row_problem(folder, file) if row else 'it has no text "file" and "caption"'
        if reason:
            skipped.append((f'line {number}', reason))
        else:
            rows.append((folder / file, caption))
    problems = _check_pictures(captions_file, sorted({path for path, _ in rows}))
    skipped += [(str(path.relative_to(folder)), reason) for path, reason in problems.items() if reason]
    usable = [(path, caption) for path, caption in rows if not problems[path]]
    if skipped:
        shown = '; '.join(f'{name}: {why}' for name, why in skipped[:5]) + ('; …' if len(skipped) > 5 else '')
        warn(f'{captions_file}: {len(skipped)} rows or pictures are unreadable and were skipped: {shown}')
    if not usable:
        raise UserError(f"{captions_file} names no readable picture: each row needs a 'file' there and a 'caption'")
    return usable, skipped


def _read_rows(file: Path) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """(line number, (file, caption)), or None for a row that is not readable."""
    try:
        text = file.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{file} is not UTF-8 (byte {error.start}): save it as UTF-8') from None
    if file.suffix == '.csv':
        reader = csv.DictReader(io.StringIO(text, newline=''))
        if not {'file', 'caption'} <= set(reader.fieldnames or ()):
            raise UserError(f'{file} has the header {reader.fieldnames}: the first line must be file,caption')
        for row in reader:
            yield reader.line_num, _pair(row)
        return
    for number, line in enumerate(text.split('\n'), start=1):
        if line.strip():
            try:
                yield number, _pair(json.loads(line))
            except json.JSONDecodeError:
                yield number, None


def _pair(row: object) -> tuple[str, str] | None:
    if not isinstance(row, dict):
        return None
    file, caption = row.get('file'), row.get('caption')
    return (file, caption) if isinstance(file, str) and isinstance(caption, str) and file else None


def _row_problem(folder: Path, file: str) -> str:
    if os.path.isabs(file) or '..' in Path(file).parts:
        return f"'{file}' is outside the folder"
    return '' if (folder / file).is_file() else f"'{file}' does not exist"


def _check_pictures(captions_file: Path, paths: list[Path]) -> dict[Path, str]:
    """The reason why each picture cannot be used; '' for a good one."""
    kept_file = captions_file.with_name(f'{captions_file.name}.checked.json')
    try:
        kept = json.loads(kept_file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        kept = {}
    stamps = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    names = {path: str(path.relative_to(captions_file.parent)) for path in paths}
    unknown = [path for path in paths if kept.get(names[path], [None])[0] != stamps[path]]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(unknown, pool.map(_picture_problem, unknown), strict=True))
    problems = {path: found[path] if path in found else kept[names[path]][1] for path in paths}
    if unknown:
        _keep(kept_file, {names[path]: [stamps[path], problems[path]] for path in paths})
    return problems


def _picture_problem(path: Path) -> str:
    try:
        read_picture(path, _CHECK_SIZE)
    except BadPicture as error:
        return str(error)
    return ''


def _keep(file: Path, checked: dict[str, list]) -> None:
    """Best effort: data may lie on a read-only disk, and several hosts may write at once."""
    partial = file.with_name(f'{file.name}.{os.getpid()}.partial')
    try:
        partial.write_text(json.dumps(checked), encoding='utf-8')
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
