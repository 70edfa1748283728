"""What one step costs one device, counted on the optimised program: operations, HBM traffic, traffic between chips.

XLA's own `cost_analysis` takes the body of a scan once and a Pallas kernel not at all. Here the body of a loop counts
as often as it runs, and the kernels of splash attention by their formula. Operations are those of matrix products
(2·m·n·k), which is what a peak is stated for; elementwise work shows as HBM traffic.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from muse.aot.hlo import Computation, Instruction, Module, trip_count

_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id', 'replica-id', 'after-all'}
_FREE |= {'copy-done', 'slice-done', 'async-done', 'async-update', 'opt-barrier', 'iota', 'domain', 'rng-bit-generator'}
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
BETWEEN_SLICES = 'between slices'  # what the compiler makes of a sum over several slices, beside one within each
# Matrix products of [T, H] by [S, H] that each splash kernel makes for a head: q·k and p·v; and in the backward pass
# q·k, dp, ds·k for dq, and q·k, dp, dv, ds·q for dk and dv.
_KERNEL_PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4}


@dataclass(frozen=True)
class Collective:
    """Traffic of one kind over one group of devices: bytes that each device sends in a step."""

    kind: str
    group: tuple[int, ...]  # positions in the flattened mesh; one group of those that run at once


@dataclass
class Totals:
    """Counts for one device and one step."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # how often each Pallas kernel runs
    kernel_flops: float = 0.0  # those of the kernels, also part of `flops`
    unknown: Counter[str] = field(default_factory=Counter)  # what could not be counted


def count(module: Module, devices: int) -> Totals:
    """Counts a program of `devices` devices, as one of them runs it."""
    totals = Totals()
    _walk(module, module.computations[module.entry], 1, devices, totals, in_fusion=False)
    return totals


def _walk(module: Module, where: Computation, times: int, devices: int, totals: Totals, *, in_fusion: bool) -> None:
    for instruction in where.instructions.values():
        opcode = instruction.opcode
        if opcode == 'while':
            trips = trip_count(module, where, instruction)
            if trips is None:
                totals.unknown['loops counted once'] += 1
            body = module.computations[instruction.called('body')[0]]
            _walk(module, body, times * (1 if trips is None else trips), devices, totals, in_fusion=in_fusion)
            continue
        if opcode in ('fusion', 'call', 'async-start'):
            for name in instruction.called('calls', 'to_apply'):
                inner = module.computations[name]
                fused = in_fusion or opcode == 'fusion'
                _walk(module, inner, times, devices, totals, in_fusion=fused)
            if opcode == 'fusion' and not in_fusion:
                totals.hbm_bytes += times * _fusion_bytes(module, where, instruction)
            continue
        if opcode == 'conditional':
            _walk_dearest(module, instruction, times, devices, totals, in_fusion=in_fusion)
            continue
        kind = opcode.removesuffix('-start')
        if opcode == 'send' and 'xla_megascale_runtime' in instruction.attributes:
            sent = times * where.instructions[instruction.operands[0]].shapes[0].bytes
            totals.collectives[Collective(BETWEEN_SLICES, ())] += sent  # pyright: ignore[reportArgumentType]
        if kind in _COLLECTIVES:
            _add_collective(where, instruction, kind, times, devices, totals)
        flops = _flops(where, instruction, totals, times)
        totals.flops += times * flops
        if not in_fusion:
            totals.hbm_bytes += times * _bytes(where, instruction)


def _walk_dearest(module: Module, branch: Instruction, times: int, devices: int, totals: Totals, **how: bool) -> None:
    """Of the branches of a conditional the one with the most operations and bytes counts."""
    names = branch.called('branch_computations', 'true_computation', 'false_computation')
    trials = []
    for name in names:
        trial = Totals()
        _walk(module, module.computations[name], times, devices, trial, **how)
        trials.append(trial)
    dearest = max(trials, key=lambda trial: (trial.flops, trial.hbm_bytes))
    totals.flops += dearest.flops
    totals.hbm_bytes += dearest.hbm_bytes
    totals.kernel_flops += dearest.kernel_flops
    for name in ('collectives', 'kernels', 'unknown'):
        getattr(totals, name).update(getattr(dearest, name))


# Operations


def _flops(where: Computation, instruction: Instruction, totals: Totals, times: int) -> float:
    if instruction.opcode == 'dot':
        lhs = where.instructions[instruction.operands[0]].shapes[0].dims
        axes = (instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or '').split(',')
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(lhs[int(axis)] for axis in axes if axis)
    if instruction.opcode == 'convolution':
        return _convolution_flops(where, instruction)
    if instruction.opcode == 'custom-call' and 'custom_call_target="tpu_custom_call"' in instruction.attributes:
        flops = _kernel_flops(where, instruction, totals)
        totals.kernels[_kernel_name(instruction)] += times
        totals.kernel_flops += times * flops
        return flops
    return 0.0


def _kernel_name(instruction: Instruction) -> str:
    return re.sub(r'[.\d]+$', '', instruction.name)


def _kernel_flops(where: Computation, instruction: Instruction, totals: Totals) -> float:
    """Splash kernels take [B, N, T, H] queries and then keys [B, N, S, H] among their operands; no B where it is 1."""
    kind = re.match(r'splash_mha_(fwd|dq|dkv)', instruction.name)
    shapes = [shape for name in instruction.operands for shape in where.instructions[name].shapes]
    floats = [shape.dims for shape in shapes if shape.dtype in ('bf16', 'f32')]
    arrays = [dims for dims in floats if len(dims) == len(floats[0]) and len(dims) in (3, 4)]
    if kind is None or len(arrays) < 2:
        totals.unknown[f'operations of the kernel {_kernel_name(instruction)}'] += 1
        return 0.0
    queries, s = arrays[0], arrays[1][-2]
    return _KERNEL_PRODUCTS[kind.group(1)] * 2.0 * math.prod(queries) * s


def _convolution_flops(where: Computation, instruction: Instruction) -> float:
    """Two for each product of an input that is there (not padding, not a hole of dilation) and a weight.

    The TPU compiler writes every matrix product as a convolution, batches of them as dilated spatial dimensions.
    """
    lhs, rhs = (where.instructions[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    labels = instruction.attribute(r'dim_labels=([\w>\-]+)') or ''
    lhs_labels, rhs_labels, out_labels = re.split(r'_|->', labels)
    products = out[out_labels.index('b')] * out[out_labels.index('f')] * rhs[rhs_labels.index('i')]
    window = _window(instruction)
    for i in range(len(lhs) - 2):
        size, spatial = lhs[lhs_labels.index(str(i))], str(i)
        products *= _valid(size, rhs[rhs_labels.index(spatial)], out[out_labels.index(spatial)], *window(i))
    return 2.0 * products


def _window(instruction: Instruction):
    text = instruction.attribute(r'window=\{([^}]*)\}') or ''
    fields = {key: value.split('x') for key, value in re.findall(r'(\w+)=([\d_x\-]+)', text)}

    def of(i: int) -> tuple[int, int, int, int]:
        def number(key: str) -> int:
            return int(fields[key][i]) if key in fields else 1

        low = int(fields['pad'][i].split('_')[0]) if 'pad' in fields else 0
        return number('stride'), low, number('lhs_dilate'), number('rhs_dilate')

    return of


@cache
def _valid(size: int, window: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output position and a window position that meet an input, along one dimension."""
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * rhs_dilate - low
    return int(np.sum((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < size)))


# HBM traffic


def _bytes(where: Computation, instruction: Instruction) -> float:
    """Operands read from and results written to HBM by an instruction that stands for itself."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith('-done'):
        return 0.0
    if opcode == 'custom-call' and 'tpu_custom_call' not in instruction.attributes:
        return 0.0  # annotations and allocations
    operands = [where.instructions[name].shapes for name in instruction.operands if name in where.instructions]
    read = sum(shape.hbm_bytes for shapes in operands for shape in shapes)
    written = sum(shape.hbm_bytes for shape in instruction.shapes)
    if opcode in ('copy-start', 'slice-start'):  # (destination, source, …)
        moved = instruction.shapes[0].bytes if opcode == 'copy-start' else min(s.bytes for s in instruction.shapes[:2])
        source, target = operands[0][0], instruction.shapes[0 if opcode == 'copy-start' else 1]
        return moved * ((source.space == 0) + (target.space == 0))
    if opcode.removesuffix('-start') in _COLLECTIVES and opcode.endswith('-start'):
        return read + sum(shape.hbm_bytes for shape in instruction.shapes[len(operands) : 2 * len(operands)])
    if opcode in ('dynamic-slice', 'slice', 'gather'):
        return min(read, written) + written
    if opcode == 'dynamic-update-slice':
        return 2 * operands[1][0].hbm_bytes
    return read + written


def _fusion_bytes(module: Module, where: Computation, fusion: Instruction) -> float:
    """Traffic at the border of a fusion: slices count as what they take, updates as what they put, and an array that
    is only handed through counts as nothing."""
    inner = module.computations[fusion.called('calls')[0]]
    parameters = inner.parameters()
    total = 0.0
    for i, name in enumerate(fusion.operands):
        shapes = where.instructions[name].shapes
        if sum(shape.hbm_bytes for shape in shapes):
            total += min(_read(module, inner, parameters[i].name), sum(shape.hbm_bytes for shape in shapes))
    return total + _written(inner, fusion)


def _read(module: Module, inner: Computation, name: str) -> float:
    """Bytes of `name` that the computation reads: nothing when it is only handed on, a slice when it is only sliced."""
    whole = sum(shape.bytes for shape in inner.instructions[name].shapes)
    total = 0.0
    for user in inner.users(name):
        if user.opcode == 'tuple' or _continues(user):
            continue
        if user.opcode in ('bitcast', 'get-tuple-element', 'reshape'):
            total += _read(module, inner, user.name)
        elif user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == name:
            total += user.shapes[0].bytes
        elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
            continue
        elif user.opcode == 'fusion':
            called = module.computations[user.called('calls')[0]]
            for i, operand in enumerate(user.operands):
                total += _read(module, called, called.parameters()[i].name) if operand == name else 0.0
        else:
            return whole
    return min(total, whole)


def _written(inner: Computation, fusion: Instruction) -> float:
    root = inner.instructions[inner.root]
    values = root.operands if root.opcode == 'tuple' else (root.name,)
    if len(values) != len(fusion.shapes):
        return sum(shape.hbm_bytes for shape in fusion.shapes)
    total = 0.0
    for shape, name in zip(fusion.shapes, values, strict=True):
        value = inner.instructions[name]
        while value.opcode in ('bitcast', 'reshape'):
            value = inner.instructions[value.operands[0]]
        if value.opcode == 'parameter' or _continues(value):
            continue
        if value.opcode == 'dynamic-update-slice' and shape.space == 0:
            total += inner.instructions[value.operands[1]].shapes[0].bytes
        else:
            total += shape.hbm_bytes
    return total


# Traffic between chips


def _continues(instruction: Instruction) -> bool:
    """An asynchronous collective stands once where it starts and again in each fusion that moves it on."""
    flag = instruction.attribute(r'"flag_start":"(-?\d+)"')
    return instruction.opcode in _COLLECTIVES and flag is not None and flag != '-1'


def _add_collective(
    where: Computation, instruction: Instruction, kind: str, times: int, devices: int, totals: Totals
) -> None:
    if _continues(instruction):
        return
    operands = [where.instructions[name].shapes for name in instruction.operands if name in where.instructions]
    size = sum(shape.bytes for shapes in operands for shape in shapes)
    if kind == 'collective-permute':
        pairs = re.findall(r'\{(\d+),(\d+)\}', instruction.attribute(r'source_target_pairs=\{(.*?\})\}') or '')
        group = next(((int(a), int(b)) for a, b in pairs if a != b), ())
        sent = size if group else 0.0
    else:
        group = first_group(instruction.attributes, devices)
        if group is None:
            totals.unknown['groups of collectives, taken as all devices'] += 1
            group = tuple(range(devices))
        n = max(len(group), 1)
        if kind == 'all-reduce' and 'all-reduce-scatter' in where.name:
            kind = 'reduce-scatter'  # the compiler fuses the sum with the slice that each device keeps
        factor = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n}.get(kind, (n - 1) / n)
        sent = size * factor
    if sent:
        totals.collectives[Collective(kind, group)] += times * sent  # pyright: ignore[reportArgumentType]


def first_group(attributes: str, devices: int) -> tuple[int, ...] | None:
    """The first of the groups of a collective, in any of XLA's spellings; None for one that is not known."""
    text = attributes.partition('replica_groups=')[2]
    if text.startswith('{}'):
        return tuple(range(devices))
    if found := re.match(r'\{\{([\d,]+)\}', text):
        return tuple(int(device) for device in found.group(1).split(','))
    if found := re.match(r'\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text):
        ids = _iota(found.group(2), devices)
        sizes = [int(n) for n in found.group(1).split(',')]
        return None if ids is None else tuple(int(device) for device in ids.reshape(sizes)[0])
    if found := re.match(r'mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}', text):
        return _mesh_group(found.group(1), found.group(2), found.group(3), devices)
    return None


def _iota(order: str, devices: int) -> np.ndarray | None:
    """Device numbers `[4,2]T(1,0)` (0, 1, … in that shape, transposed) or as a list."""
    if found := re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', order):
        sizes, swaps = ([int(n) for n in part.split(',')] if part else None for part in found.groups())
        ids = np.arange(devices).reshape(sizes)
        return ids.transpose(swaps) if swaps else ids
    return np.array([int(n) for n in order.split(',')]) if re.fullmatch(r'[\d,]+', order) else None


def _mesh_group(axes: str, order: str | None, chosen: str, devices: int) -> tuple[int, ...] | None:
    """Devices that differ along the chosen axes of a mesh `'a'=2,'b'=4`; an axis may be part of one: `'b':(1)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(devices) if order is None else _iota(order, devices)
    if ids is None or ids.size != devices or math.prod(sizes.values()) != devices:
        return None
    ids, index = ids.reshape(tuple(sizes.values())), []
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)}
    for name, size in sizes.items():
        if name not in parts:
            index.append(np.array([0]))
        elif parts[name][0]:
            before, count = (int(n) for n in parts[name])
            index.append(np.arange(count) * (size // before // count))
        else:
            index.append(np.arange(size))
    return tuple(int(device) for device in ids[np.ix_(*index)].reshape(-1))
