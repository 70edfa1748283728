"""Compiles the train step of `train.py` for a topology: the same step, shardings, optimiser and donated state.

Frozen nets stay outside of the step of the transformers, so none is loaded: a batch is that of precomputed tokens.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from muse.aot.chips import Topology
from muse.config import BaseRun, Run, SuperresRun, TokenizerRun
from muse.errors import UserError
from muse.mesh import batch_sharding, check_batch, make_mesh, replicated
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.train import base, superres, tokenizer
from muse.train.loop import abstract_state, jit_step
from muse.train.ranges import check_attention, check_ranges
from muse.train.task import Batch, State


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program.

    Attributes:
        text: the optimised HLO of one device.
        state_bytes: what a device holds of each group of the arguments, before the compiler's padding.
        arguments, temporaries, code: bytes of a device: arguments as laid out, the rest, the program itself.
        seconds: how long the compiler took.
    """

    mesh: Mesh
    text: str
    state_bytes: dict[str, float]
    arguments: float
    temporaries: float
    code: float
    parameters: int
    seconds: float

    @property
    def memory(self) -> float:
        return self.arguments + self.temporaries + self.code


class DoesNotFit(Exception):
    """A device's memory is too small: the compiler says so, or the state alone is larger."""

    def __init__(self, message: str, mesh: Mesh, state_bytes: dict[str, float]):
        used = re.search(r'[Uu]sed ([\d.]+\w*) of ([\d.]+\w*) hbm', message)
        self.mesh, self.state_bytes = mesh, state_bytes
        self.needed = f'{used.group(1)} of {used.group(2)}' if used else 'more than it has'
        super().__init__(message)


def compile_step(run: Run, topology: Topology) -> Program:
    """Compiles one training step of `run` for every device of `topology`.

    Raises:
        UserError: a number out of range, a mesh, batch or kernel that does not fit the topology, or a task without
            such a step.
        DoesNotFit: the step needs more memory than a device has.
    """
    mesh = _checked_mesh(run, topology.devices, 'tpu')
    held = state_bytes(run, mesh)
    if sum(held.values()) > topology.chip.hbm / topology.chip.devices:
        raise DoesNotFit('the state alone is larger', mesh, held)  # spares minutes of compiling
    return _compile(run, mesh, held)


def compile_here(run: Run) -> Program:
    """Compiles one training step of `run` for the devices of this process. On a CPU bfloat16 takes float32's room.

    Raises:
        UserError: a number out of range, a mesh, batch or kernel that does not fit the devices, or a task without such
            a step.
        DoesNotFit: the step needs more memory than a device has.
    """
    mesh = _checked_mesh(run, jax.devices(), jax.default_backend())
    return _compile(run, mesh, state_bytes(run, mesh))


def _checked_mesh(run: Run, devices: Sequence[Any], platform: str) -> Any:
    check_ranges(run)
    mesh = make_mesh(run.mesh, devices)
    check_batch(mesh, run.train.batch_size, run.train.accumulate)
    check_attention(run, platform)
    return mesh


def _compile(run: Run, mesh: Mesh, held: dict[str, float]) -> Program:
    with jax.set_mesh(mesh):
        init, step, batch = _parts(run, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = abstract_state(init, key, mesh)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
        lowered = jit_step(step, state, mesh).lower(state, batch, key)
        parameters = sum(x.size for x in jax.tree.leaves(state['params']))
        return finish(lowered, mesh, held, parameters)


def finish(lowered: jax.stages.Lowered, mesh: Mesh, held: dict[str, float], parameters: int) -> Program:
    """Compiles a lowered program whose devices need not be there.

    Args:
        lowered: of a function jitted with shardings over `mesh`.
        mesh: of a topology's devices.
        held: bytes a device holds of each group of the arguments, for the report.
        parameters: of the model, for the report.

    Raises:
        DoesNotFit: it needs more memory than a device has.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' in str(error) or 'Ran out of memory' in str(error):
            raise DoesNotFit(str(error), mesh, held) from None
        raise
    memory = compiled.memory_analysis()
    assert memory is not None  # the TPU compiler always gives it
    return Program(
        mesh=mesh,
        text=compiled.as_text() or '',
        state_bytes=held,
        arguments=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        parameters=parameters,
        seconds=time.monotonic() - start,
    )


def state_bytes(run: Run, mesh: Any) -> dict[str, float]:
    """Bytes of each group of the state ('params', 'ema', 'opt' …) and of the 'batch' that one device holds."""
    init, _, batch = _parts(run, mesh)
    state = abstract_state(init, jax.eval_shape(lambda: jax.random.key(0)), mesh)
    return {name: shard_bytes(part) for name, part in state.items()} | {'batch': shard_bytes(batch)}


def shard_bytes(tree: Any) -> float:
    """Bytes of a device's shards."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


Parts = tuple[Callable[..., State], Callable[..., Any], Batch]


def _parts(run: Run, mesh: Any) -> Parts:
    """init, step and the shapes of a batch, as the run's `Task` has them."""
    if isinstance(run, BaseRun):
        graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[0]
        batch = _token_batch(run, mesh)
        return lambda key: base.init_state(run, key), lambda *args: base.train_step(run, graphdef, *args), batch
    if isinstance(run, SuperresRun):
        graphdef = nnx.split(nnx.eval_shape(lambda: Superres(run.model, rngs=nnx.Rngs(params=0))), nnx.Param)[0]
        low = _rows(mesh, (run.train.batch_size, run.model.low_grid[0] * run.model.low_grid[1]), jnp.int32)
        batch = {**_token_batch(run, mesh), 'low': low}
        return lambda key: superres.init_state(run, key), lambda *args: superres.train_step(run, graphdef, *args), batch
    if isinstance(run, TokenizerRun):
        nets, side = tokenizer.make_nets(run), run.data.image_size
        net = jax.eval_shape(lambda: tokenizer.load_net(run.loss, run.model, None))
        net = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), net)
        img = _rows(mesh, (run.train.batch_size, side, side, 3), jnp.uint8)
        batch = {'img': img, tokenizer.PERCEPTUAL: net}
        return lambda key: tokenizer.init_state(run, key), lambda *args: tokenizer.train_step(run, nets, *args), batch
    raise UserError(f"--aot knows the tasks base, superres and tokenizer, not '{run.task}'")


def _rows(mesh: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _token_batch(run: BaseRun | SuperresRun, mesh: Any) -> Batch:
    model, rows = run.model, run.train.batch_size
    return {
        'tok': _rows(mesh, (rows, model.grid[0] * model.grid[1]), jnp.int32),
        'txt': _rows(mesh, (rows, model.text_length, model.text_width), jnp.bfloat16),
        'len': _rows(mesh, (rows,), jnp.int32),
    }
