"""Encodes pictures and captions once with the frozen nets, for base training on kind 'precomputed'.

    python tools/precompute.py --config=configs/emoji/tokenizer.py --config.data.path=DATA \
        --tokenizer=runs/emoji/tokenizer/export --text_encoder=FOLDER --out=runs/emoji/tokens --num=300000

The source is `data` of the config. `--split=heldout_pairs --num=0` takes each picture of a held-out split once. Running
the same command again goes on at the first missing shard.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.config import MeshConfig, read_run
from muse.errors import UserError, main_guard
from muse.mesh import check_batch, make_mesh
from muse.release.format import shipped
from muse.train.command_line import parse_flags, use_compilation_cache

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A tokenizer config: its `data` is the source.')
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the trained tokenizer (its workdir/export).')
_TEXT = flags.DEFINE_string(
    'text_encoder', '', 'Folder of the text encoder and its vocabulary; empty: the shipped one.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder for the records.')
_SPLIT = flags.DEFINE_string('split', '', 'Split of the source; empty: the one the config names.')
_NUM = flags.DEFINE_integer('num', None, 'Examples to draw; 0: each record of the split once.')
_SHARDS = flags.DEFINE_integer('shards', 8, 'Files to write.')
_BATCH = flags.DEFINE_integer('batch_size', 256, 'Pictures at a time.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order and of the scenes.')


def main(_: list[str]) -> None:
    """Reads the flags, loads the nets, writes one split."""
    with main_guard():
        if _CONFIG.value is None or not _TOKENIZER.value or not _OUT.value or _NUM.value is None:
            raise UserError('tools/precompute.py needs --config=FILE, --tokenizer=FOLDER, --out=FOLDER and --num=N')
        logging.set_verbosity(logging.WARNING)
        use_compilation_cache()
        from muse.train.precompute import load_nets, precompute

        data = read_run(_CONFIG.value.to_dict()).data
        data = dataclasses.replace(data, split=_SPLIT.value or data.split)
        mesh = make_mesh(MeshConfig())
        check_batch(mesh, _BATCH.value)
        nets = load_nets(_TOKENIZER.value, _TEXT.value or str(shipped()), data.text_length, mesh)
        with (
            tqdm(total=_NUM.value or None, unit=' examples', mininterval=2.0, file=sys.stderr) as bar,
            jax.set_mesh(mesh),
        ):
            total = precompute(
                data,
                nets,
                Path(_OUT.value),
                num=_NUM.value,
                shards=_SHARDS.value,
                batch_size=_BATCH.value,
                seed=_SEED.value,
                progress=lambda examples: _show(bar, examples),
            )
        print(f"{total} examples of split '{data.split}' are in {os.path.abspath(_OUT.value)}")


def _show(bar: tqdm, examples: int) -> None:
    bar.update(examples)


def _parse(argv: list[str]) -> list[str]:
    with main_guard():
        return parse_flags(argv)


if __name__ == '__main__':
    app.run(main, flags_parser=_parse)
