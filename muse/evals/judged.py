"""Which pictures of a training config the tools of evaluation judge on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from muse.config import DataConfig, read_run
from muse.data.splits import HELDOUT
from muse.errors import UserError


def heldout_data(values: Mapping[str, Any], split: str, image_size: int | None) -> DataConfig:
    """The pictures of a config's `data`.

    Args:
        values: a whole config, as `muse.config.read_run` takes it.
        split: of the data; '': 'heldout' where `data.heldout_share` makes one, else what `eval_data` names where that
            is of the same kind, else `data`'s own.
        image_size: side in pixels; None: the config's.

    Raises:
        UserError: what the config trains on are no pictures.
    """
    run = read_run(values)
    if run.data.kind == 'precomputed':
        raise UserError(
            "the config's data.kind is 'precomputed': set --config.data.kind and --config.data.path to the pictures"
        )
    own = run.eval_data.split if run.eval_data.kind == run.data.kind else run.data.split
    split = split or (HELDOUT if run.data.heldout_share else own)
    return dataclasses.replace(run.data, split=split, image_size=image_size or run.data.image_size)
