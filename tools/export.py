"""Joins a tokenizer, a text encoder and a base into one release folder that sampling loads.

    python tools/export.py --tokenizer=runs/emoji/tokenizer/export --text_encoder=FOLDER --base=runs/emoji/base/export \
        --out=release --storage=int8
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal, cast

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.errors import UserError, main_guard
from muse.release.format import VOCABULARY, file_hash, load_part, load_release, save_part

_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the tokenizer.')
_TEXT = flags.DEFINE_string('text_encoder', None, 'Folder of the text encoder and its vocabulary.')
_BASE = flags.DEFINE_string('base', None, 'Folder of the base.')
_OUT = flags.DEFINE_string('out', None, 'The release folder; made when missing.')
_STORAGE = flags.DEFINE_enum('storage', 'int8', ['int8', 'bfloat16', 'float32'], 'Type of the large tensors on disk.')

Storage = Literal['int8', 'bfloat16', 'float32']


def export(tokenizer: Path, text_encoder: Path, base: Path, out: Path, storage: Storage) -> int:
    """Writes the release and returns its size in bytes.

    Rounding the frozen parts changes their hash, so the base is made to name the stored ones here, once it is known
    that it was trained on the parts given.

    Raises:
        UserError: a missing or damaged part, or a base that was trained on other parts.
    """
    parts = {'tokenizer': load_part(tokenizer, 'tokenizer'), 'text_encoder': load_part(text_encoder, 'text_encoder')}
    trained = load_part(base, 'base')
    for (name, part), folder in zip(parts.items(), (tokenizer, text_encoder), strict=True):
        wanted = str(trained.extra.get(f'{name}_sha256'))
        if wanted != part.hash:
            raise UserError(
                f"'{base}' was trained on {name} {wanted[:12]}, '{folder}' holds {part.hash[:12]}: give the one it was "
                'trained on'
            )
    vocabulary = text_encoder / VOCABULARY
    if not vocabulary.is_file():
        raise UserError(f"vocabulary '{vocabulary}' does not exist: give the folder the text encoder was made in")
    extra = dict(trained.extra)
    for name, part in parts.items():
        notes = part.extra | ({'vocabulary_sha256': file_hash(vocabulary)} if name == 'text_encoder' else {})
        stored = save_part(out, name, config=part.config, params=part.params, storage=storage, extra=notes)
        extra[f'{name}_sha256'] = stored
    save_part(out, 'base', config=trained.config, params=trained.params, storage=storage, extra=extra)
    if vocabulary.resolve() != (out / VOCABULARY).resolve():
        shutil.copyfile(vocabulary, out / VOCABULARY)
    load_release(out)
    return sum(file.stat().st_size for file in out.iterdir() if file.suffix in ('.safetensors', '.json', '.model'))


def main(_: list[str]) -> None:
    """Reads the flags and prints what was written."""
    with main_guard():
        folders = {'tokenizer': _TOKENIZER.value, 'text_encoder': _TEXT.value, 'base': _BASE.value, 'out': _OUT.value}
        if missing := [f'--{name}=FOLDER' for name, value in folders.items() if not value]:
            raise UserError(f'tools/export.py needs {" ".join(missing)}')
        paths = {name: Path(str(value)) for name, value in folders.items()}
        size = export(**paths, storage=cast(Storage, _STORAGE.value))
        print(f'{paths["out"]}: {size / 2**20:.1f} MiB ({_STORAGE.value})')


if __name__ == '__main__':
    app.run(main)
