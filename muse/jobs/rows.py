"""Jobs as people write them: prompts in a text file, or rows of a CSV or JSON Lines file.

A row that cannot be used is named with its line and its reason, and the others go on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TextIO, TypeVar

from muse.errors import UserError, nearest, warn
from muse.settings import text
from muse.text.tokenizer import MAX_PROMPT_BYTES

MAX_FILE_BYTES = 64 * 2**20
SHOWN = 5  # rejected rows that are named one by one
KEPT = 1000  # characters of a row that are written with its rejection

RowT = TypeVar('RowT')


class Line(NamedTuple):
    """One row of a file: its values by column, or why there are none."""

    number: int  # of its line in the file, from 1; of the first one where a row has several
    text: str  # as it stands there
    values: Mapping[str, Any]
    error: str = ''


class Reject(NamedTuple):
    """A row that is left out: its first line, the reason, and its beginning as it stands in the file."""

    line: int
    error: str
    row: str


@dataclass(frozen=True)
class Table(Generic[RowT]):
    """What a file holds."""

    rows: list[RowT]
    rejects: list[Reject]
    texts: Mapping[int, str] = field(default_factory=dict)  # line → beginning of the row that was read there

    def reject(self, line: int, error: UserError) -> Reject:
        """A row that was read but cannot be used, in the form of those that could not be read."""
        return Reject(line, str(error), self.texts[line])


def read_table(
    file: str, columns: Sequence[str], read_row: Callable[[int, int, Mapping[str, Any]], RowT], text_column: str = ''
) -> Table[RowT]:
    """Reads every row of a file; columns that are not known are named in a warning.

    Args:
        file: .csv with a header, .jsonl with one object a line, or else a text with one `text_column` a line. Blank
            lines are skipped.
        columns: that a row may have.
        read_row: (place among the rows, from 0; line; values that are given) → row. A `UserError` of it rejects the
            row; rows that were rejected keep their place.
        text_column: what a line of a text is; '' where a text is no table of this kind.

    Raises:
        UserError: the file cannot be read, is over 64 MB, or holds no row.
    """
    rows, rejects, texts, unknown, place = [], [], {}, set(), -1
    for place, line in enumerate(_lines(file, text_column)):  # noqa: B007
        unknown.update(set(line.values) - set(columns))
        try:
            if line.error:
                raise UserError(line.error)
            given = {name: line.values[name] for name in columns if line.values.get(name) not in (None, '')}
            rows.append(read_row(place, line.number, given))
            texts[line.number] = line.text[:KEPT]
        except UserError as error:
            rejects.append(Reject(line.number, str(error), line.text[:KEPT]))
    if place < 0:
        raise UserError(f"'{file}' holds no {text_column or 'row'}: write one a line")
    if unknown and rows:
        names = ', '.join(repr(name[:40]) for name in sorted(unknown)[:20])
        near = nearest(min(unknown), columns) if len(unknown) == 1 else f'; known are {", ".join(columns)}'
        warn(f"'{file}': column{'s' * (len(unknown) > 1)} {names} {'are' if len(unknown) > 1 else 'is'} not used{near}")
    return Table(rows, rejects, texts)


def warn_of_rejects(file: str, rejects: Sequence[Reject], written: Path) -> None:
    """Names the first rejected rows, and where all of them are."""
    for reject in rejects[:SHOWN]:
        warn(f"'{file}' line {reject.line} is left out: {reject.error}")
    if rejects:
        more = f'{len(rejects) - SHOWN} more; ' if len(rejects) > SHOWN else ''
        warn(f"{len(rejects)} row{'s' * (len(rejects) > 1)} left out ({more}all in '{written}')")


def _lines(file: str, text_column: str) -> Iterator[Line]:
    path = Path(file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"'{file}' is over {MAX_FILE_BYTES // 2**20} MB: split it")
        # Bytes that are no UTF-8 become surrogates, which are refused row by row.
        with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as stream:
            match path.suffix.lower():
                case '.csv':
                    yield from _csv(stream, file)
                case '.jsonl' | '.ndjson':
                    yield from _jsonl(stream)
                case '.txt' | '.text' | '' if text_column:
                    yield from _text(stream, text_column)
                case suffix:
                    kinds = f'{".txt, " * bool(text_column)}.csv or .jsonl'
                    raise UserError(f"'{file}' ends in '{suffix}': give a file that ends in {kinds}")
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): check the path") from None


def _text(stream: TextIO, column: str) -> Iterator[Line]:
    for number, line in _numbered(stream):
        yield Line(number, line, {column: line})


def _jsonl(stream: TextIO) -> Iterator[Line]:
    for number, line in _numbered(stream):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, 'msg', 'nested too deep or a number too long')
            yield Line(number, line, {}, f'it is no JSON ({why}): write one object a line')
            continue
        if isinstance(values, dict):
            yield Line(number, line, values)
        else:
            yield Line(number, line, {}, f'it is a JSON {type(values).__name__}: write an object, {{"prompt": "…"}}')


def _numbered(stream: TextIO) -> Iterator[tuple[int, str]]:
    """Lines with something on them. Only line feeds end a line: other breaks of Unicode may stand in a prompt."""
    for number, line in enumerate(stream, 1):
        if line := line.strip():
            yield number, line


def _csv(stream: TextIO, file: str) -> Iterator[Line]:
    csv.field_size_limit(MAX_FILE_BYTES)  # else a field over 128 kB breaks the file instead of its row
    lines: list[str] = []  # of one row
    reader = csv.reader(_keeping(stream, lines), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        lines.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"'{file}' is no CSV (line {number}: {error})") from None
            yield Line(number, _joined(lines), {}, f'the CSV from here to line {reader.line_num} is broken ({error})')
            continue
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = [field.strip() for field in fields]
            _check_header(header, file)
        elif len(fields) != len(header):
            error = f'it has {len(fields)} fields, the header {len(header)}: quote texts that hold a comma'
            yield Line(number, _joined(lines), {}, error)
        else:
            values = {name: field.strip() for name, field in zip(header, fields, strict=True)}
            yield Line(number, _joined(lines), values)


def _keeping(stream: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The lines of a stream, each of which is added to `lines` as well."""
    for line in stream:
        lines.append(line)
        yield line


def _joined(lines: Sequence[str]) -> str:
    return ''.join(lines).rstrip('\r\n')


def _check_header(header: Sequence[str], file: str) -> None:
    if len(set(header)) < len(header):
        raise UserError(f"'{file}' names a column twice in its first line: give each one name")


def prompt_text(name: str, value: Any) -> str:
    """A checked prompt."""
    checked = text(name, value)
    if '\0' in checked:
        raise UserError(f'{name} holds a NUL character: save the file as UTF-8')
    if (size := len(checked.encode())) > MAX_PROMPT_BYTES:
        raise UserError(f'a {name} of {size} bytes is over the limit of {MAX_PROMPT_BYTES}: shorten it')
    return checked


def integer(name: str, value: Any) -> Any:
    """A whole number out of a text; what is no text is left to be checked."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        raise UserError(f'{name} is {value[:40]!r}; give a whole number') from None


def real(name: str, value: Any) -> Any:
    """A number out of a text; what is no text is left to be checked."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise UserError(f'{name} is {value[:40]!r}; give a number') from None


def whole_numbers(name: str, value: Any, count: int, form: str, mark: str = ',') -> tuple[int, ...]:
    """`count` whole numbers out of a text like '1,2' or a list; `form` shows how they are written."""
    parts = value.split(mark) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != count:
        raise UserError(f'{name} is {repr(value)[:40]}; write it as {form}')
    numbers = tuple(integer(name, part) for part in parts)
    if any(type(number) is not int for number in numbers):
        raise UserError(f'{name} is {repr(value)[:40]}; write it as {form}')
    return numbers


def size(value: Any) -> tuple[int, int]:
    """Width and height out of '256x384' or [256, 384]."""
    written = value.lower().replace('×', 'x') if isinstance(value, str) else value
    width, height = whole_numbers('size', written, 2, '256x256 (width x height)', 'x')
    return width, height
