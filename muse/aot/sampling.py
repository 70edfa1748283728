"""`sample.py --aot`: the very program that draws a batch, compiled for the TPUs of one host that need not be there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from muse import canvas as canvases
from muse import drawing
from muse import settings as knobs
from muse.aot.chips import Topology, describe, use_no_accelerator
from muse.aot.compile import DoesNotFit, Program, finish, shard_bytes
from muse.aot.nets import describe_runs
from muse.aot.report import Cost, cost, cost_lines, list_bytes
from muse.canvas import Canvas
from muse.config import DecodeConfig
from muse.errors import UserError
from muse.jobs import command_line
from muse.mesh import AXES
from muse.nn.layers import cast_matrices
from muse.release.format import Part, Release, describe_release, graphdef_and_template, shipped
from muse.train.flops import base_draw_flops, decoder_flops, superres_draw_flops


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is drawn: `superres` is None where the base alone draws."""

    release: Release
    canvas: Canvas
    batch_size: int
    decoding: DecodeConfig
    superres: DecodeConfig | None


def check_flags(
    name: str, configs: Sequence[str], model: str | None, *, size: tuple[int, int] | None, batch_size: int
) -> int:
    """`check` of what the flags of sample.py ask for; `configs` are files of trainings, else `model` is a release."""
    use_no_accelerator()
    release = describe_runs(configs) if configs else describe_release(model or shipped())
    draft = canvases.draft(
        release, size, command_line.decoding(release.decode), command_line.superres(release.superres_decode)
    )
    knobs.count('batch_size', batch_size, 1)
    plan = Plan(
        release=release,
        canvas=draft.canvas,
        batch_size=batch_size,
        decoding=draft.base,
        superres=draft.superres,
    )
    return check(plan, name)


def check(plan: Plan, name: str) -> int:
    """Prints what drawing one batch takes on the topology `name`; 0 if it fits, else 1 with advice.

    Raises:
        UserError: a topology that is not known, of several hosts, or whose devices do not divide the batch; no TPU
            compiler.
    """
    topology = describe(name)
    hosts = {device.process_index for device in topology.devices}
    if len(hosts) > 1:
        small = '2x2x1' if len(topology.sizes) == 3 else '2x2'
        raise UserError(
            f"'{name}' has {len(hosts)} hosts, and each draws alone: give one, {name.split(':')[0]}:{small}"
        )
    if plan.batch_size % len(topology.devices):
        raise UserError(f'--batch_size={plan.batch_size} is no multiple of {len(topology.devices)} devices')
    guided = f', guided at {plan.decoding.guidance_scale:g}' if plan.decoding.guidance_scale else ''
    steps = f'{plan.decoding.steps}' + (f' + {plan.superres.steps}' if plan.superres else '')
    (width, height), devices = plan.canvas.size, len(topology.devices)
    where = f'{name}: {topology.chips} chips, {devices} devices'
    print(f'{width}×{height} on {where}; batch {plan.batch_size}, {steps} steps{guided}')
    try:
        found = cost(compile_drawing(plan, topology), topology)
    except DoesNotFit as error:
        print(f'does not fit: a device needs {error.needed} of memory, of which {list_bytes(error.state_bytes)}')
        print(_advice(plan, topology))
        return 1
    print('\n'.join([*cost_lines(found), *_speed(plan, found)]))
    if not found.fits:
        print(_advice(plan, topology))
        return 1
    return 0


def compile_drawing(plan: Plan, topology: Topology) -> Program:
    """Compiles text states → pixels of one batch: weights whole on each device, rows split over them."""
    mesh = Mesh(np.array(topology.devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    release, canvas = plan.release, plan.canvas
    with jax.set_mesh(mesh):
        base = _net('base', release.base, mesh)
        low = _inputs(plan.decoding, release.base, math.prod(canvas.low), plan.batch_size, mesh)
        if plan.superres is None or canvas.high is None:
            nets = {'base': base, 'tokenizer': _net('tokenizer', release.tokenizer, mesh)}
            graphs, params = zip(*nets.values(), strict=True)
            lowered = drawing.paint_base.lower(
                params, *low, graphs=graphs, grid=canvas.low, program=drawing.program_of(plan.decoding)
            )
            return finish(lowered, mesh, *_held(nets))
        assert release.superres is not None and release.superres_tokenizer is not None
        nets = {
            'base': base,
            'superres': _net('superres', release.superres, mesh),
            'superres_tokenizer': _net('superres_tokenizer', release.superres_tokenizer, mesh),
        }
        graphs, params = zip(*nets.values(), strict=True)
        high = _inputs(plan.superres, release.superres, math.prod(canvas.high), plan.batch_size, mesh)
        lowered = drawing.paint_cascade.lower(
            params,
            low,
            high,
            graphs=graphs,
            grids=(canvas.low, canvas.high),
            programs=(drawing.program_of(plan.decoding), drawing.program_of(plan.superres)),
        )
        return finish(lowered, mesh, *_held(nets))


def _net(name: str, part: Part, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """As `muse.cascade` holds a part on accelerators: the chip's own attention, weights in the type of their use."""
    config = part.config
    if name in ('base', 'superres'):
        config = replace(config, attention='auto')
    graph, shapes = graphdef_and_template(name, config)
    if name in ('base', 'superres'):
        shapes = jax.eval_shape(lambda x: cast_matrices(x, config.dtype), shapes)
    whole = NamedSharding(mesh, P())
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


def _inputs(config: DecodeConfig, part: Part, tokens: int, rows: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Canvas, known tokens and batch as shapes; no row has a negative prompt."""

    def split(shape: tuple[int, ...], dtype: Any, axis: int = 0) -> Any:
        spec = P(*[None] * axis, 'data')
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    net = part.config
    branches = 2 if config.guidance_scale else 1
    txt = split((1, rows, net.text_length, net.text_width), jnp.float32, axis=1)
    lengths, zeros = np.zeros((branches, rows), np.int32), np.zeros(rows, np.int32)
    batch = drawing.batch_of(config, txt, lengths, zeros.astype(np.uint32), zeros)
    return split((rows, tokens), jnp.int32), split((rows, tokens), jnp.bool_), batch


def _held(nets: dict[str, tuple[nnx.GraphDef, nnx.State]]) -> tuple[dict[str, float], int]:
    """Bytes of a device by net, and parameters in all."""
    shapes = {name: params for name, (_, params) in nets.items()}
    return {name: shard_bytes(part) for name, part in shapes.items()}, sum(x.size for x in jax.tree.leaves(shapes))


def drawing_flops(plan: Plan) -> float:
    """Operations of one batch (`muse.train.flops`)."""
    release, canvas, batch = plan.release, plan.canvas, plan.batch_size
    base, pixels = replace(release.base.config, grid=canvas.low), batch * math.prod(canvas.size)
    total = base_draw_flops(base, batch, plan.decoding.steps)
    if plan.superres is None or canvas.high is None or release.superres is None or release.superres_tokenizer is None:
        return total + decoder_flops(release.tokenizer.config, pixels)
    # A canvas beyond the trained one is drawn through windows of it; what they share is counted once.
    config, pictures = release.superres.config, batch * math.prod(canvas.high) / math.prod(release.superres.config.grid)
    return (
        total
        + superres_draw_flops(config, 1, plan.superres.steps) * pictures
        + decoder_flops(release.superres_tokenizer.config, pixels)
    )


def _speed(plan: Plan, found: Cost) -> list[str]:
    times, batch, chip = found.roofline, plan.batch_size, found.topology.chip
    share = drawing_flops(plan) / (found.topology.chips * chip.flops * times.least)
    return [
        f'{1e3 * times.least / batch:.3g} ms a picture at best, {1e3 * times.most / batch:.3g} with no overlap; '
        f'model FLOPs {100 * share:.0f} % of the peak'
    ]


def _advice(plan: Plan, topology: Topology) -> str:
    tips = []
    if plan.batch_size > len(topology.devices):
        tips.append(f'a smaller --batch_size ({max(len(topology.devices), plan.batch_size // 2)})')
    tips.append('a chip with more memory (v5p, 7x)')
    return f'try: {"; ".join(tips)}'
