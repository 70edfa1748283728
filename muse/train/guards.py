"""What ends a run for its own good: a loss or weights that are not finite, and too many records that cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from muse.errors import UserError
from muse.train.metrics import cut_after
from muse.train.row_weights import WEIGHT
from muse.train.task import Batch

UNREAD = 'unread_rows'  # the metric: rows of a step that stand in for records that could not be read
_FINITE = {'loss': 'the loss is not finite at step', 'param_norm': 'the weights are not finite after step'}
_ALWAYS_ALLOWED = 10  # unreadable rows, however few were read: one bad picture must not end a small run


class NotFiniteError(UserError):
    """A step went wrong. `steps` is the window, from its first to its last step; `first` the first such step.

    Args:
        what: what was found, up to the number of the step.
    """

    def __init__(self, what: str, first: int, steps: tuple[int, int]):
        self.first, self.steps = first, steps
        super().__init__(
            f'{what} {first} (steps {steps[0]} to {steps[1]} since the last line): '
            'lower optim.learning_rate or raise optim.warmup_steps, and start again from the last checkpoint'
        )


def check_finite(steps: Sequence[int], values: Sequence[Mapping[str, Any]]) -> None:
    """Raises NotFiniteError when a step's 'loss', or its 'param_norm' if there is one, is not finite.

    A gradient can overflow where the loss does not: the weights are then lost after this step, and a checkpoint of it
    would be too.
    """
    for step, value in zip(steps, values, strict=True):
        for name, what in _FINITE.items():
            if not math.isfinite(value.get(name, 0.0)):
                raise NotFiniteError(what, step, (steps[0], steps[-1]))


class Unread:
    """Counts the rows of all hosts that could not be read. All hosts see the same numbers, and stop at one step.

    Args:
        batch_size: rows of a step, over all hosts.
        most: share of the rows read since the start that may be unreadable (`data.max_unread`).
    """

    def __init__(self, batch_size: int, most: float):
        self._batch_size, self._most = batch_size, most
        self._rows, self._unread = 0, 0

    def count(self, values: Sequence[MutableMapping[str, Any]]) -> dict[str, float]:
        """Takes the metric out of `values`; returns {'unread_rows': their number}, or nothing where there are none.

        Raises:
            UserError: more of them than the bound.
        """
        found = sum(int(value.pop(UNREAD, 0)) for value in values)
        self._rows += len(values) * self._batch_size
        self._unread += found
        if self._unread > max(_ALWAYS_ALLOWED, self._most * self._rows):
            raise UserError(
                f'{self._unread} of {self._rows} records read could not be used, over data.max_unread = {self._most}: '
                'see <workdir>/unread, mend the data or raise the bound'
            )
        return {UNREAD: float(found)} if found else {}


class UnreadLog:
    """Names what this host could not read, one line of JSON a row, in <workdir>/unread/<process>.jsonl.

    Args:
        workdir: of the run.
        process: this host's number.
        start_step: steps done before; lines beyond it are dropped, for those steps come again.
    """

    def __init__(self, workdir: Path, process: int, start_step: int):
        self._file = workdir / 'unread' / f'{process}.jsonl'
        cut_after(self._file, start_step)

    def note(self, step: int, batch: Batch) -> None:
        """Names the unreadable rows of what this host reads for a step."""
        if WEIGHT not in batch or batch[WEIGHT].all():
            return
        self._file.parent.mkdir(exist_ok=True)
        with open(self._file, 'a', encoding='utf-8') as file:
            for index, weight, reason in zip(batch['index'], batch[WEIGHT], batch['bad'], strict=True):
                if weight == 0:
                    line = {'step': step, 'index': int(index), 'reason': reason}
                    file.write(json.dumps(line, ensure_ascii=False) + '\n')
