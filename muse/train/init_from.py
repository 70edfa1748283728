"""Starting from the weights of a release instead of fresh ones (finetuning): step 0, with a fresh optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from muse.errors import UserError, warn
from muse.release.format import describe_part, load_part
from muse.train.checkpoint import differences, flatten, unflatten
from muse.train.task import State


def start_from(
    folder: str,
    part: str,
    wanted: nnx.State,
    mesh: Mesh | None,
    *,
    below: Mapping[str, str] | None = None,
    inside: str = '',
) -> Callable[[State], State] | None:
    """What `Task.start` is for a run's `init_from`; None where that is empty.

    The release is compared at once, by its config.json alone; the weights are read when the run starts anew, not when
    it goes on from a checkpoint.

    Args:
        folder: a release, or the export of another run; '' for fresh weights.
        part: of it.
        wanted: the run's parameters, as arrays or shapes.
        mesh: what the weights are split over; None: the first device.
        below: hashes of the frozen parts under the model ('tokenizer', …): those of other ones are warned of.
        inside: name of the group of the part's parameters that is meant; '' for all.

    Raises:
        UserError: no such part, or its tensors are not those of the config: names the first that differ.
    """
    if not folder:
        return None
    found = describe_part(folder, part)
    if different := differences(flatten(_group(found.params, inside)), flatten(wanted)):
        raise UserError(f"init_from: the {part} in '{folder}' is of another config: {different}; use its config.model")
    for name, mine in (below or {}).items():
        theirs = found.extra.get(f'{name}_sha256', '')
        if theirs != mine:
            warn(
                f"init_from: the {part} in '{folder}' was trained on {name} {str(theirs)[:12] or 'unknown'}, this run "
                f'has {mine[:12]}: its weights know other ids or texts'
            )

    def start(state: State) -> State:
        loaded = flatten(_group(load_part(folder, part, mesh=mesh).params, inside))
        placed = {name: jax.device_put(loaded[name], old.sharding) for name, old in flatten(state['params']).items()}
        params = unflatten(state['params'], placed)
        return {**state, 'params': params, 'ema': jax.tree.map(jnp.copy, params)}

    return start


def _group(params: Any, inside: str) -> Any:
    return params[inside] if inside else params
