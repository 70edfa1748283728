"""Joins a tokenizer, a text encoder and a base into one release folder that sampling loads.

    python tools/export.py --tokenizer=runs/emoji/tokenizer/export --text_encoder=FOLDER --base=runs/emoji/base/export \
        --out=release --storage=int8

With --superres=FOLDER and --superres_tokenizer=FOLDER the release draws at the super-res's size too. For a base alone,
`train.py --release=FOLDER` does this when it is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast, get_args

import jax
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.config import Dtype
from muse.errors import UserError
from muse.jobs.command_line import guarded, parse_only_flags
from muse.release.join import join_release
from muse.release.storage import Storage

_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the tokenizer.')
_TEXT = flags.DEFINE_string('text_encoder', None, 'Folder of the text encoder and its vocabulary; a T5 checkpoint too.')
_TEXT_DTYPE = flags.DEFINE_enum(
    'text_dtype', None, ['float32', 'bfloat16'], 'What the text encoder computes in; default: what it says itself.'
)
_BASE = flags.DEFINE_string('base', None, 'Folder of the base.')
_SUPERRES = flags.DEFINE_string('superres', '', 'Folder of the super-res, if there is one.')
_SUPERRES_TOKENIZER = flags.DEFINE_string('superres_tokenizer', '', 'Folder of the tokenizer of its tokens.')
_OUT = flags.DEFINE_string('out', None, 'The release folder; made when missing.')
_STORAGE = flags.DEFINE_enum('storage', 'int8', get_args(Storage), 'Type of the large tensors on disk.')


def main(_: list[str]) -> None:
    """Reads the flags and prints what was written."""
    folders = {'tokenizer': _TOKENIZER.value, 'text_encoder': _TEXT.value, 'base': _BASE.value, 'out': _OUT.value}
    if missing := [f'--{name}=FOLDER' for name, value in folders.items() if not value]:
        raise UserError(f'tools/export.py needs {" ".join(missing)}')
    paths = {name: Path(str(value)) for name, value in folders.items()}
    if bool(_SUPERRES.value) != bool(_SUPERRES_TOKENIZER.value):
        raise UserError('--superres and --superres_tokenizer go together: give both or neither')
    superres = (Path(_SUPERRES.value), Path(_SUPERRES_TOKENIZER.value)) if _SUPERRES.value else None
    jax.config.update('jax_platforms', 'cpu')  # files become files: an accelerator may be too small or in use
    dtype = cast(Dtype | None, _TEXT_DTYPE.value)
    size = join_release(**paths, storage=cast(Storage, _STORAGE.value), superres=superres, text_dtype=dtype)
    print(f'{paths["out"]}: {size / 2**20:.1f} MiB ({_STORAGE.value})')


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
