"""What is kept of a run that went wrong: its state, and which examples it had just seen.

Both lie in <workdir>/emergency, where resuming never looks: a run started again goes on from the newest checkpoint,
whose losses and weights were all finite.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax

from muse.config import Run
from muse.train.checkpoint import Checkpoints
from muse.train.guards import NotFiniteError
from muse.train.task import State


def save_emergency(workdir: Path, config: Run, state: State, error: NotFiniteError) -> str:
    """Writes <workdir>/emergency/<step> (a checkpoint) and <step>.json (what happened, and the batch's examples).

    Args:
        workdir: of the run.
        config: of the run.
        state: as it is now, after the step that went wrong or a later one.
        error: says where it went wrong.

    Returns:
        A sentence that says where they are.

    Raises:
        UserError: they cannot be written.
    """
    step, folder = int(state['step']), workdir / 'emergency'
    with Checkpoints(folder, keep=1, every_steps=0, every_minutes=0.0) as checkpoints:
        checkpoints.save(step, state)
    note = folder / f'{step}.json'
    if jax.process_index() == 0:
        note.write_text(
            json.dumps(_describe(config, step, error), indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
    return f"the state after step {step} and the names of that step's examples are in '{folder}'"


def _describe(config: Run, step: int, error: NotFiniteError) -> dict[str, object]:
    from muse.data.pipeline import source_names

    rows = config.train.batch_size
    indices = range((error.first - 1) * rows, error.first * rows)  # an endless run reads its examples in turn
    names = source_names(config.data, indices, config.train.seed)
    return {
        'holds': f'the state after step {step}, when step {error.first} was found to have gone wrong; for looking at, '
        'not for going on: its weights are as the bad step left them',
        'first_bad_step': error.first,
        'window': list(error.steps),
        'source': f'{config.data.kind} {config.data.path}'.strip(),
        'examples': [{'index': index, 'name': name} for index, name in zip(indices, names, strict=True)],
    }
