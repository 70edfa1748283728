"""edit.py without its flags: pictures and edits in, a folder of edited pictures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muse.data.pictures import open_picture
from muse.errors import UserError
from muse.jobs import extras
from muse.jobs.edits import COLUMNS, Edit, Editing, EditKnobs, before, hole, make_item, read_edit
from muse.jobs.plan import Item, Names
from muse.jobs.rows import Reject, Table, read_table
from muse.jobs.run import Job, Report, open_store, picture_files, png, refuse_all, run_job
from muse.jobs.stores import STRIP, Files
from muse.pipeline import Muse
from muse.settings import count


@dataclass(frozen=True, kw_only=True)
class EditJob(Job):
    """What edit.py is asked for."""

    strip: bool = False
    frames: Sequence[int] = ()  # iterations of a mask-free edit that the strip shows


def read_edits(values: dict[str, Any], file: str | None) -> Table[Edit]:
    """The one edit of the command line, which must be good, or the rows of a file, of which the bad are left out."""
    if file is None:
        return Table([read_edit(0, 0, values, Path())], [])
    if values:
        raise UserError(f'--{next(iter(values))} is given beside --jobs: write it into the rows, or leave it out')
    folder = Path(file).parent
    return read_table(file, COLUMNS, lambda place, line, row: read_edit(place, line, row, folder))


def edit_all(
    model: Muse, job: EditJob, knobs: EditKnobs, given: Table[Edit], process: int = 0, processes: int = 1
) -> Report:
    """Does this process's share of a job; see `muse.jobs.run`.

    Raises:
        UserError: a setting out of range, or an output that cannot be written, before anything is painted; a full disk.
    """
    count('shard_size', job.shard_size, 1)
    rejects = list(given.rejects)
    items = _checked(model, knobs, given, rejects, job)
    if not items:
        refuse_all(job, rejects, process)
    plan = Editing(items, 1 if job.form == 'folder' else job.shard_size)
    store = open_store(job.out, job.form, [STRIP] * job.strip, process, processes)

    def draw(unit: int, items: list[Item]) -> Iterator[list[Image.Image]]:
        del unit
        return (_edited(model, item.task, knobs, job) for item in items)

    def pack(item: Item, pictures: list[Image.Image]) -> Files:
        files = picture_files(pictures[-1], item.about, item.about_json)
        return files | ({STRIP: png(extras.strip(pictures), {})} if job.strip else {})

    return run_job(job, plan, store, draw, pack, rejects, process, processes)


def _checked(model: Muse, knobs: EditKnobs, given: Table[Edit], rejects: list[Reject], job: EditJob) -> list[Item]:
    """The rows that can be done; adds the others to `rejects`."""
    items, names = [], Names()
    for edit in given.rows:
        try:
            if edit.kind == 'free':
                iterations = knobs.free_config(edit).iterations
                for frame in job.frames:
                    count('a frame', frame, 0, iterations)
            items.append(make_item(model, edit, knobs, names))
        except UserError as error:
            if not edit.line:
                raise
            rejects.append(given.reject(edit.line, error))
    rejects.sort(key=lambda reject: reject.line)
    return items


def _edited(model: Muse, edit: Edit, knobs: EditKnobs, job: EditJob) -> list[Image.Image]:
    """The strip's pictures; the last is the result."""
    img_HWC = open_picture(edit.image)
    arguments, prompt = knobs.drawn(edit), edit.prompt
    match edit.kind:
        case 'mask' | 'box':
            hole_HW = hole(edit, (img_HWC.shape[1], img_HWC.shape[0]))
            after = [model.inpaint(img_HWC, hole_HW, prompt, context=knobs.context, **arguments)]
        case 'outpaint':
            after = [model.outpaint(img_HWC, prompt, **edit.how, **arguments)]
        case 'variation':
            after = [model.variation(img_HWC, prompt, strength=edit.how, **arguments)]
        case 'upscale':
            after = [model.upscale(img_HWC, prompt, **knobs.few(edit))]
        case 'free':
            free = knobs.free_config(edit)
            after = model.edit_frames(img_HWC, prompt, [*job.frames, free.iterations], free=free, **knobs.few(edit))
    return [*before(edit, np.asarray(img_HWC)), *after]
