"""What a compiled program sends between chips: its collectives, by kind, read from its text.

A loop's body stands in the text once. How often it runs comes from the text too, where the loop counts to a constant
(layers, chunks, rings of permutes); a loop that ends by what it computes (tokens until all rows have stopped) runs as
often as the caller says. What a condition chooses between is counted on all sides, which is an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      kind: one of `KINDS`.
      payload: bytes of the whole array on a chip: what is gathered, reduced, exchanged or passed on.
      group: chips that take part together.
      times: runs of the instruction.
      overlapped: whether other work stands between its start and its end.
      where: the operation of the source it comes from; empty where the compiler made it up.
    """

    kind: str
    payload: int
    group: int
    times: int
    where: str
    overlapped: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each chip sends, over all runs, if the group is a ring."""
        share = (self.group - 1) / self.group
        rounds = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.payload * rounds * self.times


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program's text."""

    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def where(self) -> str:
        """The operation of the source it comes from; empty where the compiler made it up."""
        result = re.search(r'op_name="([^"]*)"', self.rest)
        return result[1] if result else ""

    @property
    def is_over_pages(self) -> bool:
        """Whether it is a loop over pages of keys and values, see `model.pages`."""
        return self.opcode == "while" and re.search(r"/(own|shared)_pages/while$", self.where) is not None

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        result = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return result and result[1]

    def operands(self) -> list[str]:
        """Names of the operands; they end at the bracket that closes the first."""
        depth, end = 1, len(self.rest)
        for at, char in enumerate(self.rest):
            depth += (char == "(") - (char == ")")
            if not depth:
                end = at
                break
        return re.findall(r"%([\w.-]+)", self.rest[:end])


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[str, Computations]:
    """The entry's name, and every computation's instructions. Raises ValueError where the text has no entry."""
    computations: Computations = {}
    entry: str | None = None
    name: str | None = None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            name = head[2]
            computations[head[2]] = []
            entry = name if head[1] else entry
        elif name and (result := _INSTRUCTION.match(line)):
            computations[name].append(_instruction(result[1], result[2]))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; expected a compiled program's `as_text()`")
    return entry, computations


@dataclasses.dataclass(frozen=True)
class Placed:
    """An instruction where it stands.

    Attributes:
      one: the instruction.
      there: those of its computation, by name.
      times: its runs, those of the loops in `within` aside.
      within: the loops that count to no constant in which it stands, the outermost first, by name and operation.
    """

    one: Instruction
    there: dict[str, Instruction]
    times: int
    within: tuple[str, ...]


def placed(entry: str, computations: Computations) -> Iterator[Placed]:
    """The instructions that a program runs, those in fusions aside."""

    def visit(name: str, times: int, within: tuple[str, ...]) -> Iterator[Placed]:
        there = {one.name: one for one in computations.get(name, ())}
        for one in there.values():
            yield Placed(one, there, times, within)
            if one.opcode == "while":
                count = trip_count(one, name, computations)
                inner = within if count is not None else (*within, f"{one.name} {one.where}")
                yield from visit(one.attribute("body") or "", times * (1 if count is None else count), inner)
            elif one.opcode in ("call", "conditional", "async-start"):
                for each in called(one):
                    yield from visit(each, times, within)

    yield from visit(entry, 1, ())


def _instruction(name: str, text: str) -> Instruction:
    depth = end = 0
    for end, char in enumerate(text):  # noqa: B007 - the type ends at the first space outside its brackets
        depth += (char in "([{") - (char in ")]}")
        if char == " " and not depth:
            break
    opcode, _, rest = text[end + 1 :].partition("(")
    return Instruction(name, text[:end], opcode.strip(), rest)


def type_bytes(text: str) -> int:
    """Bytes of an array's or a tuple's type, `(f32[8,4]{1,0}, s32[])`, without padding."""
    return sum(_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", text)))


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _array_bytes(dtype: str, dims: str) -> int:
    return _bits(dtype) * math.prod(_sizes(dims)) // 8


def _sizes(dims: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, dims.split(","))))


def array_shape(text: str) -> tuple[int, ...]:
    """The axes of an array's type, `f32[8,4]{1,0}`."""
    (_, dims), *_ = _ARRAY.findall(text)
    return _sizes(dims)


def group_size(rest: str, chips: int) -> int:
    """Chips that take part in a collective together, from its attributes; all of them where it names none.

    Raises:
      ValueError: groups that are written in an unknown way.
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))?\s*\{([^}]*)\}", rest)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        total = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]):
            total *= int(part) if part else sizes[axis]
        return total
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if other := re.search(r"replica_groups=(?!\{\})\S*", rest):
        raise ValueError(f"{other[0]}: a way to write groups of chips that is not known here")
    return chips


def collectives(text: str, chips: int, dynamic_trips: Sequence[int] = ()) -> list[Collective]:
    """All collectives of a compiled program.

    Args:
      text: `Compiled.as_text()`.
      chips: devices of the program.
      dynamic_trips: runs of the loops that count to no constant, in the program's order; of nested ones the innermost
        counts. A loop beyond the list runs once, and so does one over pages of keys and values (`model.pages`), in
        which nothing is sent.

    Raises:
      ValueError: see `parse`.
    """
    entry, computations = parse(text)
    trips = iter(dynamic_trips)
    result: list[Collective] = []

    def visit(name: str, times: int) -> None:
        inside = computations.get(name, [])
        for at, one in enumerate(inside):
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                result.append(_collective(one, kind, name, times, chips, _overlapped(one, inside[at + 1 :])))
            if one.opcode == "while":
                body, condition = one.attribute("body"), one.attribute("condition")
                count = trip_count(one, name, computations)
                if count is None:
                    once = one.is_over_pages or _has_dynamic(body, computations)
                    count = 1 if once else next(trips, 1)
                visit(condition or "", times * (count + 1))
                visit(body or "", times * count)
            elif one.opcode in ("fusion", "call", "async-start", "conditional"):
                for each in called(one):
                    visit(each, times)

    visit(entry, 1)
    return result


def called(one: Instruction) -> Iterator[str]:
    """Names of the computations that an instruction runs, loops aside."""
    for name in ("calls", "to_apply", "true_computation", "false_computation"):
        if there := one.attribute(name):
            yield there
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    yield from re.findall(r"%?([\w.-]+)", listed[1]) if listed else ()


def _has_dynamic(name: str | None, computations: Computations) -> bool:
    """Whether a loop that counts to no constant lies within."""
    for one in computations.get(name or "", ()):
        if one.opcode == "while":
            counted = one.is_over_pages or trip_count(one, name or "", computations) is not None
            if not counted or _has_dynamic(one.attribute("body"), computations):
                return True
        elif one.opcode in ("call", "conditional") and any(_has_dynamic(c, computations) for c in called(one)):
            return True
    return False


_WORK = ("convolution", "custom-call", "dot", "fusion", "while")


def _overlapped(one: Instruction, after: Sequence[Instruction]) -> bool:
    """Whether work of another kind stands between a collective's start and its end; the text is in order."""
    if not one.opcode.endswith("-start"):
        return False
    for other in after:
        if one.name in other.operands() and other.opcode.endswith("-done"):
            return False
        if other.opcode in _WORK:
            return True
    return False


def _collective(one: Instruction, kind: str, computation: str, times: int, chips: int, overlapped: bool) -> Collective:
    group = group_size(one.rest, chips)
    payload = type_bytes(one.type)
    if one.opcode == "all-gather-start":
        payload = payload * group // (group + 1)  # its type is (operand, result)
    elif one.opcode == "collective-permute-start":
        payload = sum(_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(one.type)[:1])
    elif one.opcode in ("reduce-scatter-start", "all-to-all-start"):
        payload = payload // 2 if kind == "all-to-all" else payload * group // (group + 1)
    elif kind == "reduce-scatter":
        payload *= group
    # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    return Collective(kind, payload, group, times, one.where, overlapped)


def trip_count(loop: Instruction, parent: str, computations: Computations) -> int | None:
    """How often a loop runs; None where it does not count to a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = {one.name: one for one in computations.get(loop.attribute("condition") or "", ())}
    body = {one.name: one for one in computations.get(loop.attribute("body") or "", ())}
    if not condition or not body:
        return None
    root = list(condition.values())[-1]
    direction = re.search(r"direction=(\w+)", root.rest)
    if root.opcode != "compare" or direction is None or direction[1] not in ("LT", "GT"):
        return None
    left, right = (condition.get(name) for name in root.operands()[:2])
    if direction[1] == "GT":
        left, right = right, left
    index, limit = _index(left), _constant(right)
    if index is None or limit is None:
        return None
    results = list(body.values())[-1].operands()
    step = _step(results[index], index, body) if index < len(results) else None
    if not step:
        return None
    start = _start(loop, index, {one.name: one for one in computations[parent]})
    return max(0, -(-(limit - start) // step))


def _index(one: Instruction | None) -> int | None:
    """The number of the loop's value that this reads."""
    result = re.search(r"index=(\d+)", one.rest) if one and one.opcode == "get-tuple-element" else None
    return int(result[1]) if result else None


def _constant(one: Instruction | None) -> int | None:
    result = re.match(r"(-?\d+)\)", one.rest) if one and one.opcode == "constant" else None
    return int(result[1]) if result else None


def _step(name: str, index: int, body: dict[str, Instruction]) -> int | None:
    """What a round adds to the value of that number; None where it is not a sum with constants."""
    total = 0
    while name in body:
        one = body[name]
        if one.opcode == "get-tuple-element":
            return total if _index(one) == index else None
        if one.opcode in ("copy", "bitcast"):
            name = one.operands()[0]
            continue
        if one.opcode != "add":
            return None
        sides = one.operands()
        values = [_constant(body.get(side)) for side in sides]
        known = next((value for value in values if value is not None), None)
        if known is None:
            return None
        total, name = total + known, sides[0 if values[0] is None else 1]
    return None


def _start(loop: Instruction, index: int, parent: dict[str, Instruction]) -> int:
    """The value that the count starts from; 0, as nearly always, where the text hides it."""
    initial = parent.get(loop.operands()[0])
    if initial is None or initial.opcode != "tuple":
        return 0
    one = parent.get(initial.operands()[index])
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = parent.get(one.operands()[0])
    return _constant(one) or 0
