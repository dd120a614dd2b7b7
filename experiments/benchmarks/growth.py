"""How the cost of a PPO iteration grows with batch, response, layers, vocabulary, LoRA rank and members.

    python -m experiments.benchmarks.growth
    python -m experiments.benchmarks.growth --axes batch layers --tries 5

Each axis changes one number of workload T (`experiments.benchmarks.workloads`). Of every point: seconds of an iteration
once compiled (the least of several: wall, and the processors' by user and system), GFLOP/s of what cannot be done
without, and the seconds that its two programs took to compile. The slope fitted to log seconds over log size stands
beside that of the counted operations: what is above it is cost that should not be there.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import ours
from experiments.benchmarks.workloads import FOUR, WORKLOADS, Workload
from ppo_jax.cli.parse import parse
from ppo_jax.models.layout import init_params
from ppo_jax.rewards.model import model_reward
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm
from ppo_jax.train.population import iterate_members, make_places, stack_hypers
from ppo_jax.train.ppo import iterate

Axis = Literal["batch", "response", "layers", "vocabulary", "rank", "members"]
SIZES: dict[Axis, tuple[int, ...]] = {
    "batch": (8, 16, 32, 64),
    "response": (32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
    "vocabulary": (1024, 4096, 16_384, 32_768),
    "rank": (4, 16, 64, 256),
    "members": (1, 2, 4, 8),
}


@dataclasses.dataclass(frozen=True)
class Growth:
    """What is measured."""

    axes: tuple[Axis, ...] = tuple(SIZES)
    """Each of these grows while the others stay."""
    tries: int = 3
    """An iteration's seconds are the least of this many."""
    points: int = 4
    """So many sizes of each axis, from the smallest."""
    to: Path = Path("runs/benchmarks/growth.json")
    """Where the figures go."""


class Point(NamedTuple):
    """One size."""

    size: int
    wall: float  # seconds of an iteration
    cpu: float
    compile: float  # seconds of the wall, nothing cached
    flops: float  # operations that the iteration cannot do without


def main(args: list[str] | None = None) -> None:
    settings = parse(Growth, args, prog="experiments.benchmarks.growth")
    peak = ours.product_rate()
    found = {axis: [measure(axis, size, settings.tries) for size in SIZES[axis][: settings.points]]
             for axis in settings.axes}  # fmt: skip
    settings.to.parent.mkdir(parents=True, exist_ok=True)
    figures = {axis: [point._asdict() for point in points] for axis, points in found.items()}
    about = {"command": sys.argv[1:], "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    settings.to.write_text(json.dumps({"about": about, "product_flops": peak, "axes": figures}, indent=1))
    print("\n".join(table(found, peak)))


def measure(axis: Axis, size: int, tries: int) -> Point:
    """Compiles the iteration of one size and times it."""
    work = workload(axis, size)
    step, state, compiling = prepare(work, size if axis == "members" else 0)
    state = step(state)
    walls, cpus = [], []
    for _ in range(tries):
        wall, cpu = time.perf_counter(), time.process_time()
        state = step(state)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    jax.clear_caches()
    print(f"{axis} {size}: {min(walls):.2f} s, compiled in {compiling:.1f} s", file=sys.stderr)
    return Point(size, min(walls), min(cpus), compiling, (size if axis == "members" else 1) * iteration_flops(work))


def workload(axis: Axis, size: int) -> Workload:
    """T with one number changed; of rank and members, with LoRA."""
    base = WORKLOADS["T"]
    if axis in ("layers", "vocabulary"):
        return dataclasses.replace(base, shape=dataclasses.replace(FOUR, **{axis: size}))
    if axis == "rank":
        return dataclasses.replace(base, adapter="lora", rank=size)
    if axis == "members":
        return dataclasses.replace(base, adapter="lora")
    return dataclasses.replace(base, **{axis: size})  # type: ignore[arg-type]


def prepare(work: Workload, members: int) -> tuple[Any, Any, float]:
    """(state -> state by one compiled iteration, the state to begin with, seconds of compiling)."""
    config = ours.model_of(work)
    base = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    state, frozen = ours.start(work, config, base)
    algorithm = Algorithm(config, ours.options_of(work), make_optimizer(), model_reward(config, ()))
    prompts = ours.prompts_of(work)
    inputs: tuple[Any, ...] = (ours.HYPER,)
    function: Any = lambda state, frozen, prompts, hyper: iterate(algorithm, state, frozen, prompts, hyper)[0]  # noqa: E731
    if members:
        state = make_places(state, members).fill(state)
        prompts = jax.tree.map(lambda x: jnp.broadcast_to(x, (members, *x.shape)), prompts)
        inputs = (stack_hypers([ours.HYPER] * members), jnp.ones((members,), bool))
        function = lambda *given: iterate_members(algorithm, *given)[0]  # noqa: E731
    began = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0).lower(state, frozen, prompts, *inputs).compile()
    compiling = time.perf_counter() - began
    return lambda state: jax.block_until_ready(compiled(state, frozen, prompts, *inputs)), state, compiling


def iteration_flops(work: Workload) -> float:
    """`Workload.update_flops`, one pass for the score, one with the unembedding for the rollout, and LoRA's own."""
    shape, rows = work.shape, work.batch * work.response
    attention = 2 * shape.layers * (work.prompt + work.response) * shape.heads * shape.head_width
    whole = 2 * work.tokens * (shape.products + attention)
    inner = shape.head_width * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.mlp
    updates = shape.layers * work.rank * (7 * shape.width + inner) if work.adapter == "lora" else 0  # 7 maps a layer
    passes = 3 * work.epochs + 1  # forward, gradients of inputs and of both factors; and the rollout
    low_rank = passes * 2 * work.tokens * updates
    return work.update_flops() + 2 * whole + 2 * rows * shape.width * shape.vocabulary + low_rank


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The least-squares slope of log cost over log size: 1 where twice the size costs twice as much."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def table(found: dict[Axis, list[Point]], peak: float) -> Iterator[str]:
    """Markdown: a row for each axis."""
    columns = ["grows", "sizes", "wall s", "cpu s", "slope (wall)", "slope of the operations"]
    columns += ["GFLOP/s (of the products' peak)", "compiled in, s"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for axis, points in found.items():
        sizes = [point.size for point in points]
        fitted = [slope(sizes, [getattr(point, name) for point in points]) for name in ("wall", "flops")]
        rates = [point.flops / point.wall for point in points]
        cells = [f"{size:,}" for size in sizes], *([f"{getattr(p, n):.2f}" for p in points] for n in ("wall", "cpu"))
        shares = ", ".join(f"{rate / 1e9:.0f} ({rate / peak:.0%})" for rate in rates)
        compiled = ", ".join(f"{point.compile:.0f}" for point in points)
        yield (
            f"| {axis} | {' | '.join(', '.join(cell) for cell in cells)} | {fitted[0]:.2f} | {fitted[1]:.2f} "
            f"| {shares} | {compiled} |"
        )


if __name__ == "__main__":
    main()
