"""Where finished pictures go: a folder of files, or WebDataset shards. Nothing is ever half-written under its own name.

Files are written beside their place and moved there. What an earlier run of the same job has finished is found again by
the .json of each picture, to the byte; what another job has left in the way is refused, not overwritten.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from muse.errors import UserError, warn
from muse.jobs.plan import Item

Files = dict[str, bytes]  # ending → contents of one picture's files
PICTURE, ABOUT = '.png', '.json'
GIF, TOKENS, STRIP = '.gif', '.npz', '.strip.png'
BESIDE = (GIF, TOKENS, STRIP)  # what a job may write beside a picture


def open_folder(out: str) -> Path:
    """Makes the output folder and tries that files can be written into it."""
    if not out:
        raise UserError('--out is empty: name a folder')
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder '{out}' cannot be written ({error.strerror}): choose another --out") from None
    return folder


class Place:
    """A folder that one of `count` processes writes into."""

    def __init__(self, folder: Path, process: int = 0, count: int = 1):
        self.folder, self._process, self._count = folder, process, count

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file that appears under its name once it is whole, and not at all if anything goes wrong."""
        temporary = self.folder / f'.{name}.muse-{self._process}.tmp'
        try:
            with open(temporary, 'wb') as stream:
                yield stream
            os.replace(temporary, self.folder / name)
        except OSError as error:
            raise UserError(f"'{self.folder / name}' cannot be written ({error.strerror}): free some space") from None
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, name: str, contents: bytes) -> None:
        """A whole file at once."""
        with self.writing(name) as stream:
            stream.write(contents)

    def remove(self, name: str) -> None:
        """A file that need not be there."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"'{self.folder / name}' cannot be removed ({error.strerror})") from None

    def sweep(self) -> None:
        """Removes what killed runs have left half-written; each process those that are its own to remove."""
        for path in self.folder.glob('.*.muse-*.tmp'):
            process = path.name.split('.muse-')[-1].removesuffix('.tmp')
            if process.isdigit() and int(process) % self._count == self._process:
                path.unlink(missing_ok=True)


class Store(Protocol):
    """What a run needs of a kind of output."""

    place: Place

    def missing(self, unit: int, items: Sequence[Item]) -> list[Item]:
        """Those of a unit's pictures that are not there; raises UserError where something else is."""
        ...

    def write(self, unit: int, made: Iterable[tuple[Item, Files]], wanted: Sequence[Item]) -> Iterator[Item]:
        """Writes those of a unit's pictures that are wanted, and says of each when it is there."""
        ...

    def picture(self, unit: int, item: Item) -> bytes:
        """The PNG file of a picture that is there."""
        ...

    def names(self, unit: int, item: Item) -> dict[str, str]:
        """Where a picture lies, for the manifest."""
        ...

    def remove_beyond(self, units: int) -> None:
        """Once a job of so many units is whole: removes what a larger one, which it overwrites, has left behind it."""
        ...


class Folder:
    """Every picture as files of its own; the picture itself is written last, after all that belongs to it."""

    def __init__(self, place: Place, endings: Sequence[str]):
        """`endings`: of the files beside the picture and its .json."""
        self.place, self._endings = place, tuple(endings)

    def missing(self, unit: int, items: Sequence[Item]) -> list[Item]:
        """Pictures of which any file is not there."""
        return [item for item in items if not self._is_there(item)]

    def _is_there(self, item: Item) -> bool:
        about, picture = self._path(item, ABOUT), self._path(item, PICTURE)
        if about.exists():
            check_same(about.read_bytes(), item, str(about))
        elif picture.exists():
            raise UserError(
                f"'{picture}' is there already and not of this job: choose another --out or add --overwrite"
            )
        return all(self._path(item, ending).exists() for ending in (ABOUT, PICTURE, *self._endings))

    def write(self, unit: int, made: Iterable[tuple[Item, Files]], wanted: Sequence[Item]) -> Iterator[Item]:
        """One picture after the other."""
        stems = {item.stem for item in wanted}
        for item, files in made:
            if item.stem in stems:
                self._clear(item)
                for ending in (ABOUT, *self._endings, PICTURE):
                    self.place.write(item.stem + ending, files[ending])
                yield item

    def _clear(self, item: Item) -> None:
        """Takes away the picture, so that a kill amid its files leaves nothing that looks whole; and what else an
        earlier job has put beside another picture of this name."""
        about = self._path(item, ABOUT)
        same = about.exists() and about.read_bytes() == item.about_json
        for ending in (PICTURE, *(() if same else BESIDE)):
            self.place.remove(item.stem + ending)

    def picture(self, unit: int, item: Item) -> bytes:
        """The PNG file."""
        return self._path(item, PICTURE).read_bytes()

    def names(self, unit: int, item: Item) -> dict[str, str]:
        """The picture's file."""
        return {'file': item.stem + PICTURE}

    def remove_beyond(self, units: int) -> None:
        """Nothing: pictures of other names are of other jobs, which share the folder."""

    def _path(self, item: Item, ending: str) -> Path:
        return self.place.folder / (item.stem + ending)


class Shards:
    """A unit is one tar, 00000.tar, … of STEM.png, STEM.json, STEM.txt (the prompt) and what else belongs to each."""

    def __init__(self, place: Place, endings: Sequence[str]):
        self.place, self._endings = place, (PICTURE, ABOUT, '.txt', *endings)

    def missing(self, unit: int, items: Sequence[Item]) -> list[Item]:
        """All of a unit or nothing: a tar is moved to its place when it is whole."""
        path = self._path(unit)
        if not path.exists():
            return list(items)
        try:
            with tarfile.open(path) as tar:
                for item in items:
                    check_same(_member(tar, item.stem + ABOUT), item, f'{path}: {item.stem}{ABOUT}')
                if len(tar.getmembers()) != len(items) * len(self._endings):
                    raise KeyError
        except (tarfile.TarError, KeyError, EOFError):
            raise UserError(f"'{path}' is not of this job: choose another --out or add --overwrite") from None
        return []

    def write(self, unit: int, made: Iterable[tuple[Item, Files]], wanted: Sequence[Item]) -> Iterator[Item]:
        """The whole tar; equal pictures give equal bytes, since no member has a time or an owner."""
        del wanted
        with self.place.writing(self._path(unit).name) as stream, tarfile.open(fileobj=stream, mode='w') as tar:
            for item, files in made:
                files = files | {'.txt': item.about['prompt'].encode()}
                for ending in self._endings:
                    member = tarfile.TarInfo(item.stem + ending)
                    member.size = len(files[ending])
                    tar.addfile(member, io.BytesIO(files[ending]))
                yield item

    def picture(self, unit: int, item: Item) -> bytes:
        """The PNG member."""
        with tarfile.open(self._path(unit)) as tar:
            return _member(tar, item.stem + PICTURE)

    def names(self, unit: int, item: Item) -> dict[str, str]:
        """The tar and the picture's name in it."""
        return {'shard': self._path(unit).name, 'file': item.stem + PICTURE}

    def remove_beyond(self, units: int) -> None:
        """Shards of higher numbers, where they hold pictures of jobs: else they would be read as part of this one."""
        numbered = (path for path in self.place.folder.glob('*.tar') if re.fullmatch(r'\d{5,}', path.stem))
        later = sorted(path for path in numbered if int(path.stem) >= units and path == self._path(int(path.stem)))
        ours = [path for path in later if _is_ours(path)]
        for path in ours:
            self.place.remove(path.name)
        if ours:
            warn(f'removed what is left of a larger job, which this one overwrites: {_some(ours)}')
        if others := sorted(set(later) - set(ours)):
            warn(f'not of a job, though named like a shard of it: {_some(others)} stays, to be read with this job')

    def _path(self, unit: int) -> Path:
        return self.place.folder / f'{unit:05d}.tar'


def _some(paths: Sequence[Path]) -> str:
    return f"'{paths[0]}'" + f' and {len(paths) - 1} more' * (len(paths) > 1)


def _is_ours(path: Path) -> bool:
    """Whether all that a tar holds belongs to pictures of jobs, whose .json names the version that drew them."""
    try:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            stems = [name.removesuffix(ABOUT) for name in names if name.endswith(ABOUT)]
            abouts = [json.loads(_member(tar, stem + ABOUT)) for stem in stems]
    except (OSError, tarfile.TarError, KeyError, EOFError, ValueError):
        return False
    known = {stem + ending for stem in stems for ending in (PICTURE, ABOUT, '.txt', *BESIDE)}
    drawn = all(isinstance(about, dict) and 'muse_version' in about for about in abouts)
    return bool(stems) and drawn and known.issuperset(names)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read()


def check_same(found: bytes, item: Item, where: str) -> None:
    """Raises UserError where a .json is not what this job would write."""
    if found == item.about_json:
        return
    way_out = 'choose another --out, or add --overwrite to draw it again'
    try:
        other = json.loads(found)
    except ValueError:
        other = None
    if not isinstance(other, dict):
        raise UserError(f"'{where}' is there already and not of this job: {way_out}")
    wanted: dict[str, Any] = json.loads(item.about_json)
    changed = [key for key in (*wanted, *other) if other.get(key) != wanted.get(key)]
    name = changed[0] if changed else 'its form'
    was, now = (json.dumps(values.get(name), ensure_ascii=False)[:60] for values in (other, wanted))
    raise UserError(f"'{where}' was drawn otherwise ({name} was {was}, now {now}): {way_out}")
