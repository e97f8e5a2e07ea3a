"""Bytes that a compiled program moves to and from memory, instruction by instruction, read from its text.

The compiler's own count sees a loop's body once, and a program is mostly loops. Here every instruction is counted as
the compiler counts it, operands read and result written, and as often as its loops run. Of an array from which a slice
is taken the slice counts, also within a fusion; of one that is updated in place the update. Arrays that the text places
in the chip's own memory (`S(1)`) count nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence

from qwenla_jax.planner.hlo import Computations, Instruction, parse, placed, type_bytes

_FREE = frozenset(
    (
        "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "opt-barrier", "parameter",
        "partition-id", "replica-id", "tuple", "while",
    )
)  # fmt: skip
_SLICES = frozenset(("dynamic-slice", "gather", "slice"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which of their operands is the update
_ARRAYS = re.compile(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one instruction moves.

    Attributes:
      read, written: bytes of one run.
      times: runs, those of the loops in `within` aside.
      within: the loops that count to no constant in which it stands, the outermost first, by name and operation.
    """

    read: int
    written: int
    times: int
    within: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Read and written, over all runs."""
        return (self.read + self.written) * self.times


def memory_traffic(text: str) -> list[Moved]:
    """What each instruction of a compiled program moves.

    Args:
      text: `Compiled.as_text()`.

    Raises:
      ValueError: see `hlo.parse`.
    """
    entry, computations = parse(text)
    result: list[Moved] = []
    for at in placed(entry, computations):
        if at.one.opcode in _FREE or at.one.opcode.endswith(("-done", "-update")) or at.one.opcode == "async-start":
            continue
        read, written = _moved(at.one, at.there, computations)
        if read or written:
            result.append(Moved(read, written, at.times, at.within))
    return result


def token_bytes(moved: Sequence[Moved], own_pages: int, shared_pages: int) -> float:
    """Bytes that a sampler's program moves for a token, on average over a response.

    Its outermost loop that counts to no constant, the one with most bytes, has a round a token. Loops within it are of
    pages of keys and values, named in `model.pages`: of a row's own pages half are filled on average, all that are
    begun are read.

    Args:
      moved: of the program.
      own_pages, shared_pages: of a row of the cache and of a prompt, filled at the end.

    Raises:
      ValueError: there is no such loop.
    """
    loops = collections.Counter[str]()
    for one in moved:
        loops.update({one.within[0]: one.bytes} if one.within else {})
    if not loops:
        raise ValueError("the program has no loop over tokens; expected that of a sampler")
    (name, _), *_ = loops.most_common(1)
    total = 0.0
    for one in (one for one in moved if one.within[:1] == (name,)):
        rounds = 1.0
        if len(one.within) > 1:
            rounds = (own_pages + 1) / 2 if "own_pages" in one.within[-1] else shared_pages
        total += one.bytes * rounds
    return total


def _in_memory(type_: str) -> int:
    """Bytes of a type without what lies in the chip's own memory."""
    return sum(type_bytes(array) for array in _ARRAYS.findall(type_) if not re.search(r"S\([1-9]", array))


def _moved(one: Instruction, there: dict[str, Instruction], computations: Computations) -> tuple[int, int]:
    operands = [there[name] for name in one.operands() if name in there]
    if one.opcode == "fusion":
        return _fusion(one, operands, computations)
    if one.opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in one.rest:
        return 0, 0
    if one.opcode == "slice-start":  # its type is ((operand), result, context)
        operand, result = _ARRAYS.findall(one.type)[:2]
        return type_bytes(result) if _in_memory(operand) else 0, _in_memory(result)
    if one.opcode == "copy-start":  # its type is (result, operand, context)
        result, operand = _ARRAYS.findall(one.type)[:2]
        return _in_memory(operand), _in_memory(result)
    sizes = [_in_memory(operand.type) for operand in operands]
    if one.opcode in _SLICES:
        size = type_bytes(one.type)
        rest = sum(sizes[1:])
        return (min(size, sizes[0]) if sizes else 0) + rest, _in_memory(one.type)
    if one.opcode in _UPDATES:
        update = operands[_UPDATES[one.opcode]]
        return sum(sizes[1:]), type_bytes(update.type) if sizes[0] else 0
    return sum(sizes), _in_memory(one.type)


def _fusion(one: Instruction, operands: Sequence[Instruction], computations: Computations) -> tuple[int, int]:
    """A fusion reads of an operand what it slices out, and writes of a result what it updates."""
    name = one.attribute("calls") or ""
    parameters, read = _parameters(name, computations), 0
    for number, operand in enumerate(operands):
        whole = _in_memory(operand.type)
        used = _used(parameters[number], name, computations) if whole else 0
        read += whole if used is None else min(whole, used)
    updates = dict(_updated(computations.get(name, [])))
    sizes = map(_in_memory, _ARRAYS.findall(one.type))
    return read, sum(min(size, updates.get(number, size)) for number, size in enumerate(sizes))


def _parameters(name: str, computations: Computations) -> dict[int, str]:
    """Names of a fused computation's parameters by their number."""
    inside = computations.get(name, ())
    return {int(one.rest.partition(")")[0]): one.name for one in inside if one.opcode == "parameter"}


def _used(parameter: str, name: str, computations: Computations) -> int | None:
    """Bytes that a fused computation reads of a parameter; None where it reads all."""
    total, wanted = 0, {parameter}
    inside = computations.get(name, [])
    for one in inside:
        names = one.operands()
        if not wanted & set(names):
            continue
        if one is inside[-1] and one.opcode not in (*_SLICES, *_UPDATES, "fusion"):
            return None
        if one.opcode == "bitcast":
            wanted.add(one.name)
        elif one.opcode in _SLICES and names[0] in wanted and not wanted & set(names[1:]):
            total += type_bytes(one.type)
        elif one.opcode in _UPDATES and names[0] in wanted and not wanted & set(names[1:]):
            wanted.add(one.name)  # in place: what it holds besides is not read
        elif one.opcode == "fusion":
            inner = one.attribute("calls") or ""
            parameters = _parameters(inner, computations)
            for number, operand in enumerate(names):
                if operand in wanted:
                    part = _used(parameters[number], inner, computations)
                    if part is None:
                        return None
                    total += part
        elif one.opcode == "tuple":
            continue
        else:
            return None
    return total


def _updated(inner: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """Numbers of a fusion's results that are updates in place, with the bytes of the update."""
    there = {one.name: one for one in inner}
    if not inner:
        return
    root = inner[-1]
    for number, name in enumerate(root.operands() if root.opcode == "tuple" else [root.name]):
        one = there.get(name)
        while one is not None and one.opcode == "bitcast":
            one = there.get(one.operands()[0])
        if one is not None and one.opcode in _UPDATES:
            yield number, type_bytes(there[one.operands()[_UPDATES[one.opcode]]].type)
