"""Makes the emoji dataset, its sprite cache, a source bundle, or the sample in the package.

    python tools/make_emoji.py --out=DIR                     npm brings the art; dataset and 256 px sprite cache in DIR
    python tools/make_emoji.py --out=DIR --tarballs=SOURCE   SOURCE: a folder of npm tarballs, or a bundle
    python tools/make_emoji.py --bundle=FILE.tar.xz --tarballs=SOURCE    all that the above needs, in one small file
    python tools/make_emoji.py --sample=DIR --tarballs=SOURCE            the sample art of muse/assets/sample_art

A dataset that exists is not drawn again: run the same command with another --cache_size to add a cache.
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import app, flags

from muse.data.art import Art, load_art
from muse.data.raster import default_workers, draw, parallel_map
from muse.data.splits import SPLITS, assign_splits
from muse.errors import UserError
from muse.jobs.command_line import guarded, parse_only_flags

_OUT = flags.DEFINE_string('out', '', 'folder for the dataset')
_TARBALLS = flags.DEFINE_string('tarballs', '', 'folder of npm tarballs, or a bundle; without it npm brings them')
_WORKERS = flags.DEFINE_integer('workers', 0, 'processes; 0 is one for each core')
_SHARE_ALIKE = flags.DEFINE_bool('include_share_alike', False, 'also the CC-BY-SA-4.0 sets')
_CACHE_SIZE = flags.DEFINE_integer('cache_size', 256, 'side of the cached sprites in pixels; 0 makes no cache')
_BUNDLE = flags.DEFINE_string('bundle', '', 'write a source bundle to this file instead')
_SAMPLE = flags.DEFINE_string('sample', '', 'write the sample art into this folder instead')

_SAMPLE_SIDE = 128
_SAMPLE_STYLES = ('noto', 'twemoji', 'fluent flat', 'fluent 3d')
_SAMPLE_LABELS = (  # simple, well-known subjects
    'red apple', 'green apple', 'banana', 'grapes', 'strawberry', 'watermelon', 'tangerine', 'lemon', 'pear',
    'cherries', 'carrot', 'tomato', 'pizza', 'hamburger', 'doughnut', 'birthday cake', 'dog face', 'cat face', 'lion',
    'panda', 'frog', 'fish', 'butterfly', 'owl', 'turtle', 'penguin', 'red heart', 'blue heart', 'star', 'sun',
    'crescent moon', 'fire', 'snowman', 'house', 'evergreen tree', 'cactus', 'tulip', 'mushroom', 'automobile', 'bus',
    'bicycle', 'rocket', 'sailboat', 'umbrella', 'key', 'light bulb', 'soccer ball', 'grinning face',
)  # fmt: skip


def main(_: list[str]) -> None:
    if _WORKERS.value < 0 or _CACHE_SIZE.value < 0:
        raise UserError('--workers and --cache_size must not be negative')
    chosen = [name for name in ('out', 'bundle', 'sample') if flags.FLAGS[name].value]
    if len(chosen) != 1:
        raise UserError('say one of --out=DIR, --bundle=FILE or --sample=DIR')
    source = Path(_TARBALLS.value) if _TARBALLS.value else None
    if source is not None and not source.exists():
        raise UserError(f'{source} does not exist: check --tarballs')
    {'out': _build, 'bundle': _bundle, 'sample': _sample}[chosen[0]](source, _WORKERS.value or default_workers())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write to {folder} ({error.strerror}): choose another folder') from None
    if not os.access(folder, os.W_OK):
        raise UserError(f'cannot write to {folder}: choose another folder')


def _load(source: Path | None, beside: Path) -> list[Art]:
    return load_art(source, include_share_alike=_SHARE_ALIKE.value, cache=beside / 'npm')


def _build(source: Path | None, workers: int) -> None:
    import tensorflow_datasets as tfds

    from muse.data import emoji, sprites

    out = Path(_OUT.value)
    _make_folder(out)
    tfds.disable_progress_bar()
    config = emoji.WITH_SHARE_ALIKE if _SHARE_ALIKE.value else emoji.PERMISSIVE
    builder = emoji.EmojiArt(data_dir=out, config=config, tarballs=source, workers=workers)
    builder.download_and_prepare(file_format='array_record')
    folder = Path(builder.data_dir)
    for split in builder.info.splits:
        records = sprites.open_records(folder, split)
        print(f'{split}: {len(records)} pictures')
        if _CACHE_SIZE.value and not sprites.cache_index(folder, split, _CACHE_SIZE.value).exists():
            _cache(folder, split, records, workers)
    print(f'dataset in {folder}')


def _cache(folder: Path, split: str, records, workers: int) -> None:
    from muse.data import sprites

    words = [sprites.record_words(records[i]) for i in range(len(records))]
    files = (records[i]['image'] for i in range(len(records)))
    row = functools.partial(sprites.cache_row, side=_CACHE_SIZE.value)
    rows = parallel_map(row, files, total=len(records), workers=workers, what=f'caching {split}')
    sprites.write_cache(folder, split, _CACHE_SIZE.value, rows, words)


def _bundle(source: Path | None, workers: int) -> None:
    del workers
    from muse.data.art import write_bundle

    file = Path(_BUNDLE.value)
    _make_folder(file.absolute().parent)
    art = _load(source, file.absolute().parent)
    write_bundle(art, file)
    print(f'{file}: {len(art)} pictures, {file.stat().st_size / 2**20:.1f} MiB')


def _sample(source: Path | None, workers: int) -> None:
    folder = Path(_SAMPLE.value)
    _make_folder(folder)
    first: dict[tuple[str, str], Art] = {}
    for piece in _load(source, folder.absolute().parent):
        if piece.label in _SAMPLE_LABELS and piece.style in _SAMPLE_STYLES:
            first.setdefault((piece.label, piece.style), piece)
    missing = set(_SAMPLE_LABELS) - {label for label, _ in first}
    if missing:
        raise UserError(f'no picture is called {", ".join(sorted(missing))}: correct the list in this tool')
    # Larger shares than in the full set, for a few pictures must be enough to measure on.
    splits = assign_splits(first, label_share=0.06, pair_share=0.12)
    chosen = [first[pair] for pair in sorted(first)]
    pictures = parallel_map(_sample_webp, (a.data for a in chosen), total=len(chosen), workers=workers, what='drawing')
    lines = []
    for piece, data in zip(chosen, pictures, strict=True):
        file = f'{piece.style}-{piece.label}.webp'.replace(' ', '_')
        (folder / file).write_bytes(data)
        row = {'file': file, 'split': splits[piece.label, piece.style], 'key': piece.key, 'label': piece.label}
        row |= {'style': piece.style, 'tags': piece.tags[:4], 'group': piece.group, 'licence': piece.licence}
        lines.append(json.dumps(row) + '\n')
    (folder / 'index.jsonl').write_text(''.join(lines), encoding='utf-8')
    (folder / 'ATTRIBUTION.md').write_text(_attribution(chosen), encoding='utf-8')
    counts = Counter(splits[piece.label, piece.style] for piece in chosen)
    print(f'{folder}: {len(chosen)} pictures ({", ".join(f"{split} {counts[split]}" for split in SPLITS)})')


def _sample_webp(data: bytes) -> bytes:
    from PIL import Image

    # Drawn large and then reduced: resvg's own edges are harder.
    picture = draw(data, 4 * _SAMPLE_SIDE)
    premultiplied = picture.convert('RGBa').resize((_SAMPLE_SIDE, _SAMPLE_SIDE), Image.Resampling.HAMMING)
    file = io.BytesIO()
    premultiplied.convert('RGBA').save(file, 'WEBP', quality=90, alpha_quality=100, method=6)
    return file.getvalue()


def _attribution(art: list[Art]) -> str:
    package = {style: '@iconify/json 2.2.535' for style in _SAMPLE_STYLES}
    package['fluent 3d'] = '@lobehub/fluent-emoji-3d 1.1.0'
    rows = sorted({(a.style, a.set_name, a.author, a.licence, package[a.style]) for a in art})
    counts = Counter(a.style for a in art)
    table = '\n'.join(f'| {" | ".join(row)} | {counts[row[0]]} |' for row in rows)
    return (
        '# Attribution of the sample art\n\n'
        'The pictures in this folder were reduced to 128 px from these sets; nothing else was changed.\n\n'
        '| style | set | author | licence | npm package | pictures |\n|---|---|---|---|---|---|\n'
        f'{table}\n\n'
        'Labels and tags: emojibase-data 17.0.0 (MIT, Miles Johnson).\n'
        'The texts of the licences: Apache-2.0, MIT and CC-BY-4.0, by those names, at their publishers.\n'
    )


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
