"""Reads the text of an optimised HLO module: what XLA runs on one device, after it split the program over the mesh."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}
_SHAPE = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_LINE = re.compile(r'\s*(ROOT )?%?([\w.\-]+) = (.*)')
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_CALLED = re.compile(
    r'(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)  # noqa: E501


@dataclass(frozen=True)
class Shape:
    """One array. `space` is its memory: 0 is HBM, others lie on the chip or hold scalars and semaphores."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(re.sub(r'^\D+(\d+).*', r'\1', self.dtype))
        return math.prod(self.dims) * (bits or 0) / 8

    @property
    def hbm_bytes(self) -> float:
        return self.bytes if self.space == 0 else 0.0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the leaves of its value: one, unless it is a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses: a constant's value, a parameter's number
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Names of the computations it calls as `keys` ('calls', 'body' …)."""
        found = [value for key, value in _CALLED.findall(self.attributes) if key in keys]
        return [name for value in found for name in re.findall(r'[\w.\-]+', value)]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclass
class Computation:
    """Instructions in order; the last one marked ROOT is the value."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ''

    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == 'parameter'}

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions.values() if name in i.operands]


@dataclass
class Module:
    """All computations by name."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text` returns."""
    computations: dict[str, Computation] = {}
    entry, current = '', None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and ' -> ' in line:
                current = Computation(header.group(2))
                computations[current.name] = current
                entry = current.name if header.group(1) else entry
        elif line.rstrip() == '}':  # the metadata of a kernel has lines of its own, which begin with '}}'
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found.group(2), found.group(3))
            current.instructions[instruction.name] = instruction
            if found.group(1):
                current.root = instruction.name
    return Module(computations, entry)


def _close(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if depth == 0:
            return i
    return len(text)


def _instruction(name: str, rest: str) -> Instruction:
    end = _close(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    closing = _close(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        shapes=tuple(_shape(*found) for found in _SHAPE.findall(kind)),
        operands=tuple(re.findall(r'%([\w.\-]+)', inside)),
        literal=inside,
        attributes=rest[closing + 1 :],
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(size) for size in dims.replace('<=', '').split(',') if size)
    return Shape(dtype, sizes, int(space.group(1)) if space else 0)


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs: as XLA notes it, or from a condition `i < constant`; None where neither is there."""
    noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if noted:
        return int(noted)
    condition = module.computations[loop.called('condition')[0]]
    compare = condition.instructions[condition.root]
    if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
        return None
    counter, limit = (condition.instructions[name] for name in compare.operands)
    if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
        return None
    initial = caller.instructions[loop.operands[0]]
    start = '0'
    if initial.opcode == 'tuple':
        element = caller.instructions[initial.operands[int(counter.attribute(r'index=(\d+)') or 0)]]
        while element.opcode in ('copy', 'bitcast'):
            element = caller.instructions[element.operands[0]]
        start = element.literal if element.opcode == 'constant' else start
    return int(limit.literal) - int(start)
