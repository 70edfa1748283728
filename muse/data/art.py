"""The emoji art of the demo: where it comes from and what each picture is called.

Pictures come as SVG (Iconify's sets) or WebP (Fluent 3D) inside npm tarballs; names, tags and groups come from
emojibase. An icon's name or codepoint leads to one lower-case label, shared by all styles, so that the same subject in
many styles carries the same words. Flags and skin-tone variants are left out: the first are a memory test, the second
would be half of all pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse.errors import UserError, warn

_PACKAGES = {  # npm name@version -> tarball, sha256
    '@iconify/json@2.2.535': (
        'iconify-json-2.2.535.tgz',
        '1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91',
    ),
    '@lobehub/fluent-emoji-3d@1.1.0': (
        'lobehub-fluent-emoji-3d-1.1.0.tgz',
        'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58',
    ),
    'emojibase-data@17.0.0': (
        'emojibase-data-17.0.0.tgz',
        'd01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a',
    ),
}
_ICONIFY, _FLUENT_3D, _EMOJIBASE = (name for name, _ in _PACKAGES.values())

# Iconify set -> the style's name in captions.
PERMISSIVE_STYLES = {
    'noto': 'noto',
    'noto-v1': 'noto v1',
    'fluent-emoji-flat': 'fluent flat',
    'fluent-emoji': 'fluent',
    'twemoji': 'twemoji',
    'emojione': 'emojione',
    'streamline-emojis': 'streamline',
}
SHARE_ALIKE_STYLES = {'openmoji': 'openmoji', 'emojione-v1': 'emojione v1'}
FLUENT_3D_STYLE = 'fluent 3d'
_FLUENT_3D_SET = 'fluent-emoji-3d'

_GROUPS = {  # emojibase's numbers; 2 (components) and 9 (flags) are left out
    0: 'smileys and emotion',
    1: 'people and body',
    3: 'animals and nature',
    4: 'food and drink',
    5: 'travel and places',
    6: 'activities',
    7: 'objects',
    8: 'symbols',
}
_OTHER_GROUP = 'other'
_LEFT_OUT_GROUPS = (2, 9)
_SKIN_TONE = re.compile(r'skin-tone|-(light|medium-light|medium|medium-dark|dark)$')
_VARIANT = re.compile(r'-(\d{1,2})$')  # streamline draws some subjects several times: bird-1, bird-2


@dataclass(frozen=True)
class Art:
    """One picture before it is drawn."""

    key: str  # 'set/icon name': unique
    label: str  # lower case: 'red apple'
    style: str  # as captions say it: 'fluent flat'
    tags: tuple[str, ...]
    group: str
    codepoint: str  # '1F34E', '' when the icon has none
    licence: str  # SPDX
    set_name: str
    author: str
    data: bytes  # SVG text or a WebP file


def load_art(source: Path | None, *, include_share_alike: bool = False, cache: Path | None = None) -> list[Art]:
    """Reads all pictures, sorted by key.

    Args:
        source: a folder holding the npm tarballs, a bundle made by `write_bundle`, or None to bring the tarballs with
            `npm pack` into `cache`.
        include_share_alike: also the CC-BY-SA sets (openmoji, emojione v1).
        cache: folder for tarballs brought by npm; needed when `source` is None.

    Raises:
        UserError: no such source, a tarball missing or altered, or npm missing.
    """
    if source is not None and source.is_file():
        art = read_bundle(source)
        if include_share_alike and not any(a.style in SHARE_ALIKE_STYLES.values() for a in art):
            raise UserError(f'{source} holds no share-alike pictures: make it with --include_share_alike')
        kept = art if include_share_alike else [a for a in art if a.style not in SHARE_ALIKE_STYLES.values()]
        return kept
    if source is None:
        if cache is None:
            raise UserError('no tarballs were given and no cache folder to bring them to: pass --tarballs or --out')
        _npm_pack(cache)
        source = cache
    _check_tarballs(source)
    return sorted(_read_tarballs(source, include_share_alike), key=lambda art: art.key)


def _npm_pack(cache: Path) -> None:
    npm = shutil.which('npm')
    if npm is None:
        raise UserError('npm is not installed: install it (Debian: apt install npm) or pass --tarballs=FOLDER')
    cache.mkdir(parents=True, exist_ok=True)
    for package, (tarball, _) in _PACKAGES.items():
        if (cache / tarball).exists():
            continue
        print(f'npm pack {package}', flush=True)
        done = subprocess.run([npm, 'pack', '--silent', package], cwd=cache, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or 'no message').splitlines()[-1]
            raise UserError(f'npm pack {package} failed ({last}): check the network, or pass --tarballs=FOLDER')


def _check_tarballs(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f'{folder} is neither a folder of npm tarballs nor a bundle: check --tarballs')
    for package, (tarball, expected) in _PACKAGES.items():
        file = folder / tarball
        if not file.is_file():
            raise UserError(f'{file} does not exist: run `npm pack {package}` in that folder')
        with file.open('rb') as stream:
            found = hashlib.file_digest(stream, 'sha256').hexdigest()
        if found != expected:
            raise UserError(f'{file} has sha256 {found[:12]}…, expected {expected[:12]}…: delete it and get it again')


def _read_tarballs(folder: Path, include_share_alike: bool) -> Iterator[Art]:
    styles = PERMISSIVE_STYLES | (SHARE_ALIKE_STYLES if include_share_alike else {})
    wanted = {f'package/json/{name}.json' for name in {*styles, *PERMISSIVE_STYLES, *SHARE_ALIKE_STYLES}}
    raw = _members(folder / _ICONIFY, lambda name: name in wanted or name == 'package/collections.json')
    sets = {Path(name).stem: json.loads(data) for name, data in raw.items()}
    emojibase = json.loads(_members(folder / _EMOJIBASE, lambda n: n == 'package/en/data.json').popitem()[1])
    names = _Names(emojibase, sets)
    for set_name, style in styles.items():
        yield from _iconify_art(set_name, style, sets[set_name], sets['collections'][set_name], names)
    for path, data in _members(folder / _FLUENT_3D, lambda name: name.endswith('.webp')).items():
        entry = names.by_codepoint(Path(path).stem)
        if entry is not None:
            meta = {'author': {'name': 'Microsoft Corporation'}, 'license': {'spdx': 'MIT'}}
            yield _art(_FLUENT_3D_SET, Path(path).stem, FLUENT_3D_STYLE, entry, meta, data)


def _members(tarball: Path, wanted: Any) -> dict[str, bytes]:
    found = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            if member.isfile() and wanted(member.name):
                stream = tar.extractfile(member)
                assert stream is not None  # a regular file always has one
                found[member.name] = stream.read()
    return found


def _art(set_name: str, icon: str, style: str, entry: dict[str, Any], meta: dict[str, Any], data: bytes) -> Art:
    return Art(
        key=f'{set_name}/{icon}',
        label=entry['label'],
        style=style,
        tags=tuple(entry['tags']),
        group=entry['group'],
        codepoint=entry['codepoint'],
        licence=meta['license']['spdx'],
        set_name=set_name,
        author=meta['author']['name'],
        data=data,
    )


def _iconify_art(
    set_name: str, style: str, icons: dict[str, Any], meta: dict[str, Any], names: _Names
) -> Iterator[Art]:
    flags = set(icons.get('categories', {}).get('Flags', ()))
    for icon, spec in icons['icons'].items():
        # 'hidden' icons were withdrawn by the set's author.
        if spec.get('hidden') or icon in flags:
            continue
        entry = names.by_icon(icon)
        if entry is not None:
            yield _art(set_name, icon, style, entry, meta, _svg(spec, icons).encode())


def _svg(spec: dict[str, Any], icons: dict[str, Any]) -> str:
    width, height = (spec.get(side, icons.get(side, 16)) for side in ('width', 'height'))
    # A square view, the drawing in its middle: some icons are a little wider or taller than their set.
    side = max(width, height)
    left, top = spec.get('left', 0) - (side - width) / 2, spec.get('top', 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}">{spec["body"]}</svg>'
    )


class _Names:
    """Finds the label, tags and group of an icon name or of a codepoint."""

    def __init__(self, emojibase: list[dict[str, Any]], sets: dict[str, Any]):
        self._entries = {_plain_codepoint(e['hexcode']): e for e in emojibase}
        self._tones = {_plain_codepoint(s['hexcode']) for e in emojibase for s in e.get('skins', ())}
        names: dict[str, str] = {}
        for icons in (sets[name] for name in ('noto', 'twemoji', 'fluent-emoji-flat', 'openmoji')):
            for codepoint, icon in icons['chars'].items():
                names.setdefault(icon, _plain_codepoint(codepoint))
        names |= {_slug(e['label']): codepoint for codepoint, e in self._entries.items()}
        for icons in sets.values():
            for alias, target in icons.get('aliases', {}).items() if 'icons' in icons else ():
                if 'hFlip' in target:  # a mirrored picture is another subject: pointing left, pointing right
                    continue
                known = names.get(alias) or names.get(target['parent'])
                if known:
                    names.setdefault(alias, known)
                    names.setdefault(target['parent'], known)
        self._codepoint_by_icon = names

    def by_codepoint(self, codepoint: str) -> dict[str, Any] | None:
        """None for flags, skin tones, components and unknown codepoints."""
        codepoint = _plain_codepoint(codepoint)
        entry = self._entries.get(codepoint)
        if entry is None or entry.get('group') in (*_LEFT_OUT_GROUPS, None):
            return None
        return {
            'label': clean_label(entry['label']),
            'tags': [tag.lower() for tag in entry.get('tags', ())],
            'group': _GROUPS[entry['group']],
            'codepoint': codepoint,
        }

    def by_icon(self, icon: str) -> dict[str, Any] | None:
        """None for what is left out; an icon unknown to emojibase is called by its own name."""
        name = icon if icon in self._codepoint_by_icon else _VARIANT.sub('', icon)
        codepoint = self._codepoint_by_icon.get(name, '')
        if codepoint in self._entries:
            return self.by_codepoint(codepoint)
        if codepoint in self._tones or _SKIN_TONE.search(icon) or 'flag' in icon.split('-') or len(name) < 3:
            return None
        return {'label': clean_label(name.replace('-', ' ')), 'tags': [], 'group': _OTHER_GROUP, 'codepoint': codepoint}


def _plain_codepoint(codepoint: str) -> str:
    """Upper case, without the variation selector, whose presence differs from set to set."""
    parts = codepoint.upper().replace('_', '-').split('-')
    return '-'.join(part.zfill(4) for part in parts if part != 'FE0F')


def _slug(label: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', re.sub('[’“”]', '', label.lower())).strip('-')


def clean_label(label: str) -> str:
    """A label as captions say it: lower case, no quotes or colons ('man: red hair' -> 'man with red hair')."""
    label = re.sub('[“”"!.]', '', label.lower()).replace('’', "'")
    label = re.sub(r': (?=.*\b(hair|beard|bald)\b)', ' with ', label)
    return re.sub(r'\s+', ' ', re.sub('[:,]', '', label)).strip()


def write_bundle(art: list[Art], file: Path) -> None:
    """Writes all of `art` into one xz tar: a machine without a network builds the same dataset from it."""
    lines = []
    partial = file.with_name(file.name + '.partial')
    with tarfile.open(partial, 'w:xz', preset=6) as tar:
        for piece in art:
            meta = dataclasses.asdict(piece)
            is_svg = piece.data.startswith(b'<svg')
            meta['data'] = piece.data.decode() if is_svg else ''
            lines.append(json.dumps(meta, ensure_ascii=False))
            if not is_svg:
                _add(tar, f'{piece.key}.webp', piece.data)
        _add(tar, 'art.jsonl', '\n'.join(lines).encode())
    partial.replace(file)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_bundle(file: Path) -> list[Art]:
    """The art that `write_bundle` wrote."""
    try:
        members = _members(file, lambda name: True)
        lines = members['art.jsonl'].decode().splitlines()
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        raise UserError(f'{file} is not a whole bundle ({error}): make it again with --bundle') from None
    art = []
    for line in lines:
        meta = json.loads(line)
        meta['tags'] = tuple(meta['tags'])
        meta['data'] = meta['data'].encode() or members[f'{meta["key"]}.webp']
        art.append(Art(**meta))
    return art


def warn_skipped(skipped: list[str]) -> None:
    """One line that counts and names the pictures that could not be drawn."""
    if skipped:
        shown = ', '.join(skipped[:5]) + (' …' if len(skipped) > 5 else '')
        warn(f'{len(skipped)} pictures could not be drawn and were skipped: {shown}')
