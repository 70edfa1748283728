"""Checkpoints of the training state, written by Orbax while training goes on.

On disk a state is one flat dict of arrays named by path ('params/blocks/mlp/up/kernel'), so that nothing of Flax or
optax is stored and a checkpoint of another config can be named by its first differing tensor. Orbax's v1 interface is
used through this file alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from muse.errors import UserError, warn
from muse.train.task import State

_STATE, _DATA = 'state', 'data'


def flatten(state: Any) -> dict[str, Any]:
    """Path → array for every array of a state."""

    def is_leaf(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): jax.tree.leaves(leaf)[0] for path, leaf in leaves}


def unflatten(like: Any, arrays: dict[str, Any]) -> Any:
    """The reverse of `flatten`: a state of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in flatten(like)])


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for the last write.

    Args:
        folder: where they lie, one folder a step.
        keep: how many of the newest stay.
        every_steps, every_minutes: when `due` says so; 0 turns one of them off.
    """

    def __init__(self, folder: Path, *, keep: int, every_steps: int, every_minutes: float):
        self._every_steps, self._every_seconds = every_steps, every_minutes * 60
        self._saved_at, self._last_step = time.monotonic(), -1
        newest: Any = ocp.training.preservation_policies.LatestN(max(keep, 1))
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()), preservation_policy=newest, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def due(self, step: int) -> bool:
        """True when a checkpoint should be written after `step` steps."""
        if step == self._last_step:
            return False
        by_steps = self._every_steps > 0 and step % self._every_steps == 0
        by_clock = self._every_seconds > 0 and time.monotonic() - self._saved_at >= self._every_seconds
        return by_steps or _agreed(by_clock, self._every_seconds > 0)

    def save(self, step: int, state: State) -> None:
        """Starts to write a checkpoint; waits first for one still being written."""
        if step == self._last_step:
            return
        contents = {_STATE: flatten(state), _DATA: {'data_step': step}}
        self._checkpointer.save_checkpointables_async(step, contents, force=True, overwrite=True)
        self._saved_at, self._last_step = time.monotonic(), step

    def restore(self, abstract: State) -> tuple[State, int] | None:
        """The newest readable state and its data step, or None when there is none.

        A checkpoint that cannot be read is skipped with a warning that names it.

        Args:
            abstract: the state as `ShapeDtypeStruct`s with shardings.

        Raises:
            UserError: the checkpoint is of another config, or none of those that exist can be read.
        """
        wanted, broken = flatten(abstract), []
        for checkpoint in reversed(self._checkpointer.checkpoints):
            step = checkpoint.step
            try:
                metadata = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
                if metadata is None:  # what Orbax returns when files are damaged
                    raise ValueError('its tensors cannot be listed')
                self._compare(step, metadata, wanted)
                like = {_STATE: wanted, _DATA: {'data_step': 0}}
                loaded = self._checkpointer.load_checkpointables(step, like)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes the reader say
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                warn(f"checkpoint '{self._checkpointer.directory / str(step)}' cannot be read ({reason}): skipped")
                broken.append(step)
                continue
            self._last_step = step
            for bad in broken:  # their steps come again
                self._checkpointer.delete(bad)
            return unflatten(abstract, loaded[_STATE]), int(loaded[_DATA]['data_step'])
        if broken:
            raise UserError(
                f"none of the checkpoints in '{self._checkpointer.directory}' can be read: remove the folder to start "
                f'anew'
            )
        return None

    def _compare(self, step: int, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        def spell(tensors: dict[str, Any], name: str) -> str:
            return f'{tuple(tensors[name].shape)} {tensors[name].dtype}' if name in tensors else 'nothing'

        names = [*wanted, *sorted(found.keys() - wanted.keys())]
        differing = [
            f'{name} is {spell(found, name)}, the config makes {spell(wanted, name)}'
            for name in names
            if spell(found, name) != spell(wanted, name)
        ]
        if differing:
            more = f' (and {len(differing) - 3} more)' if len(differing) > 3 else ''
            raise UserError(
                f"checkpoint '{self._checkpointer.directory / str(step)}' is of another config: "
                f'{"; ".join(differing[:3])}{more}; use its config or another --workdir'
            )


def _agreed(mine: bool, possible: bool) -> bool:
    """Clocks of several hosts differ: the first host's decides."""
    if not possible or jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(jax.numpy.asarray(mine)))
