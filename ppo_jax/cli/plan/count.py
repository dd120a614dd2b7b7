"""Counts the work of a compiled program from its optimized HLO text: per device, loops multiplied out.

XLA's own cost analysis counts the body of a loop once. Here every `while` is multiplied by its trip count: the
`known_trip_count` that XLA writes down, or else the bound that its condition compares the counter with. A loop that may
end earlier (decoding until every row has stopped) counts with that bound, so all numbers are upper bounds.

FLOPs are those of matrix products (2 per multiply-add); the rest is memory traffic. Bytes are what instructions read
from and write to HBM; what the compiler placed in a TPU's own memories (`S(1)` and up in a layout) costs none.
Collectives count the bytes that one device receives: over g devices all-gather (g-1) n, reduce-scatter and all-to-all
(g-1)/g n, all-reduce 2 (g-1)/g n of an n-byte operand (ring algorithms; Chan et al. 2007).
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

from ppo_jax.cli.plan.hlo import (
    ARRAY,
    Computation,
    Instruction,
    called_computation,
    dimensions,
    parse,
    shape_bytes,
    trip_count,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: names for what is there already, or bookkeeping.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "copy-done", "slice-done", "add-dependency", "iota", "async-done", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one device."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Counter = dataclasses.field(default_factory=Counter)  # kind -> bytes received
    unknown_loops: int = 0  # loops whose trip count could not be read; counted once

    def __add__(self, other: "Cost") -> "Cost":
        total = Counter(self.collectives)
        total.update(other.collectives)
        unknown = self.unknown_loops + other.unknown_loops
        return Cost(self.flops + other.flops, self.bytes + other.bytes, total, unknown)

    def times(self, n: int) -> "Cost":
        """Multiply the cost by n repetitions."""
        scaled = Counter({kind: n * size for kind, size in self.collectives.items()})
        return Cost(n * self.flops, n * self.bytes, scaled, self.unknown_loops)


def count(text: str) -> Cost:
    """Count the cost of the entry computation of an HLO module (`compiled.as_text()`)."""
    computations, entry = parse(text)
    return _Counter(computations).control(entry)


class _Counter:
    """Walks a module; the cost of a loop body or branch is computed once."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations = computations
        self.known: dict[str, Cost] = {}

    def control(self, name: str) -> Cost:
        """Count an entry, loop body or branch: every instruction runs, one after the other."""
        if name not in self.known:
            computation = self.computations[name]
            channels: set[str] = set()
            total = Cost()
            for instruction in computation.values():
                total += self.instruction(instruction, computation, channels)
            self.known[name] = total
        return self.known[name]

    def instruction(self, one: Instruction, computation: Computation, channels: set[str]) -> Cost:
        if one.op == "while":
            trips = trip_count(one, computation, self.computations)
            body = self.control(called_computation(one, "body")) + self.control(called_computation(one, "condition"))
            return body.times(trips or 1) + Cost(unknown_loops=int(trips is None))
        if one.op == "conditional":
            names = re.findall(r"%([\w.\-]+)", re.sub(r"metadata=.*", "", one.attributes))
            return max((self.control(n) for n in names if n in self.computations), key=lambda c: (c.flops, c.bytes))
        if one.op == "call":
            return self.control(called_computation(one, "to_apply"))
        if one.op in FREE or (one.op.endswith("-done") and one.op != "copy-done"):
            return Cost()
        if one.op in ("fusion", "async-start"):
            inner = self.computations[called_computation(one, "calls")]
            return self.inside(inner, channels) + Cost(bytes=_fusion_bytes(one, computation, inner, self.computations))
        return self.plain(one, computation, channels) + Cost(bytes=_bytes(one, computation))

    def inside(self, computation: Computation, channels: set[str]) -> Cost:
        """Count what happens within a fusion: products and collectives; its values never reach memory."""
        total = Cost()
        for one in computation.values():
            if one.op == "fusion":
                total += self.inside(self.computations[called_computation(one, "calls")], channels)
            else:
                total += self.plain(one, computation, channels)
        return total

    def plain(self, one: Instruction, computation: Computation, channels: set[str]) -> Cost:
        if one.op in ("dot", "convolution"):
            flops = _dot_flops if one.op == "dot" else _convolution_flops
            return Cost(flops=flops(one, [computation[name].shape for name in one.operands]))
        if one.op == "custom-call":
            return Cost(flops=_kernel_flops(one, [computation[name].shape for name in one.operands]))
        kind = one.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Cost()
        # A TPU collective that runs beside other work appears in the fusions that start, carry and end it.
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        if channel and channel[1] in channels:
            return Cost()
        channels |= {channel[1]} if channel else set()
        size = sum(shape_bytes(computation[name].shape) for name in one.operands if name in computation)
        return Cost(collectives=Counter({kind: size * _share(kind, group_size(one.attributes))}))


def _share(kind: str, group: int) -> float:
    """Compute bytes received / bytes of the operand."""
    part = (group - 1) / group
    shares = {"all-gather": group - 1.0, "all-reduce": 2 * part, "collective-permute": 1.0}
    return shares.get(kind, part)


def group_size(attributes: str) -> int:
    """Count the devices that take part together: {{0,1},{2,3}}, [4,2]<=[8] or mesh['x'=4,'y'=2] {'y'}."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", match[2]) if name in sizes)
    return 2  # permutes name pairs


# -- floating-point operations ---------------------------------------------------------------------------------------


def _numbers(attributes: str, name: str) -> list[int]:
    match = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _dot_flops(one: Instruction, operands: Sequence[str]) -> float:
    left = dimensions(operands[0])
    contracted = math.prod(left[i] for i in _numbers(one.attributes, "lhs_contracting_dims"))
    return 2.0 * contracted * math.prod(dimensions(one.shape))


def _convolution_flops(one: Instruction, operands: Sequence[str]) -> float:
    """Count products written as convolutions: batch dimensions become windows of which one position is real."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = dimensions(operands[0]), dimensions(operands[1])
    out = dict(zip(labels[3], dimensions(one.shape), strict=True))
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for number, dimension in enumerate(sorted(set(labels[3]) - set("bf"))):
        size = lhs[labels[1].index(dimension)]
        pairs *= _valid_pairs(number, size, out[dimension], rhs[labels[2].index(dimension)], fields)
    return 2.0 * rhs[labels[2].index("i")] * out["b"] * out["f"] * pairs


def _valid_pairs(number: int, size: int, outputs: int, window: int, fields: dict[str, str]) -> int:
    """Count (output, window) positions of one dimension that meet an input element, not padding or dilation."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[number] if name in fields else default

    stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
    lhs_dilate, rhs_dilate = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    reach, pairs = (size - 1) * lhs_dilate, 0
    for at in range(window):
        first = at * rhs_dilate - low
        starts = range(first, first + outputs * stride, stride)
        pairs += sum(0 <= start <= reach and start % lhs_dilate == 0 for start in starts)
    return pairs


# Products of [S, S] by H in the forward, d(query) and d(key, value) kernels of splash attention.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _kernel_flops(one: Instruction, operands: Sequence[str]) -> float:
    """Count a splash attention kernel: half of each [S, S] product, since blocks above the diagonal are not visited."""
    products = next((n for name, n in _SPLASH.items() if name in one.name), 0)
    floats = (dimensions(shape) for shape in operands if re.match(r"(bf16|f16|f32)\[", shape))
    queries = next((sizes for sizes in floats if len(sizes) >= 3), [])  # [rows, heads, S, H], the first one
    return float(products * math.prod(queries) * queries[-2]) if products and queries else 0.0


# -- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(one: Instruction, computation: Computation) -> float:
    """Count the HBM bytes that a single instruction reads and writes."""
    written = shape_bytes(one.shape, hbm=True)
    if one.op == "custom-call" and "AllocateBuffer" in one.attributes:
        return 0.0
    if one.op in ("dynamic-slice", "slice", "gather", "broadcast", "slice-start"):
        return 2 * written if one.op != "broadcast" else written
    if one.op == "dynamic-update-slice":
        return 2 * shape_bytes(computation[one.operands[1]].shape, hbm=True)
    if one.op == "copy-start":  # (destination, source, flag)
        arrays = [f"{kind}[{sizes}]{layout}" for kind, sizes, layout in ARRAY.findall(one.shape)]
        return sum(shape_bytes(array, hbm=True) for array in arrays[:2])
    read = sum(shape_bytes(computation[name].shape, hbm=True) for name in one.operands if name in computation)
    return written + read


def _fusion_bytes(
    one: Instruction, computation: Computation, inner: Computation, computations: dict[str, Computation]
) -> float:
    """Count HBM bytes of a fusion: a slice of a parameter reads the slice, an update in place writes the update."""
    total = 0.0
    for number, name in enumerate(one.operands):
        outer = computation.get(name)
        if outer is not None and shape_bytes(outer.shape, hbm=True):
            total += _read(_parameter(inner, number), inner, computations)
    written = 0.0
    for root, home in _roots(inner, computations):
        update = home[root.operands[1]] if root.op == "dynamic-update-slice" else root
        written += shape_bytes(update.shape)
    whole = shape_bytes(one.shape)  # a TPU may keep some outputs in its own memory
    return total + written * shape_bytes(one.shape, hbm=True) / whole if whole else total


def _parameter(inner: Computation, number: int) -> Instruction:
    return next(i for i in inner.values() if i.op == "parameter" and int(i.argument or 0) == number)


def _read(source: Instruction, inner: Computation, computations: dict[str, Computation]) -> float:
    """Count the bytes of an array that its users look at, those in fusions within the fusion included."""
    total, whole = 0.0, shape_bytes(source.shape)
    for user in (i for i in inner.values() if source.name in i.operands):
        if user.op in ("bitcast", "reshape"):
            total += _read(user, inner, computations)
        elif user.op in ("dynamic-slice", "slice", "gather"):
            total += shape_bytes(user.shape)
        elif user.op == "fusion":
            nested = computations[called_computation(user, "calls")]
            places = (number for number, name in enumerate(user.operands) if name == source.name)
            total += sum(_read(_parameter(nested, number), nested, computations) for number in places)
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == source.name):
            return whole
    return min(total, whole)


def _roots(inner: Computation, computations: dict[str, Computation]) -> list[tuple[Instruction, Computation]]:
    """Find what makes a fusion's outputs, and where it stands: seen through tuples, bitcasts and fusions within."""
    roots, waiting = [], [(i, inner) for i in inner.values() if i.root]
    while waiting:
        one, home = waiting.pop()
        if one.op in ("tuple", "bitcast") and one.operands:
            waiting += [(home[name], home) for name in one.operands]
        elif one.op == "fusion":
            nested = computations[called_computation(one, "calls")]
            waiting += [(i, nested) for i in nested.values() if i.root]
        else:
            roots.append((one, home))
    return roots
