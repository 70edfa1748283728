"""Small pictures whose colour says which they are, in the layouts that img2dataset writes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def colour(i: int) -> tuple[int, int, int]:
    """A colour of its own for each of 1000 pictures."""
    return (i % 10 * 25, i // 10 % 10 * 25, i // 100 * 25)


def picture(i: int, ending: str = 'png', size: tuple[int, int] = (20, 16)) -> bytes:
    out = io.BytesIO()
    options = {'lossless': True} if ending == 'webp' else {}
    Image.new('RGB', size, colour(i)).save(out, {'jpg': 'jpeg'}.get(ending, ending), **options)
    return out.getvalue()


def members(i: int, ending: str = 'png') -> dict[str, bytes]:
    """What img2dataset writes for one example."""
    key, caption = f'{i:09d}', f'picture {i}, “yes”'
    meta = json.dumps({'caption': caption, 'key': key, 'status': 'success', 'width': 20}, indent=4)
    return {f'{key}.{ending}': picture(i, ending), f'{key}.txt': caption.encode(), f'{key}.json': meta.encode()}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w') as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(folder: Path, tars: int = 3, each: int = 4) -> None:
    """Examples 0…tars·each-1, PNG, lossless WebP and PNG again by turns."""
    folder.mkdir(exist_ok=True)
    for tar in range(tars):
        files: dict[str, bytes] = {}
        for i in range(tar * each, (tar + 1) * each):
            files |= members(i, 'webp' if i % 3 == 1 else 'png')
        write_tar(folder / f'{tar:05d}.tar', files)
