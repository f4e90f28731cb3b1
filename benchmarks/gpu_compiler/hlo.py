"""Optimised HLO of a GPU, read from its text: kernels, and the bytes that they move.

A *kernel* is an instruction of the entry computation that runs something: a fusion, a call of
cuDNN or cuBLAS, a copy. (A call of cuDNN may run several, of which the text says nothing.)

Bytes are those that a kernel must move if caches keep nothing between kernels and everything
within one: what it writes, and of each operand as many elements as it needs, once. Of an operand
that a fusion reads through slices these are the elements of the slices; a slice that skips along
the axis that is contiguous in memory is charged whole sectors of 32 bytes. An operand that is read
both through slices and whole is charged once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

SECTOR = 32  # bytes that a GPU reads at a time

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([\d,]*))?")
_SLICED = re.compile(r"slice=\{([^}]*)\}")
_ESTIMATE = re.compile(r'"reification_cost":\[\{[^}]*?"exec_time_us":([\d.eE+\-]+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KIND = re.compile(r"\bkind=k(\w+)")

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
_LOOPS = {"while", "conditional"}
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclass(frozen=True)
class Array:
    """An array in memory.

    Attributes:
        itemsize: bytes of an element.
        shape: its sizes.
        minor: the axis that is contiguous, or None where there is none.
    """

    itemsize: float
    shape: tuple[int, ...]
    minor: int | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return math.ceil(self.elements * self.itemsize)


@dataclass(frozen=True)
class Instruction:
    """An instruction: what it is called and does, with what, and the arrays that it makes."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    arrays: tuple[Array, ...]
    called: str | None
    text: str = field(repr=False)
    root: bool = False

    @property
    def elements(self) -> int:
        """Number of elements of the arrays that it makes."""
        return sum(array.elements for array in self.arrays)


Computation = Mapping[str, Instruction]


@dataclass(frozen=True)
class Kernel:
    """A kernel of a program.

    Attributes:
        name: that of its instruction.
        kind: "convolution" (cuDNN), "product" (of matrices), "loop fusion", "other fusion" or
            "other".
        read, written: bytes.
        microseconds: XLA's estimate, or None where it makes none.
        of_weights: whether it computes something from weights and constants alone, so the same
            at every call.
    """

    name: str
    kind: str
    read: int
    written: int
    microseconds: float | None
    of_weights: bool


@dataclass(frozen=True)
class Program:
    """A compiled program, read.

    Attributes:
        computations: by name.
        entry: the name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str


def kernels(text: str, inputs: int) -> list[Kernel]:
    """The kernels of a compiled program, in the order in which they run.

    Args:
        text: its HLO.
        inputs: how many of its first parameters are data; the others are weights.

    Raises:
        ValueError: it is no HLO, or has loops, of which it cannot be said how often they run.
    """
    program = parse(text)
    data = {
        f"{program.entry}/{instruction.name}"
        for instruction in program.computations[program.entry].values()
        if instruction.opcode == "parameter" and _number(instruction) < inputs
    }
    return list(_kernels(program, program.entry, data))


def parse(text: str) -> Program:
    """Computations and instructions of HLO.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif name := _NAME.match(line):
            current[name[2]] = _instruction(name[2], line[name.end() :], bool(name[1]))
    if not entry:
        raise ValueError("there is no entry computation: this is no HLO")
    return Program(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    shape = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)[0]
    opcode = _OPCODE.match(rest, len(shape))
    if not opcode:
        raise ValueError(f"the instruction {name} is not understood: {rest[:60]}")
    start = opcode.end() - 1
    operands = _balanced(rest[start:])
    attributes = rest[start + len(operands) :]
    called = _CALLED.search(attributes)
    return Instruction(
        name,
        opcode[1],
        # The number of a parameter stands where others have operands.
        tuple(_OPERAND.findall(operands)),
        tuple(_arrays(shape)),
        called[1] if called else None,
        operands + attributes,
        root,
    )


def _balanced(text: str) -> str:
    """The beginning of a text, up to the parenthesis that closes the one that it begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: i + 1]
    raise ValueError(f"a parenthesis is not closed: {text[:60]}")


def _arrays(shape: str) -> Iterator[Array]:
    for letters, bits, sizes, layout in _ARRAY.findall(shape):
        itemsize = 1.0 if letters == "pred" else int(bits or 0) / 8
        minor = int(layout.split(",")[0]) if layout else None
        yield Array(itemsize, tuple(int(size) for size in sizes.split(",") if size), minor)


def _number(parameter: Instruction) -> int:
    return int(re.match(r"\((\d+)\)", parameter.text)[1])  # type: ignore[index]


# --------------------------------------------------------------------------------- kernels


def _kernels(program: Program, name: str, data: set[str]) -> Iterator[Kernel]:
    """Kernels of a computation; what depends on data is added to it."""
    computation = program.computations[name]
    for instruction in computation.values():
        if instruction.opcode in _LOOPS:
            raise ValueError(f"there is a {instruction.opcode}, which runs nobody knows how often")
        depends = any(f"{name}/{operand}" in data for operand in instruction.operands)
        if depends:
            data.add(f"{name}/{instruction.name}")
        if instruction.opcode == "call":
            assert instruction.called
            inner = program.computations[instruction.called].values()
            for parameter in inner:
                if parameter.opcode == "parameter":
                    given = instruction.operands[_number(parameter)]
                    if f"{name}/{given}" in data:
                        data.add(f"{instruction.called}/{parameter.name}")
            yield from _kernels(program, instruction.called, data)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            yield _kernel(program, computation, instruction, of_weights=not depends)


def _kernel(
    program: Program, computation: Computation, instruction: Instruction, of_weights: bool
) -> Kernel:
    estimate = _ESTIMATE.search(instruction.text)
    fused = program.computations[instruction.called] if _is_fusion(instruction) else None
    return Kernel(
        instruction.name,
        _kind(instruction, fused),
        sum(_read(computation, instruction, fused)),
        sum(array.bytes for array in instruction.arrays),
        float(estimate[1]) if estimate else None,
        of_weights,
    )


def _is_fusion(instruction: Instruction) -> bool:
    return instruction.opcode == "fusion" and instruction.called is not None


def _kind(instruction: Instruction, fused: Computation | None) -> str:
    target = _TARGET.search(instruction.text)
    library = target[1] if target else ""
    inside = {one.opcode for one in fused.values()} if fused else {instruction.opcode}
    if "conv" in library or "convolution" in inside:
        return "convolution"
    if "gemm" in library or "cublas" in library or "dot" in inside:
        return "product"
    if fused is None:
        return "other"
    kind = _KIND.search(instruction.text)
    return "loop fusion" if kind and kind[1] == "Loop" else "other fusion"


def _read(
    computation: Computation, instruction: Instruction, fused: Computation | None
) -> Iterator[int]:
    """Bytes read of each operand."""
    parts = _parts_read(fused) if fused else [1.0] * len(instruction.operands)
    seen: dict[str, float] = {}
    for operand, part in zip(instruction.operands, parts, strict=True):
        seen[operand] = max(part, seen.get(operand, 0.0))
    for operand, part in seen.items():
        size = sum(array.bytes for array in computation[operand].arrays)
        yield math.ceil(part * size)


def _parts_read(fused: Computation) -> list[float]:
    """For each parameter of a fused computation, the part of its elements that is needed."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in fused.values():
        for operand in dict.fromkeys(instruction.operands):
            users[operand].append(instruction)
    needed: dict[str, float] = {}
    # Users stand behind what they use.
    for instruction in reversed(fused.values()):
        whole = [1.0] if instruction.root else []
        sliced = []
        for user in users[instruction.name]:
            if user.opcode in _SLICES and user.operands[0] == instruction.name:
                sliced.append(needed[user.name] * _sliced_part(user, instruction))
            else:
                whole.append(_passed_on(user, instruction, needed[user.name]))
        needed[instruction.name] = min(1.0, max(whole, default=0.0) + sum(sliced))
    parameters = (one for one in fused.values() if one.opcode == "parameter")
    return [needed[one.name] for one in sorted(parameters, key=_number)]


def _passed_on(user: Instruction, operand: Instruction, needed: float) -> float:
    """The part of an operand that is needed for a part of what is made of it."""
    if user.opcode == "broadcast":
        # An element of a vector is needed by many; any part may need all of them.
        return min(1.0, needed * user.elements / max(1, operand.elements))
    return needed


def _sliced_part(user: Instruction, operand: Instruction) -> float:
    """The part of an operand that a slice of it reads."""
    array = operand.arrays[0]
    part = user.elements / max(1, array.elements)
    steps = _steps(user)
    if steps and array.minor is not None and steps[array.minor] > 1:
        part *= min(steps[array.minor], max(1.0, SECTOR / array.itemsize))
    return min(1.0, part)


def _steps(user: Instruction) -> Sequence[int]:
    """The stride of a slice along each axis; none where it is not a plain slice."""
    found = _SLICED.search(user.text)
    if user.opcode != "slice" or not found:
        return []
    ranges = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", found[1])
    return [int(step or 1) for _, _, step in ranges]
