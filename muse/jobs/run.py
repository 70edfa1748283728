"""Draws a plan into a store: what is there is skipped, the rest drawn unit by unit, in as many processes as there are.

A job that is killed at any moment and started again ends with the same files, byte for byte, as one that was not.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from muse.errors import UserError
from muse.jobs.plan import Item, Plan, all_items, share
from muse.jobs.rows import Reject, warn_of_rejects
from muse.jobs.stores import ABOUT, PICTURE, Files, Folder, Place, Shards, Store, open_folder

if TYPE_CHECKING:
    from muse.pipeline import Muse

MANIFEST, REJECTS = 'manifest.jsonl', 'rejects.jsonl'
_WORKERS, _AHEAD = 2, 16  # threads that compress pictures, and how many pictures may wait for it

Draw = Callable[[int, list[Item]], Iterable[Any]]  # unit, its pictures → one result for each
Pack = Callable[[Item, Any], Files]  # a result → the picture's files


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every job is asked for."""

    out: str
    rows_file: str | None = None  # where rows come from, for messages
    form: str = 'folder'  # or 'webdataset'
    shard_size: int = 1000  # pictures a shard; those of sample.py are rounded up to whole batches
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run has done."""

    drawn: int  # pictures of this process
    kept: int  # those of them that were there already
    complete: bool  # whether those of all processes are there


@dataclass(frozen=True)
class Report:
    """What came of a job."""

    outcome: Outcome
    pictures: int  # of all processes
    rejects: int

    def line(self, out: str) -> str:
        """What is said in the end."""
        kept, done = self.outcome.kept, self.outcome.kept + self.outcome.drawn
        folder = f'{out.rstrip("/")}/' + (f', {kept} of them there already' if kept else '')
        if self.outcome.complete:
            return f'{self.pictures} picture{"s" * (self.pictures > 1)} in {folder}'
        return f'{done} of {self.pictures} pictures in {folder}; those of the other processes are still to come'


def open_store(out: str, form: str, endings: Sequence[str], process: int = 0, count: int = 1) -> Store:
    """The output folder, tried and swept; `form` is 'folder' or 'webdataset'."""
    place = Place(open_folder(out), process, count)
    place.sweep()
    return Shards(place, endings) if form == 'webdataset' else Folder(place, endings)


def run(
    plan: Plan,
    store: Store,
    draw: Draw,
    pack: Pack,
    *,
    begin: Callable[[], None] = lambda: None,
    process: int = 0,
    count: int = 1,
    overwrite: bool = False,
) -> Outcome:
    """Draws this process's share of a plan, and writes the manifest once all shares are there.

    Args:
        plan: the job.
        store: where to.
        draw: draws a whole unit, also when only a part of it is missing: in batches, no picture then changes.
        pack: turns a result into files; runs in threads.
        begin: called before the first picture, once it is sure that nothing of another job is in the way.
        process, count: which of how many processes this is.
        overwrite: draw all of it again.

    Raises:
        UserError: the disk is full, or another job's files are in the way (before anything is drawn).
    """
    others = _lines_of_others(plan, store)
    todo, drawn, kept, total = [], 0, 0, 0
    for unit in share(len(plan), process, count):
        items = plan.items(unit)
        missing = len(items) if overwrite else len(store.missing(unit, items))
        kept, total = kept + len(items) - missing, total + len(items)
        todo += [unit] if missing else []
    begin()
    with ThreadPoolExecutor(_WORKERS) as pool, _bar(total, kept) as bar:
        for unit in todo:
            items = plan.items(unit)
            wanted = items if overwrite else store.missing(unit, items)
            made = _packed(pool, pack, items, draw(unit, items))
            for _ in store.write(unit, made, wanted):
                drawn += 1
                bar.update()
    complete = count == 1 or _is_whole(plan, store, overwrite)
    if complete:
        if overwrite:
            store.remove_beyond(len(plan))
        write_manifest(plan, store, [line for path, line in others if path.exists()])
    return Outcome(drawn, kept, complete)


def _is_whole(plan: Plan, store: Store, overwrite: bool) -> bool:
    """Whether the pictures of all processes are there."""
    try:
        return not any(store.missing(unit, plan.items(unit)) for unit in range(len(plan)))
    except UserError:
        if overwrite:
            return False  # another process has still to overwrite what an earlier job has left
        raise


def _bar(total: int, kept: int) -> tqdm:
    """Pictures a second and the time left; nothing where stderr is no terminal."""
    return tqdm(total=total, initial=kept, unit='picture', smoothing=0.1, disable=None)


def _packed(
    pool: ThreadPoolExecutor, pack: Pack, items: list[Item], made: Iterable[Any]
) -> Iterator[tuple[Item, Files]]:
    """Results in their order, compressed while the next ones are drawn."""
    waiting: deque[tuple[Item, Future[Files]]] = deque()
    for item, result in zip(items, made, strict=True):
        waiting.append((item, pool.submit(pack, item, result)))
        while waiting and (len(waiting) > _AHEAD or waiting[0][1].done()):
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()


def _lines_of_others(plan: Plan, store: Store) -> list[tuple[Path, bytes]]:
    """Lines of the manifest that is there about pictures of other jobs, each with the file that holds its picture."""
    path = store.place.folder / MANIFEST
    if not path.exists():
        return []
    own = {_key(store.names(unit, item)) for unit, item in all_items(plan)}
    own_shards = {shard for shard, _ in own if shard}
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            key = _key(json.loads(line))
        except (ValueError, AttributeError, KeyError):
            raise UserError(f"'{path}' line {number} is no line of a manifest: move the file away") from None
        if key not in own and key[0] not in own_shards:
            found.append((store.place.folder / (key[0] or key[1]), line))
    return found


def _key(line: dict[str, str]) -> tuple[str, str]:
    """Where a line's picture lies: the tar, if any, and the file."""
    return line.get('shard', ''), line['file']


def write_manifest(plan: Plan, store: Store, others: Sequence[bytes]) -> None:
    """manifest.jsonl: a line a picture, in the order of drawing, with everything needed to draw it again.

    `others`: lines that stay before them.
    """
    with store.place.writing(MANIFEST) as stream:
        stream.writelines(others)
        for unit, item in all_items(plan):
            line = store.names(unit, item) | item.about
            stream.write((json.dumps(line, ensure_ascii=False) + '\n').encode())


def write_rejects(place: Place, rejects: Sequence[Reject]) -> Path:
    """rejects.jsonl: rows that were left out, each with its line and the reason. Where there are none, no such file."""
    if rejects:
        lines = [json.dumps(reject._asdict(), ensure_ascii=False) + '\n' for reject in rejects]
        place.write(REJECTS, ''.join(lines).encode(errors='replace'))
    else:
        place.remove(REJECTS)
    return place.folder / REJECTS


def run_job(
    job: Job,
    plan: Plan,
    store: Store,
    draw: Draw,
    pack: Pack,
    rejects: Sequence[Reject],
    process: int = 0,
    count: int = 1,
) -> Report:
    """`run`, after the rejected rows of the job's file are written and named; one process speaks for all."""

    def begin() -> None:
        if process == 0 and job.rows_file is not None:
            warn_of_rejects(job.rows_file, rejects, write_rejects(store.place, rejects))

    outcome = run(plan, store, draw, pack, begin=begin, process=process, count=count, overwrite=job.overwrite)
    return Report(outcome, plan.pictures, len(rejects))


def refuse_all(job: Job, rejects: Sequence[Reject], process: int) -> NoReturn:
    """Raises the UserError of a file whose rows are all rejected; several reasons are written to the output folder."""
    more = ''
    if len(rejects) > 1 and process == 0:
        more = f" (all {len(rejects)} in '{write_rejects(Place(open_folder(job.out)), rejects)}')"
    first = rejects[0]
    raise UserError(f"'{job.rows_file}' holds no row that can be used: line {first.line}: {first.error}{more}")


def identity(model: Muse) -> dict[str, Any]:
    """What is written of a model beside its pictures: its name, the first digits of each part's hash, and its precision
    where it is not the release's own."""
    release = model.release
    parts = ('base', 'superres', 'tokenizer', 'superres_tokenizer', 'text_encoder')
    hashes = {name: part.hash[:12] for name in parts if (part := getattr(release, name)) is not None}
    rounded = {} if model.cascade.precision is None else {'precision': model.cascade.precision}
    return {'model': release.name, 'weights': hashes, **rounded}


def picture_files(image: Image.Image, about: dict[str, Any], about_json: bytes) -> Files:
    """PNG with what is known of the picture in its text, and the same as JSON."""
    return {PICTURE: png(image, about), ABOUT: about_json}


def png(image: Image.Image, about: dict[str, Any]) -> bytes:
    """A PNG file with texts."""
    text, stream = PngInfo(), io.BytesIO()
    for key, value in about.items():
        text.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    image.save(stream, format='PNG', pnginfo=text)
    return stream.getvalue()
