"""Joins a tokenizer, a text encoder and a base into one release folder that sampling loads.

    python tools/export.py --tokenizer=runs/emoji/tokenizer/export --text_encoder=FOLDER --base=runs/emoji/base/export \
        --out=release --storage=int8

With --superres=FOLDER and --superres_tokenizer=FOLDER the release draws at the super-res's size too.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast

import jax
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.config import Dtype
from muse.errors import UserError, main_guard
from muse.release.format import VOCABULARY, Part, load_part, load_release, load_superres_tokenizer, save_part
from muse.release.text_encoder import load_text_encoder
from muse.text.tokenizer import Tokenizer

_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the tokenizer.')
_TEXT = flags.DEFINE_string('text_encoder', None, 'Folder of the text encoder and its vocabulary; a T5 checkpoint too.')
_TEXT_DTYPE = flags.DEFINE_enum(
    'text_dtype', None, ['float32', 'bfloat16'], 'What the text encoder computes in; default: what it says itself.'
)
_BASE = flags.DEFINE_string('base', None, 'Folder of the base.')
_SUPERRES = flags.DEFINE_string('superres', '', 'Folder of the super-res, if there is one.')
_SUPERRES_TOKENIZER = flags.DEFINE_string('superres_tokenizer', '', 'Folder of the tokenizer of its tokens.')
_OUT = flags.DEFINE_string('out', None, 'The release folder; made when missing.')
_STORAGE = flags.DEFINE_enum('storage', 'int8', ['int8', 'bfloat16', 'float32'], 'Type of the large tensors on disk.')

Storage = Literal['int8', 'bfloat16', 'float32']


def export(
    tokenizer: Path,
    text_encoder: Path,
    base: Path,
    out: Path,
    storage: Storage,
    superres: tuple[Path, Path] | None = None,
    text_dtype: Dtype | None = None,
) -> int:
    """Writes the release and returns its size in bytes.

    Rounding the frozen parts changes their hash, so the transformers are made to name the stored ones here, once it is
    known that they were trained on the parts given. `superres` are the folders of the super-res and of its tokenizer,
    `text_dtype` is what the text encoder computes in, None what it says itself. Every part is let go of when written.

    Raises:
        UserError: a missing or damaged part, or a transformer that was trained on other parts.
    """
    text = load_text_encoder(text_encoder)
    vocabulary, text_part = Tokenizer(text.vocabulary).model, text.part
    if text_dtype:
        text_part = replace(text_part, config=replace(text_part.config, dtype=text_dtype))
    frozen = {'tokenizer': (tokenizer, load_part(tokenizer, 'tokenizer')), 'text_encoder': (text_encoder, text_part)}
    del text, text_part
    trained = {'base': (base, load_part(base, 'base'))}
    if superres:
        frozen['superres_tokenizer'] = superres[1], load_superres_tokenizer(superres[1])
        trained['superres'] = superres[0], load_part(superres[0], 'superres')
    for folder, model in trained.values():
        _check(folder, model, frozen)
    stored = {}
    for name in list(frozen):
        _, part = frozen.pop(name)
        # Rounded, a finetuned decoder's encoder is that of no other file any more.
        notes = {key: value for key, value in part.extra.items() if key != 'ids_sha256'}
        notes |= {'vocabulary_sha256': sha256(vocabulary).hexdigest()} if name == 'text_encoder' else {}
        key = f'{name}_sha256'
        stored[key] = save_part(out, name, config=part.config, params=part.params, storage=storage, extra=notes)
    for name in list(trained):
        _, part = trained.pop(name)
        extra = {key: stored.get(key, value) for key, value in part.extra.items()}
        save_part(out, name, config=part.config, params=part.params, storage=storage, extra=extra)
    del part
    (out / VOCABULARY).write_bytes(vocabulary)
    load_release(out)
    return sum(file.stat().st_size for file in out.iterdir() if file.suffix in ('.safetensors', '.json', '.model'))


def _check(folder: Path, model: Part, frozen: dict[str, tuple[Path, Part]]) -> None:
    for name, (where, part) in frozen.items():
        wanted = model.extra.get(f'{name}_sha256')
        if wanted != part.ids_hash and (wanted is not None or name != 'superres_tokenizer'):
            raise UserError(
                f"'{folder}' was trained on {name} {str(wanted)[:12]}, '{where}' holds {part.ids_hash[:12]}: give the "
                'one it was trained on'
            )


def main(_: list[str]) -> None:
    """Reads the flags and prints what was written."""
    with main_guard():
        folders = {'tokenizer': _TOKENIZER.value, 'text_encoder': _TEXT.value, 'base': _BASE.value, 'out': _OUT.value}
        if missing := [f'--{name}=FOLDER' for name, value in folders.items() if not value]:
            raise UserError(f'tools/export.py needs {" ".join(missing)}')
        paths = {name: Path(str(value)) for name, value in folders.items()}
        if bool(_SUPERRES.value) != bool(_SUPERRES_TOKENIZER.value):
            raise UserError('--superres and --superres_tokenizer go together: give both or neither')
        superres = (Path(_SUPERRES.value), Path(_SUPERRES_TOKENIZER.value)) if _SUPERRES.value else None
        jax.config.update('jax_platforms', 'cpu')  # files become files: an accelerator may be too small or in use
        dtype = cast(Dtype | None, _TEXT_DTYPE.value)
        size = export(**paths, storage=cast(Storage, _STORAGE.value), superres=superres, text_dtype=dtype)
        print(f'{paths["out"]}: {size / 2**20:.1f} MiB ({_STORAGE.value})')


if __name__ == '__main__':
    app.run(main)
