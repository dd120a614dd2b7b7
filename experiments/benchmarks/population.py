"""K runs of PPO in one program, against K runs one after another and against K processes at once.

    python -m experiments.benchmarks.population --model tiny
    python -m experiments.benchmarks.population --model demo --members 1 2 4 8 --batch 8 --updates 10

Every figure is of fresh processes: seconds to the end with everything (imports and loading apart), seconds of
compilation, updates per second of all runs together once compiled, and the peak of resident memory (of several
processes: their sum). "One after another" is K processes, each of which compiles, as peers sweep; "one process"
compiles once and then makes one run after the other, which is what a population has to beat on a saturated CPU.
"""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ppo_jax.cli.parse import parse

# jax is imported by the workers alone: the parent must not hold memory or threads of its own beside them.


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is measured."""

    model: Literal["tiny", "demo"] = "tiny"
    """A random model of two layers, or SmolLM2-135M, the demo's."""
    members: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Runs at once."""
    updates: int = 20
    """PPO updates of each run that are timed."""
    batch: int = 8
    """Prompts per update."""
    response: int = 24
    """Tokens per response."""
    minibatches: int = 2
    """Optimizer steps per epoch, of which there are two."""
    accumulate: int = 1
    """Micro-batches of an optimizer step."""
    most_processes: int = 8
    """More processes than this are not started at once."""
    most_memory: float = 18.0
    """GiB that K processes may be expected to need together; beyond it they are left out."""
    to: Path = Path("runs/benchmarks/population.json")
    """Where the figures go."""
    worker: Literal["", "population", "alone", "sequence"] = ""
    """What a process of its own measures; the parent sets it."""
    count: int = 1
    """How many runs that is."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one way to make K runs."""

    seconds: float  # to the end, compilation included
    compile_seconds: float  # of the first update less that of a later one, of each process
    updates_per_second: float  # of all runs together, once compiled
    gibibytes: float  # peak of resident memory


def main(args: list[str] | None = None) -> None:
    """Measures, or is one of the processes that are measured."""
    settings = parse(Benchmark, args, prog="experiments.benchmarks.population")
    if settings.worker:
        print(json.dumps(work(settings)))
        return
    found: list[dict[str, Any]] = []
    for count in settings.members:
        rows: dict[str, Figures | None] = {"population": one(settings, "population", count)}
        rows["one process"] = one(settings, "sequence", count)
        alone = one(settings, "alone", 1)
        rows["one after another"] = dataclasses.replace(alone, seconds=count * alone.seconds)
        fits = count <= settings.most_processes and count * alone.gibibytes <= settings.most_memory
        rows["processes"] = at_once(settings, count) if fits else None
        for way, figures in rows.items():
            found.append({"members": count, "way": way} | (dataclasses.asdict(figures) if figures else {}))
            print(json.dumps(found[-1]), flush=True)
    settings.to.parent.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(settings).items() if name not in ("to", "worker", "count")}
    settings.to.write_text(json.dumps({"settings": about, "cores": os.cpu_count(), "figures": found}, indent=1))
    print("\n".join(table(found)))


def one(settings: Benchmark, way: str, count: int) -> Figures:
    """The figures of one process."""
    return read([start(settings, way, count)], settings.updates * count)


def at_once(settings: Benchmark, count: int) -> Figures:
    """Of `count` processes that run at the same time."""
    return read([start(settings, "alone", 1) for _ in range(count)], settings.updates * count)


def start(settings: Benchmark, way: str, count: int) -> subprocess.Popen:
    changed = dataclasses.replace(settings, worker=way, count=count)  # type: ignore[arg-type]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(changed).items() if name != "members"]
    command = [sys.executable, "-m", "experiments.benchmarks.population", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def read(processes: list[subprocess.Popen], updates: int) -> Figures:
    """What processes that began together say of themselves."""
    said = []
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a process of the benchmark ended with {process.returncode}")
        said.append(json.loads(out.strip().splitlines()[-1]))
    end = max(one["end"] for one in said)
    rates = [one["updates"] / one["steady"] for one in said]
    return Figures(
        seconds=end - min(one["begin"] for one in said),
        compile_seconds=max(one["compile"] for one in said),
        updates_per_second=sum(rates),
        gibibytes=sum(one["peak"] for one in said) / 2**20,
    )


def work(settings: Benchmark) -> dict[str, float]:
    """Trains in this process; the times of the clock that all processes share."""
    from ppo_jax.runs.memory import trim_after_compiling

    trim_after_compiling()  # as every run does
    step = make_population(settings) if settings.worker == "population" else make_alone(settings)
    repeats = settings.count if settings.worker == "sequence" else 1
    begin = time.time()
    step(0)
    first = time.time() - begin
    after = time.time()
    for number in range(1, repeats * settings.updates):
        step(number)
    end = time.time()
    rest = max(repeats * settings.updates - 1, 1)
    each = (end - after) / rest
    runs = settings.count if settings.worker == "population" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes
    return {
        "begin": begin,
        "end": end,
        "compile": first - each,
        "steady": end - after,
        "updates": runs * rest,
        "peak": peak,
    }


def parts(settings: Benchmark) -> tuple[Any, ...]:
    """algorithm, frozen, state of a seed, prompts of a step: the demo's choices with a reward that costs nothing."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments import smoke
    from ppo_jax.data import assets
    from ppo_jax.models.adapters import AdapterConfig, init_adapter
    from ppo_jax.models.pretrained import load_model
    from ppo_jax.rollout import Sampling
    from ppo_jax.train.optimizer import make_optimizer
    from ppo_jax.train.options import Algorithm, PPOConfig
    from ppo_jax.train.state import init_state
    from ppo_jax.types import Frozen, Prompts, Scores

    model = smoke.model(0) if settings.model == "tiny" else load_model(assets.smollm2())
    config = model.config
    adapter = AdapterConfig(layers=8) if settings.model == "demo" else AdapterConfig(layers=1)

    def reward(frozen: Any, rollout: Any, prefix: Any, prefix_layers: int) -> Scores:
        score = jnp.sum(rollout.tokens[:, -settings.response :] % 2, axis=1) / settings.response
        return Scores(score.astype(jnp.float32), jnp.ones(score.shape, bool), {})

    sampling = Sampling(response_length=settings.response, stop_ids=(), pad_id=model.pad_id)
    ppo = PPOConfig(sampling=sampling, epochs=2, num_minibatches=settings.minibatches, accumulate=settings.accumulate)
    algorithm = Algorithm(config, ppo, make_optimizer(), reward)

    def state(seed: int) -> Any:
        start = init_adapter(jax.random.key(seed), model.params, config, adapter)
        return init_state(jax.random.key(seed), start, config, algorithm.optimizer, 0.05)

    def prompts(step: int) -> Prompts:
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, min(config.vocab_size, 1000), (settings.batch, 8)).astype(np.int32)
        mask: Any = np.ones(tokens.shape, bool)
        return Prompts(tokens, mask, np.arange(settings.batch, dtype=np.int32))  # type: ignore[arg-type]

    return algorithm, Frozen(model.params), state, prompts


def make_population(settings: Benchmark) -> Callable[[int], None]:
    """step(number) of a population."""
    import jax
    import numpy as np

    from ppo_jax.train.population import feed_members, make_members, make_places, stack_hypers, stack_prompts
    from ppo_jax.types import Hyper

    algorithm, frozen, state, prompts = parts(settings)
    count = settings.count
    places = make_places(state(0), count)
    states = places.fill(state(0))
    for place in range(count):
        states = places.put(states, place, state(place))
    everybody: Any = np.ones(count, bool)
    iterate, active = make_members(algorithm), feed_members(everybody)
    hypers = stack_hypers([Hyper(learning_rate=1e-4 * (1 + place)) for place in range(count)])
    held = [states]

    def step(number: int) -> None:
        given = stack_prompts([prompts(count * number + place) for place in range(count)])
        held[0], metrics = iterate(held[0], frozen, given, hypers, active)
        jax.block_until_ready(metrics)

    return step


def make_alone(settings: Benchmark) -> Callable[[int], None]:
    """step(number) of one run; every `updates` steps another one begins."""
    import jax

    from ppo_jax.train.ppo import make_iteration
    from ppo_jax.types import Hyper

    algorithm, frozen, state, prompts = parts(settings)
    iterate = make_iteration(algorithm.model, algorithm.ppo, algorithm.optimizer, algorithm.reward)
    held = [state(0)]

    def step(number: int) -> None:
        if number and number % settings.updates == 0:
            held[0] = state(number // settings.updates)
        held[0], metrics = iterate(held[0], frozen, prompts(number), Hyper())
        jax.block_until_ready(metrics)

    return step


def table(found: list[dict[str, Any]]) -> list[str]:
    """The table of docs/sweeps.md."""
    lines = [
        "| members | way | seconds to the end | of these compiling | updates/s, all runs | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row.get(name, math.nan) for name in ("seconds", "compile_seconds", "updates_per_second", "gibibytes")]
        shown = ["not run" if math.isnan(cell) else f"{cell:.3g}" for cell in cells]
        lines.append(f"| {row['members']} | {row['way']} | " + " | ".join(shown) + " |")
    return lines


if __name__ == "__main__":
    main()
