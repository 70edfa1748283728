"""Checkpoints of the training state, written by Orbax while training goes on.

On disk a state is one flat dict of arrays named by path ('params/blocks/mlp/up/kernel'), so that nothing of Flax or
optax is stored and a checkpoint of another config can be named by its first differing tensor. Orbax's v1 interface is
used through this file alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from muse.errors import UserError, warn
from muse.train.task import State

_STATE, _DATA = 'state', 'data'
_IN_FLIGHT = 2  # steps after a checkpoint in which a host may still be heard asking for it
_SHARED_BYTES = 4 << 20


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

    A checkpoint is written in the background. Where that fails, whatever is called next raises a UserError.

    Args:
        folder: where they lie, one folder a step.
        keep: how many of the newest stay.
        every_steps, every_minutes: when `due` and `late` say so; 0 turns one of them off.
    """

    def __init__(self, folder: Path, *, keep: int, every_steps: int, every_minutes: float):
        self._every_steps, self._every_seconds = every_steps, every_minutes * 60
        self._saved_at, self._last_step = time.monotonic(), -1
        self._writing: _Writing | None = None
        context = ocp.Context()
        # The copies of an array share the work of writing it where that pays: each share is a program to compile.
        context.array.saving.min_slice_bytes_for_replica_parallel = _SHARED_BYTES
        newest: Any = ocp.training.preservation_policies.LatestN(max(keep, 1))
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()), context=context, preservation_policy=newest, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another host may be gone, and a checkpoint would wait for it
        try:
            self.wait()
        except UserError:
            if kind is None:  # otherwise what went wrong first is told
                raise
        finally:
            self._close()

    def _close(self) -> None:
        try:
            self._checkpointer.close()
        except Exception:  # tells again of a write that failed, which `wait` has told of
            if self._writing is None or self._writing.error is None:
                raise

    def due(self, step: int, asked: bool = False) -> bool:
        """True when the number of steps done calls for a checkpoint, or a host has `asked` for one."""
        by_steps = self._every_steps > 0 and step % self._every_steps == 0
        return (step != self._last_step and by_steps) or (asked and step > self._last_step + _IN_FLIGHT)

    def late(self) -> bool:
        """True on the first host, by its clock, when too long has passed since the last checkpoint was begun."""
        waited = time.monotonic() - self._saved_at
        return jax.process_index() == 0 and self._every_seconds > 0 and waited >= self._every_seconds

    def save(self, step: int, state: State) -> None:
        """Starts to write a checkpoint; waits first for one still being written.

        Raises:
            UserError: this one or the one before cannot be written; older ones are as they were.
        """
        if step == self._last_step:
            return
        self.wait()
        contents = {_STATE: flatten(state), _DATA: {'data_step': step}}
        try:
            response = self._checkpointer.save_checkpointables_async(step, contents, force=True, overwrite=True)
        except Exception as error:  # of the file system, in whatever clothes Orbax and TensorStore give it
            raise self._failure(step, error) from error
        self._writing = _Writing(step, response)
        self._saved_at, self._last_step = time.monotonic(), step

    def check(self) -> None:
        """Raises UserError when the last checkpoint could not be written; waits for nothing."""
        if self._writing is not None and self._writing.error is not None:
            raise self._failure(self._writing.step, self._writing.error) from self._writing.error

    def wait(self) -> None:
        """Waits for the checkpoint that is being written; raises as `check`."""
        if self._writing is not None:
            self._writing.thread.join()
            self.check()

    def _failure(self, step: int, error: Exception) -> UserError:
        folder = self._checkpointer.directory
        return UserError(
            f"checkpoint '{folder / str(step)}' could not be written ({_reason(error)}): the older ones are as they "
            'were; make room, then run the same command again'
        )

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
                folder = self._checkpointer.directory / str(step)
                warn(f"checkpoint '{folder}' cannot be read ({_reason(error)}): skipped")
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
        if different := differences(found, wanted):
            raise UserError(
                f"checkpoint '{self._checkpointer.directory / str(step)}' is of another config: {different}; use its "
                'config or another --workdir'
            )


class _Writing:
    """A checkpoint on its way to the disk; `error` is what stopped it."""

    def __init__(self, step: int, response: Any):
        self.step, self.error = step, None
        self.thread = threading.Thread(target=self._wait, args=(response,), daemon=True)
        self.thread.start()

    def _wait(self, response: Any) -> None:
        try:
            response.result()
        except Exception as error:  # kept for the thread that trains
            self.error: Exception | None = error


def _reason(error: Exception) -> str:
    """What the system said, from the innermost of a chain of exceptions."""
    while (cause := error.__cause__ or error.__context__) is not None and isinstance(cause, Exception):
        error = cause
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Names the first arrays whose shapes or types differ between what was stored and what a config makes; '': none."""

    def spell(tensors: Mapping[str, Any], name: str) -> str:
        return f'{tuple(tensors[name].shape)} {tensors[name].dtype}' if name in tensors else 'nothing'

    names = [*wanted, *sorted(found.keys() - wanted.keys())]
    differing = [
        f'{name} is {spell(found, name)}, the config makes {spell(wanted, name)}'
        for name in names
        if spell(found, name) != spell(wanted, name)
    ]
    more = f' (and {len(differing) - 3} more)' if len(differing) > 3 else ''
    return '; '.join(differing[:3]) + more
