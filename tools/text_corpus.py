"""The corpus file of the demo's text encoder: xz-compressed lines of 'kind<tab>text'."""

from __future__ import annotations

import lzma
from pathlib import Path

from muse.errors import UserError

# 'sense' is another word of a gloss's meaning, with the same definition.
KINDS = ('gloss', 'sense', 'word', 'thing', 'label', 'caption')


def write(corpus: list[tuple[str, str]], path: Path) -> None:
    """Writes the corpus file, sorted by kind (it compresses better so)."""
    lines = '\n'.join(f'{kind}\t{text}' for kind, text in sorted(corpus, key=lambda line: KINDS.index(line[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(lines.encode(), preset=9))


def read(path: Path) -> list[tuple[str, str]]:
    """What `write` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"corpus '{path}' cannot be read ({error}): make it with --stage=corpus") from None
    pairs = (line.partition('\t') for line in lines)
    return [(kind, text) for kind, _, text in pairs]
