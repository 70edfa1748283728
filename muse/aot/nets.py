"""The models of trainings that have not been run, as a release without weights: what `sample.py --aot` compiles."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from muse.config import BaseRun, DecoderRun, Run, SuperresRun, TokenizerRun, read_run
from muse.errors import UserError
from muse.release.format import Part, Release, graphdef_and_template


def describe_runs(files: Sequence[str]) -> Release:
    """The models that config files of `configs/` train, as `muse.release.format.describe_release` has them.

    Args:
        files: of a base and its tokenizer, and, if wanted, of a super-res and its own.

    Raises:
        UserError: a file that cannot be read, two of a kind, or a part that is missing or does not fit the others.
    """
    runs = [_read(file) for file in files]
    [base] = _of(runs, BaseRun, 'base', 1, 1)
    superres = _of(runs, SuperresRun, 'super-res', 0, 1)
    needed = 1 + len(superres)
    tokenizers = _of(runs, (TokenizerRun, DecoderRun), 'tokenizer', needed, needed)
    low, *high = sorted(tokenizers, key=lambda run: -run.model.factor)
    release = Release(_part('tokenizer', low), _NO_TEXT, _part('base', base), base.decode, Path())
    _belongs('base', base.model.codebook_size, low)
    if not superres:
        return release
    _belongs('super-res', superres[0].model.codebook_size, high[0])
    if superres[0].model.low_grid != base.model.grid:
        raise UserError(f'the super-res reads {superres[0].model.low_grid} tokens, the base draws {base.model.grid}')
    net, tokenizer = _part('superres', superres[0]), _part('superres_tokenizer', high[0])
    return replace(release, superres=net, superres_tokenizer=tokenizer, superres_decode=superres[0].decode)


_NO_TEXT = Part(None, nnx.State({}), '', {})  # text states are data of the programs: no encoder is compiled


def _read(file: str) -> Run:
    if not Path(file).is_file():
        raise UserError(f"config file '{file}' does not exist: give files of configs/")
    try:
        values = runpy.run_path(file).get('get_config')
    except (SyntaxError, ValueError, ImportError, NameError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{file}' cannot be run ({reason}): give files of configs/") from None
    if values is None:
        raise UserError(f"'{file}' has no get_config: give files of configs/")
    return read_run(values().to_dict())


def _of(runs: Sequence[Run], kind: Any, name: str, least: int, most: int) -> list[Any]:
    found = [run for run in runs if isinstance(run, kind)]
    if not least <= len(found) <= most:
        count = f'{least}' if least == most else f'{least} or {most}'
        raise UserError(f'--aot_configs names {len(found)} of a {name}; give {count}, as files of configs/')
    return found


def _part(name: str, run: Any) -> Part:
    return Part(run.model, graphdef_and_template(name, run.model)[1], '', {})


def _belongs(name: str, codes: int, tokenizer: Any) -> None:
    if codes != tokenizer.model.codebook_size:
        raise UserError(f'the {name} draws {codes} codes, its tokenizer has {tokenizer.model.codebook_size}')
