"""What a job is made of: items, one a finished picture, in units that are drawn, skipped and written together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from muse.errors import UserError

RESERVED = ('grid',)
MAX_ID = 100
_ID = re.compile(rf'[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_ID - 1}}}')


@dataclass(frozen=True)
class Item:
    """One picture of a job."""

    stem: str  # of its files
    about: dict[str, Any]  # what is written beside it: everything needed to draw it again
    task: Any  # what the job's own `draw` reads

    @property
    def about_json(self) -> bytes:
        """What the picture's .json file holds."""
        return (json.dumps(self.about, indent=2, ensure_ascii=False) + '\n').encode()


class Plan(Protocol):
    """Units are numbered from 0 and depend on the job alone, never on what is drawn already."""

    def __len__(self) -> int:
        """How many units."""
        ...

    def items(self, unit: int) -> list[Item]:
        """The pictures of a unit."""
        ...

    @property
    def pictures(self) -> int:
        """How many in all."""
        ...


def all_items(plan: Plan) -> Iterator[tuple[int, Item]]:
    """Every picture of a job with its unit, in the order of drawing."""
    for unit in range(len(plan)):
        for item in plan.items(unit):
            yield unit, item


def share(units: int, process: int, count: int) -> range:
    """The units that one of `count` processes draws: a strided share."""
    return range(process, units, count)


def slug(text: str) -> str:
    """At most 60 letters and digits of a text, for a file's name."""
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:60].strip('-') or 'picture'


def file_id(value: Any) -> str:
    """A row's own name for its files; raises UserError where it could not be one."""
    value = str(value) if type(value) is int else value
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise UserError(
            f'id is {repr(value)[:120]}; give up to {MAX_ID} letters, digits, - and _, beginning with a letter or digit'
        )
    return value


class Names:
    """The file names given so far; those that differ in case only are equal on some file systems."""

    def __init__(self):
        self._taken: dict[str, int] = {}

    def take(self, stems: Iterable[str], row: int) -> None:
        """Gives these names to a row; raises UserError where one is taken."""
        stems = [stem.lower() for stem in stems]
        for stem in stems:
            if stem in RESERVED:
                raise UserError(f"the name '{stem}' is kept for another file: give another id")
            if stem in self._taken:
                raise UserError(f"its files would be called '{stem}', as those of row {self._taken[stem] + 1} are")
        self._taken |= dict.fromkeys(stems, row)
