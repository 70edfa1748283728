"""A folder of pictures, with captions.jsonl or captions.csv or alone: the index, checked once before training.

Rows that cannot be read and pictures that cannot be decoded are counted, named and skipped here, so that training never
meets one. What was found is kept in the folder and used again while no file has changed.
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

from muse.data.pictures import BadPicture, picture_files, read_picture
from muse.errors import UserError, warn

_CAPTION_FILES = ('captions.jsonl', 'captions.csv')
_SHOWN = 80  # letters of a name that is no file's
_CHECK_SIZE = 64  # small: a JPEG is then decoded at a small scale, yet read to its end


Rows = list[tuple[Path, str]]
Skipped = list[tuple[str, str]]


def index_folder(folder: Path, captioned: bool = True) -> tuple[Rows, Skipped]:
    """All usable (picture, caption) pairs in the order of the captions file, and (name, reason) of the others.

    A run opens its source more than once: while the captions file stays as it is, the pictures are looked at once.

    Args:
        folder: the folder.
        captioned: False takes every picture below the folder, without captions, in the order of their names.

    Raises:
        UserError: no such folder, no or two captions files, a wrong csv header, or nothing usable.
    """
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}' is not a folder: set data.path to a folder of pictures with captions.jsonl")
    if not captioned:
        return _index_pictures(folder, tuple(picture_files(folder)))
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    if not found:
        way_out = 'write one with a line {"file": "1.jpg", "caption": "a cat"} for each picture (or set '
        way_out += "data.caption_key='' to take every picture without a caption, for a tokenizer)"
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
    skipped += _unreadable(folder, problems)
    _warn(captions_file, 'rows or pictures', skipped)
    usable = [(path, caption) for path, caption in rows if not problems[path]]
    if not usable:
        raise UserError(f"{captions_file} names no readable picture: each row needs a 'file' there and a 'caption'")
    return usable, skipped


@functools.lru_cache(maxsize=2)
def _index_pictures(folder: Path, paths: tuple[Path, ...]) -> tuple[Rows, Skipped]:
    problems = _check_pictures(folder / 'pictures', list(paths))
    skipped = _unreadable(folder, problems)
    _warn(folder, 'pictures', skipped)
    if len(skipped) == len(paths):
        raise UserError(f"'{folder}' holds no readable picture: give a folder of whole picture files")
    return [(path, '') for path in paths if not problems[path]], skipped


def _unreadable(folder: Path, problems: dict[Path, str]) -> Skipped:
    return [(str(path.relative_to(folder)), reason) for path, reason in problems.items() if reason]


def _warn(where: Path, what: str, skipped: Skipped) -> None:
    if skipped:
        shown = '; '.join(f'{name}: {why}' for name, why in skipped[:5]) + ('; …' if len(skipped) > 5 else '')
        warn(f'{where}: {len(skipped)} {what} are unreadable and were skipped: {shown}')


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
    # Not Path's own, which raises for a name that is longer than a disk can hold.
    return '' if os.path.isfile(folder / file) else f"'{file[:_SHOWN]}{'…' * (len(file) > _SHOWN)}' does not exist"


def _check_pictures(listing: Path, paths: list[Path]) -> dict[Path, str]:
    """The reason why each picture cannot be used; '' for a good one. It is kept beside `listing`, under its name."""
    kept_file = listing.with_name(f'{listing.name}.checked.json')
    try:
        kept = json.loads(kept_file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        kept = {}
    stamps = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    names = {path: str(path.relative_to(listing.parent)) for path in paths}
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
