"""Encodes pictures and captions once with the frozen nets, for base training on kind 'precomputed'.

    python tools/precompute.py --config=configs/emoji/tokenizer.py --config.data.path=DATA \
        --tokenizer=runs/emoji/tokenizer/export --text_encoder=FOLDER --out=runs/emoji/tokens --num=300000

With --low_tokenizer=runs/emoji/tokenizer/export the records are for the super-res: --config and --tokenizer are then
those of the high-res tokenizer, and the low-res one reads the same pictures at 1/--low_ratio of their size.

The source is `data` of the config. `--split=heldout_pairs --num=0` takes each picture of a held-out split once;
`--split=train,heldout` makes two splits one after the other. The config may be a base's as well: its `tokenizer` and
`text_encoder` are then taken where none are given. Running the same command again goes on at the first missing shard.
`--distributed` on several hosts with one shared --out spreads the shards over them. What could not be used is named in
OUT/<split>.rejects.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.config import BaseRun, DataConfig, Dtype, MeshConfig, Run, read_run
from muse.data.precomputed import Split
from muse.data.sources import open_source
from muse.data.splits import TRAIN
from muse.errors import UserError
from muse.jobs.command_line import guarded
from muse.mesh import make_mesh
from muse.release.format import shipped
from muse.train.command_line import parse_config_flags, use_compilation_cache
from muse.train.hosts import join

if TYPE_CHECKING:
    from muse.train.precompute import Nets

_CONFIG = config_flags.DEFINE_config_file('config', None, "A tokenizer's config or a base's: its `data` is the source.")
_TOKENIZER = flags.DEFINE_string(
    'tokenizer', None, "Folder of the trained tokenizer (its workdir/export), or a base's own."
)
_TEXT = flags.DEFINE_string(
    'text_encoder',
    '',
    "Folder (or hub name) of a T5, ours, Hugging Face or T5X; empty: a base's own, or the shipped one.",
)
_TEXT_DTYPE = flags.DEFINE_enum(
    'text_dtype', None, ['float32', 'bfloat16'], 'Of the text encoder; bfloat16 for an XXL. Default: as it is stored.'
)
_LOW = flags.DEFINE_string('low_tokenizer', '', "Folder of the base's tokenizer, for records of the super-res.")
_LOW_RATIO = flags.DEFINE_integer('low_ratio', 2, 'How much smaller the pictures are for --low_tokenizer.')
_OUT = flags.DEFINE_string('out', None, 'Folder for the records.')
_SPLIT = flags.DEFINE_list('split', '', 'Splits of the source, with commas; empty: the one the config names.')
_NUM = flags.DEFINE_integer('num', None, 'Examples to draw of each split; 0: each of its records once.')
_SHARDS = flags.DEFINE_integer('shards', 8, 'Files to write; hosts share them out.')
_BATCH = flags.DEFINE_integer('batch_size', 256, 'Pictures at a time.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other hosts of this job (jax.distributed).')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order and of the scenes.')


def main(_: list[str]) -> None:
    """Reads the flags, loads the nets, writes the splits."""
    if _CONFIG.value is None or not _OUT.value or _NUM.value is None:
        raise UserError('tools/precompute.py needs --config=FILE, --tokenizer=FOLDER, --out=FOLDER and --num=N')
    run = read_run(_CONFIG.value.to_dict())
    tokenizer, text = _frozen(run)
    logging.set_verbosity(logging.WARNING)
    if _DISTRIBUTED.value:
        join()
    use_compilation_cache()
    from muse.train.precompute import load_nets

    wanted = _SPLIT.value or [run.data.split or TRAIN]
    sources = [dataclasses.replace(run.data, split=split) for split in wanted]
    for data in sources:
        open_source(data)  # what is wrong with it is said before the nets are loaded
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    dtype = cast(Dtype | None, _TEXT_DTYPE.value)
    nets = load_nets(tokenizer, text, run.data.text_length, mesh, _LOW.value, _LOW_RATIO.value, dtype)
    for data in sources:
        found = _write(data, nets, Path(_OUT.value), _NUM.value)
        if jax.process_index() == 0:
            _report(Path(_OUT.value), data.split, found)


def _frozen(run: Run) -> tuple[str, str]:
    """Folders of the tokenizer and the text encoder: those of the flags, else those that a base was to train on."""
    transformer = isinstance(run, BaseRun)
    tokenizer = _TOKENIZER.value or (run.tokenizer if transformer else '')
    if not tokenizer:
        raise UserError('tools/precompute.py needs --tokenizer=FOLDER, the tokenizer whose ids are stored')
    return tokenizer, _TEXT.value or (run.text_encoder if transformer else '') or str(shipped())


def _write(data: DataConfig, nets: Nets, out: Path, num: int) -> Split:
    from muse.train.precompute import precompute

    bar = tqdm(unit=' examples', mininterval=2.0, delay=1.0, smoothing=0.05, file=sys.stderr)
    with bar, jax.set_mesh(nets.mesh):
        return precompute(
            data,
            nets,
            out,
            num=num,
            shards=_SHARDS.value,
            batch_size=_BATCH.value,
            seed=_SEED.value,
            progress=functools.partial(_show, bar),
        )


def _show(bar: tqdm, done: int, total: int) -> None:
    if bar.total is None:  # the first call: what earlier runs did says nothing about the speed
        bar.initial = bar.n = done
        bar.total = total
    else:
        bar.update(done - bar.n)


def _report(folder: Path, split: str, found: Split) -> None:
    print(f"{found.records} examples of split '{split}' are in {folder.absolute()}")
    if found.rejected or found.skipped:
        file = folder / f'{split}.rejects.jsonl'
        print(f'{found.rejected} could not be used, and {found.skipped} of the source were left out before: see {file}')
    if found.without_text:
        print(f'{found.without_text} have no text')
    if found.full_text:
        print(f'{found.full_text} have as much text as fits or more: is --config.data.text_length long enough?')
    for caption, lost in found.cut:
        print(f"cut, for one: '{caption}' lost all from '{lost}' on")


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_config_flags)
