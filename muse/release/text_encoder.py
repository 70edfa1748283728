"""A text encoder and its vocabulary from wherever they are: a release folder, a T5 checkpoint, or the hub by name."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from muse.config import Dtype
from muse.errors import UserError
from muse.release.format import VOCABULARY, Part, load_part
from muse.release.t5_checkpoints import load_t5

VOCABULARIES = (VOCABULARY, 'sentencepiece.model', 'tokenizer.json')  # T5X calls it sentencepiece.model
_HUB_NAME = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')
_HUB_FILES = ['config.json', '*.safetensors', '*.safetensors.index.json', *VOCABULARIES]


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder and the file that `muse.text.tokenizer.Tokenizer` reads for it."""

    part: Part
    vocabulary: Path


def load_text_encoder(folder: str | Path, *, dtype: Dtype | None = None, mesh: Mesh | None = None) -> TextEncoder:
    """Reads a text encoder and finds its vocabulary.

    Args:
        folder: a release folder, the folder of a T5 checkpoint (`muse.release.t5_checkpoints.load_t5`) with its
            vocabulary in it, or a name on the hub such as 'google/flan-t5-xl' where huggingface_hub is installed.
        dtype: of the parameters and of the compute; None: as a release says, and float32 for a checkpoint.
        mesh: what the parameters are split over; None: all on the first device.

    Raises:
        UserError: nothing of the kind there, something incomplete or damaged, or a vocabulary that is not
            of the size of the encoder's table.
    """
    folder = Path(folder) if Path(folder).exists() else fetch(str(folder))
    if _is_release(folder):
        part = load_part(folder, 'text_encoder', dtype=dtype or 'float32', mesh=mesh)
        if dtype is not None:
            part = dataclasses.replace(part, config=dataclasses.replace(part.config, dtype=dtype))
        names: tuple[str, ...] = (VOCABULARY,)
    else:
        loaded = load_t5(folder, dtype=dtype or 'float32', mesh=mesh)
        part, names = Part(loaded.config, loaded.params, loaded.hash, {}), VOCABULARIES
    vocabulary = next((folder / name for name in names if (folder / name).is_file()), None)
    if vocabulary is None:
        raise UserError(f"'{folder}' has no vocabulary: put {' or '.join(names)} beside the weights")
    _check_vocabulary(vocabulary, part.config.vocab_size)
    return TextEncoder(part, vocabulary)


def _is_release(folder: Path) -> bool:
    try:
        index = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False  # the reader of a checkpoint says what is wrong with the file, if it needs it
    return isinstance(index, dict) and 'parts' in index


def _check_vocabulary(vocabulary: Path, rows: int) -> None:
    """An encoder may have a few more rows than pieces (they are padded to a round number), never fewer."""
    from muse.text.tokenizer import Tokenizer

    pieces = Tokenizer(vocabulary).vocab_size
    if pieces > rows or pieces < rows - max(512, rows // 10):
        raise UserError(
            f"vocabulary '{vocabulary}' has {pieces} pieces, the text encoder beside it {rows} rows: it is of another "
            'model; put the right one there'
        )


def fetch(name: str) -> Path:
    """The local folder of a model of the hub, which is downloaded unless it is in the cache.

    Raises:
        UserError: `name` is none the hub could have, huggingface_hub is not installed, or the hub cannot be reached.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"text encoder folder '{name}' does not exist: give a folder, or a name such as google/flan-t5-xl"
        )
    by_hand = (
        'put config.json, model.safetensors (or model.safetensors.index.json and its shards) and '
        f'{VOCABULARY} into a folder and give that'
    )
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"'{name}' is no folder here, and huggingface_hub, which could fetch it, is not installed: {by_hand}"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # requests', urllib's and the hub's own, for whatever keeps it from coming
        raise UserError(
            f"'{name}' is no folder here and cannot be fetched ({type(error).__name__}): {by_hand}"
        ) from None
