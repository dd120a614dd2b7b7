"""Reads optimized HLO text (`compiled.as_text()`): computations, instructions, shapes, and the trip counts of loops."""

import dataclasses
import math
import re
from collections.abc import Iterator

SIZES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses, for constants and parameters
    attributes: str
    root: bool


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif match := _LINE.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _logical_lines(text: str) -> Iterator[str]:
    """Put lines together again that a kernel's metadata broke into several."""
    waiting = ""
    for line in text.splitlines():
        if waiting and (line == "}" or line.startswith((" ", "%", "ENTRY"))):
            yield waiting
            waiting = ""
        waiting += line if waiting else line.rstrip()
        if not waiting.startswith(" "):
            yield waiting
            waiting = ""
    if waiting:
        yield waiting


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, shape, rest[:opening], operands, argument, rest[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def shape_bytes(shape: str, hbm: bool = False) -> float:
    """Count the bytes of an array or tuple shape; with `hbm` only of the arrays that lie in main memory."""
    total = 0.0
    for kind, sizes, layout in ARRAY.findall(shape):
        if kind in SIZES and not (hbm and re.search(r"S\([1-9]", layout)):
            total += SIZES[kind] * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def dimensions(shape: str) -> list[int]:
    """Read the dimensions of the first array in a shape."""
    match = ARRAY.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def called_computation(instruction: Instruction, attribute: str) -> str:
    """Find the computation that an attribute such as `body` names."""
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


# -- loops -----------------------------------------------------------------------------------------------------------


def trip_count(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int | None:
    """Find how often a `while` runs at most; None when its text does not say.

    From `known_trip_count`, or from a condition that holds `counter < bound` (or `and`s it with something else).
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (computations[called_computation(loop, name)] for name in ("condition", "body"))
    initial = computation.get(loop.operands[0])
    for index, bound in _bounds(condition, computations, initial, computation):
        start = _constant(_element(initial, index, computation), computation)
        step = _step(body, computations, index)
        if start is not None and step is not None and step > 0:
            return max(0, -(-(bound - start) // step))
    return None


def _bounds(
    condition: Computation, computations: dict[str, Computation], initial: Instruction | None, outer: Computation
) -> list[tuple[int, int]]:
    """Find (element of the loop's tuple, bound) of every `element < bound` in a condition, fusions included."""
    bounds = []
    scopes = [(condition, dict(condition))]
    for one in condition.values():
        if one.op == "fusion":
            inner = computations[called_computation(one, "calls")]
            parameters = {
                i.name: condition[one.operands[int(i.argument)]] for i in inner.values() if i.op == "parameter"
            }
            scopes.append((inner, {**inner, **parameters}))
    for scope, names in scopes:
        for one in scope.values():
            if one.op != "compare" or "direction=LT" not in one.attributes:
                continue
            left, right = (_through(names[name], names, condition) for name in one.operands)
            limit = _constant(right, condition)
            if limit is None and right is not None and right.op == "get-tuple-element":
                limit = _constant(_element(initial, _index(right), outer), outer)
            if left is not None and left.op == "add" and limit is not None:  # counter + 1 < bound
                terms = [_through(names[name], names, condition) for name in left.operands]
                offsets = [c for term in terms if (c := _constant(term, condition)) is not None]
                left = next((t for t in terms if t is not None and t.op == "get-tuple-element"), None)
                limit -= offsets[0] if len(offsets) == 1 else 0
            if left is not None and left.op == "get-tuple-element" and limit is not None:
                bounds.append((_index(left), limit))
    return bounds


def _through(one: Instruction, names: Computation, condition: Computation) -> Instruction | None:
    while one.op in ("copy", "bitcast", "convert") and one.operands:
        source = names.get(one.operands[0]) or condition.get(one.operands[0])
        if source is None:
            return None
        one = source
    return one


def _index(one: Instruction) -> int:
    match = re.search(r"index=(\d+)", one.attributes)
    return int(match[1]) if match else -1


def _element(value: Instruction | None, index: int, computation: Computation) -> Instruction | None:
    if value is None or value.op != "tuple" or not 0 <= index < len(value.operands):
        return None
    return computation.get(value.operands[index])


def _constant(one: Instruction | None, computation: Computation) -> int | None:
    while one is not None and one.op in ("copy", "bitcast", "convert") and one.operands:
        one = computation.get(one.operands[0])
    if one is None or one.op != "constant" or not re.fullmatch(r"-?\d+", one.argument):
        return None
    return int(one.argument)


def _step(body: Computation, computations: dict[str, Computation], index: int) -> int | None:
    """Find what a loop's body adds to an element of its tuple; 1 where the text is not plain."""
    root = next((one for one in body.values() if one.root), None)
    one = _element(root, index, body)
    while one is not None and one.op in ("copy", "bitcast"):
        one = body.get(one.operands[0])
    if one is None or one.op not in ("add", "fusion"):
        return 1
    constants = [c for name in one.operands if (c := _constant(body.get(name), body)) is not None]
    if one.op == "fusion":
        inner = computations[called_computation(one, "calls")]
        constants += [c for i in inner.values() if i.op == "constant" and (c := _constant(i, inner)) is not None]
    return constants[0] if len(constants) == 1 else 1
