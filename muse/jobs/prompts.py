"""The plan of sample.py: rows of prompts become pictures, in batches that the rows' places alone decide.

A restarted job redraws whole batches, so that every picture is drawn in the same company through the same program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import muse
from muse import settings as knobs
from muse.errors import UserError, warn
from muse.jobs import rows
from muse.jobs.plan import MAX_ID, Item, Names, file_id, slug
from muse.settings import Row, Settings
from muse.text.tokenizer import clean

COLUMNS = ('prompt', 'id', 'seed', 'index', 'negative_prompt', 'guidance_scale', 'temperature', 'size')
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row. What is None is as the settings say; `place` counts the rows of the job from 0."""

    place: int
    line: int  # in its file; 0: it stood on the command line
    prompt: str
    id: str = ''
    seed: int | None = None
    index: int | None = None  # of its first picture's noise, as a manifest has it
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    size: Size | None = None


def read_prompt(place: int, line: int, values: Mapping[str, Any]) -> Prompt:
    """A checked row out of the columns of a file; raises UserError for what cannot be drawn."""
    if 'prompt' not in values:
        raise UserError('it has no prompt: give one')
    kinds = {'seed': rows.integer, 'index': rows.integer, 'guidance_scale': rows.real, 'temperature': rows.real}
    own = {name: kind(name, values[name]) for name, kind in kinds.items() if name in values}
    for name in ('prompt', 'negative_prompt'):
        if name in values:
            own[name] = rows.prompt_text(name, values[name])
    checked = knobs.row(Row(**own))
    return Prompt(
        place=place,
        line=line,
        prompt=checked.prompt,
        id=file_id(values['id']) if 'id' in values else '',
        seed=checked.seed,
        index=checked.index if 'index' in values else None,
        negative_prompt=checked.negative_prompt,
        guidance_scale=checked.guidance_scale,
        temperature=checked.temperature,
        size=knobs.size(rows.size(values['size'])) if 'size' in values else None,
    )


class Drawing:
    """The plan: `Item.task` is the `Row` to draw; all items of a unit share the settings."""

    def __init__(
        self, found: Sequence[Prompt], *, num_images: int, model: Mapping[str, Any], batch_size: int, unit: int
    ):
        """An empty plan over rows that were checked; `add` fills it.

        Args:
            found: the rows.
            num_images: pictures a row.
            model: what is written of the release beside the pictures.
            batch_size: pictures a batch on an accelerator; 1 on a CPU.
            unit: pictures that are skipped or drawn together; rounded up to whole batches.
        """
        self._rows = {row.place: row for row in found}
        self._num_images, self._model = num_images, model
        self._batch_size, self._unit = batch_size, unit
        self._groups: list[tuple[Settings, list[int]]] = []  # places of the rows that share a size
        self._units: list[tuple[int, int]] = []  # group, first picture within it

    def add(self, settings: Settings, places: list[int]) -> None:
        """Adds the rows of one size."""
        self._groups.append((settings, places))
        pictures = len(places) * self._num_images
        batch = min(self._batch_size, pictures)
        step = math.ceil(self._unit / batch) * batch
        self._units += [(len(self._groups) - 1, start) for start in range(0, pictures, step)]

    def __len__(self) -> int:
        return len(self._units)

    @property
    def pictures(self) -> int:
        """How many in all."""
        return sum(len(places) for _, places in self._groups) * self._num_images

    def batch_size(self, unit: int) -> int:
        """Rows a batch, the same for every batch of the size."""
        _, places = self._groups[self._units[unit][0]]
        return min(self._batch_size, len(places) * self._num_images)

    def settings(self, unit: int) -> Settings:
        """What the unit's pictures share."""
        return self._groups[self._units[unit][0]][0]

    def items(self, unit: int) -> list[Item]:
        """The pictures of a unit, in the order of drawing."""
        group, start = self._units[unit]
        settings, places = self._groups[group]
        batch = self.batch_size(unit)
        stop = min(start + math.ceil(self._unit / batch) * batch, len(places) * self._num_images)
        pairs = (divmod(number, self._num_images) for number in range(start, stop))
        return [self._item(self._rows[places[row]], image, settings) for row, image in pairs]

    def stems(self, row: Prompt) -> list[str]:
        """The names of a row's files: its id, or its place and its prompt."""
        if row.id:
            return [f'{row.id}_{image}' for image in range(self._num_images)] if self._num_images > 1 else [row.id]
        first = row.place * self._num_images
        return [f'{first + image:04d}_{slug(row.prompt)}' for image in range(self._num_images)]

    def _item(self, row: Prompt, image: int, settings: Settings) -> Item:
        # A seed or an index of its own makes a row's pictures independent of its place.
        place = row.place * self._num_images if row.seed is None else 0
        index = (place if row.index is None else row.index) + image
        own = {name: getattr(row, name) for name in ('seed', 'negative_prompt', 'guidance_scale', 'temperature')}
        own = {name: value for name, value in own.items() if value is not None}
        stem = self.stems(row)[image]
        about = {
            'prompt': row.prompt,
            # Of this picture, not of its row: a manifest's lines are rows of their own.
            **({'id': stem} if row.id else {}),
            'index': index,
            **self._model,
            **dataclasses.asdict(settings),
            **own,
            'muse_version': muse.__version__,
        }
        return Item(stem, about, Row(prompt=row.prompt, index=index, **own))


def make_plan(
    given: Sequence[Prompt],
    settings_of: Callable[[Size | None], Settings],
    refuse: Callable[[Prompt, UserError], None],
    *,
    num_images: int,
    model: Mapping[str, Any],
    batch_size: int,
    unit: int,
) -> Drawing:
    """Groups rows by size, in the order in which sizes first appear, and gives files their names.

    Args:
        given: the rows of the job.
        settings_of: size (None: the run's) → settings; its `UserError` refuses a row of such a size.
        refuse: hears of rows that cannot be drawn after all.
        num_images, model, batch_size, unit: as for `Drawing`.
    """
    plan = Drawing(given, num_images=num_images, model=model, batch_size=batch_size, unit=unit)
    names, groups, made = Names(), {}, {}
    for row in given:
        try:
            if row.size not in made:
                made[row.size] = settings_of(row.size)
            knobs.row(Row(prompt=row.prompt, index=(row.index or 0) + num_images - 1))
            names.take(_checked_stems(plan, row), row.place)
            groups.setdefault(made[row.size].size, []).append(row.place)
        except UserError as error:
            refuse(row, error)
    by_size = {settings.size: settings for settings in made.values()}
    for size, places in groups.items():
        plan.add(by_size[size], places)
    if blank := sum(not clean(row.prompt) for row in given):
        warn(f'empty prompts: {blank} of {len(given)}; drawn without text')
    return plan


def _checked_stems(plan: Drawing, row: Prompt) -> list[str]:
    """The names of a row's files. Each of them is an id in the manifest, so that it may be as long as one."""
    stems = plan.stems(row)
    if row.id and (longer := len(stems[-1]) - MAX_ID) > 0:
        raise UserError(
            f'its id has {len(row.id)} characters, and its pictures are called …{stems[-1][-8:]}: give up to '
            f'{len(row.id) - longer}'
        )
    return stems
