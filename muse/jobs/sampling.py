"""sample.py without its flags: prompts and settings in, a folder of pictures out."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from muse.config import DecodeConfig
from muse.errors import UserError
from muse.jobs import extras
from muse.jobs.plan import Item, all_items
from muse.jobs.prompts import COLUMNS, Drawing, Prompt, Size, make_plan, read_prompt
from muse.jobs.rows import Reject, Table, read_table
from muse.jobs.run import Job, Report, identity, open_store, picture_files, png, refuse_all, run_job
from muse.jobs.stores import ABOUT, GIF, PICTURE, TOKENS, Files, Store
from muse.pipeline import Drawn, Muse
from muse.settings import Settings, SuperresDecoding, count


@dataclass(frozen=True, kw_only=True)
class SampleJob(Job):
    """What sample.py is asked for."""

    num_images: int = 1
    batch_size: int = 8
    grid: bool = False
    gif: bool = False
    save_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How to draw: what `Muse.settings` takes."""

    decoding: DecodeConfig
    superres: SuperresDecoding
    seed: int
    negative_prompt: str | None
    size: Size | None

    def settings(self, model: Muse, size: Size | None) -> Settings:
        """The settings of pictures of a size; None: of the size that was asked for."""
        return model.settings(
            self.seed,
            negative_prompt=self.negative_prompt,
            size=size or self.size,
            decoding=self.decoding,
            superres=self.superres,
        )


def sample(
    model: Muse, job: SampleJob, knobs: Knobs, given: Table[Prompt], process: int = 0, processes: int = 1
) -> Report:
    """Draws this process's share of a job; see `muse.jobs.run`.

    Raises:
        UserError: a setting out of range, or an output that cannot be written, before anything is drawn; a full disk.
    """
    count('num_images', job.num_images, 1)
    count('batch_size', job.batch_size, 1)
    count('shard_size', job.shard_size, 1)
    shared = knobs.settings(model, None)
    rejects = list(given.rejects)
    plan = _plan(model, job, knobs, shared, given, rejects)
    rejects.sort(key=lambda reject: reject.line)
    if not len(plan):
        refuse_all(job, rejects, process)
    if job.grid:
        extras.check_grid(plan.pictures)
    endings = [GIF] * job.gif + [TOKENS] * job.save_tokens
    store = open_store(job.out, job.form, endings, process, processes)

    def draw(unit: int, items: list[Item]) -> Iterable[Drawn]:
        return model.draw([item.task for item in items], plan.settings(unit), batch_size=plan.batch_size(unit))

    def pack(item: Item, drawn: Drawn) -> Files:
        files = picture_files(drawn.image, item.about, item.about_json)
        files |= {GIF: extras.gif(model.frames(drawn))} if job.gif else {}
        return files | ({TOKENS: extras.tokens(drawn.low, drawn.high)} if job.save_tokens else {})

    report = run_job(job, plan, store, draw, pack, rejects, process, processes)
    if job.grid and report.outcome.complete:
        _write_grid(plan, store, job, {**identity(model), **dataclasses.asdict(shared)})
    return report


def read_prompts(prompts: Sequence[str], file: str | None) -> Table[Prompt]:
    """The prompts of the command line, which must be good, then the rows of a file, of which the bad are left out."""
    own = [read_prompt(place, 0, {'prompt': text}) for place, text in enumerate(prompts)]
    if file is None:
        if not own:
            raise UserError("no prompt was given: add --prompt='a red apple' or --prompts_file=FILE")
        return Table(own, [])
    found = read_table(file, COLUMNS, lambda place, *row: read_prompt(len(own) + place, *row), 'prompt')
    return Table(own + found.rows, found.rejects, found.texts)


def _plan(
    model: Muse, job: SampleJob, knobs: Knobs, shared: Settings, given: Table[Prompt], rejects: list[Reject]
) -> Drawing:
    """The plan of the rows that can be drawn; adds the others to `rejects`."""

    def refuse(row: Prompt, error: UserError) -> None:
        if not row.line:
            raise error
        rejects.append(given.reject(row.line, error))

    def settings_of(size: Size | None) -> Settings:
        return shared if size is None else knobs.settings(model, size)

    # A CPU draws one picture at a time, so that no picture has to wait for others to be skipped.
    batch_size = 1 if model.cascade.on_cpu else job.batch_size
    unit = batch_size if job.form == 'folder' else job.shard_size
    return make_plan(
        given.rows,
        settings_of,
        refuse,
        num_images=job.num_images,
        model=identity(model),
        batch_size=batch_size,
        unit=unit,
    )


def _write_grid(plan: Drawing, store: Store, job: SampleJob, shared: dict[str, Any]) -> None:
    """grid.png of all pictures, read back from where they were written, in the order of drawing."""
    places = list(all_items(plan))
    pictures = (Image.open(io.BytesIO(store.picture(unit, item))) for unit, item in places)
    columns = job.num_images if job.num_images > 1 else max(min(len(places), 4), round(math.sqrt(len(places))))
    captions = [item.about['prompt'] for _, item in places]
    image = extras.sheet(pictures, captions, columns)
    about = Item('grid', {'prompts': list(dict.fromkeys(captions)), **shared}, None)
    store.place.write(f'grid{ABOUT}', about.about_json)
    store.place.write(f'grid{PICTURE}', png(image, about.about))
