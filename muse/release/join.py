"""Joins parts that were trained apart into one release folder that sampling loads."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from muse.config import Dtype
from muse.errors import UserError
from muse.release.format import VOCABULARY, Part, load_part, load_release, load_superres_tokenizer, save_part
from muse.release.storage import Storage
from muse.release.text_encoder import load_text_encoder
from muse.text.tokenizer import Tokenizer


def join_release(
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
