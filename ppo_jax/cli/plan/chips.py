"""The peaks of chips, the bound that they put on a program's time, and the spelling of a topology."""

import re
from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Published peaks of one chip; everything per second is a bound that no program reaches."""

    name: str
    flops: float  # bfloat16 FLOP/s of the matrix units
    memory: float  # bytes of HBM that a program may use
    bandwidth: float  # HBM bytes/s
    links: float  # bytes/s that arrive over all inter-chip links together


# Google Cloud TPU documentation, "System architecture" of v5e, v5p and v6e: 197, 459 and 918 bf16 TFLOP/s; 819, 2,765
# and 1,600 GB/s of HBM; 1,600, 4,800 and 3,200 Gbit/s of inter-chip links. Memory: what libtpu 0.0.42 lets a program
# use (it says so when one exceeds it), a little below the 16, 95 and 32 GB of the data sheets.
CHIPS = {
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 1600e9 / 8),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 4800e9 / 8),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1600e9, 3200e9 / 8),
}
EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:2x4 or cpu:8"


class Topology(NamedTuple):
    """Devices that a program is compiled for."""

    name: str
    devices: int
    chip: Chip | None  # None: CPU, of which nothing is known


def topology(name: str) -> Topology:
    """Read `v5p:4x4x4` (chips along each side of the torus) or `cpu:8`.

    Raises:
      ValueError: the kind is unknown, or the sides do not make a slice of it.
    """
    kind, _, shape = name.partition(":")
    if kind != "cpu" and kind not in CHIPS:
        raise ValueError(f"topology {name!r}: {kind!r} is unknown; known: {', '.join(CHIPS)} and cpu, as in {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology {name!r}: sizes are missing or malformed; write it as in {EXAMPLES}")
    sides = [int(side) for side in shape.split("x")]
    wanted = {"cpu": 1, "v5p": 3}.get(kind, 2)
    if len(sides) != wanted:
        sizes = {1: "one number", 2: "two sides, as in 8x8", 3: "three sides, as in 4x4x4"}[wanted]
        raise ValueError(f"topology {name!r}: {kind} needs {sizes}, not {len(sides)}")
    devices = 1
    for side in sides:
        devices *= side
    return Topology(name, devices, CHIPS.get(kind))


def bound(chip: Chip | None, flops: float, traffic: float, collectives: Mapping[str, float]) -> tuple[float, str]:
    """Compute (seconds that a program needs, what binds): the roofline (Williams et al. 2009) with a third roof.

    max(flops / peak, HBM bytes / bandwidth, received bytes / link bandwidth); (0, "unknown") without a chip.
    """
    if chip is None:
        return 0.0, "unknown"
    times = {
        "compute": flops / chip.flops,
        "memory bandwidth": traffic / chip.bandwidth,
        "chip links": sum(collectives.values()) / chip.links,
    }
    resource = max(times, key=lambda name: times[name])
    return times[resource], resource
