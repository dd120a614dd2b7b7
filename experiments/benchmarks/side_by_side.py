"""PPO iterations of ppo_jax beside those of other trainers on the same work, in turns, one table and one JSON file.

    python -m experiments.benchmarks.side_by_side --workloads T T-rule --iterations 6 --repeats 3

Each peer is installed into an environment of its own (minutes, once). Every repeat is a process: ours, the peers, ours
again, ...; figures are medians over the iterations of all of them but each first one, which compiles. `cpu` are the
seconds of user and system: on a machine that others use, wall seconds are an upper bound.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from experiments.benchmarks.workloads import WORKLOADS, find_workload
from ppo_jax.cli.parse import parse
from ppo_jax.data.assets import cache_dir

ROOT = Path(__file__).parents[2]


class Peer(NamedTuple):
    """Another trainer."""

    module: str
    workloads: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...]  # one pip command after another


TORCH = ("torch==2.13.0",)  # first and alone: a local CPU build is then taken where there is one
PEERS = {
    "TRL 0.11.4": Peer(
        "trl_0_11",
        ("T", "C", "V", "S", "S-lora"),
        (TORCH, ("trl==0.11.4", "transformers==4.46.3", "peft==0.13.2", "rich")),
    ),
    "TRL 1.9.0": Peer("trl_new", ("T-critic", "S-critic"), (TORCH, ("trl==1.9.0", "peft<0.20"))),
    "Tunix 0.1.7": Peer("tunix_ppo", ("T-rule",), (("google-tunix==0.1.7",),)),
}


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """What is measured."""

    workloads: tuple[str, ...] = ("T", "T-critic", "T-rule", "C", "V", "V-ragged")
    """Workloads of experiments.benchmarks.workloads."""
    iterations: int = 6
    """Iterations of each process, the first included."""
    repeats: int = 3
    """Processes of each trainer."""
    tiny: bool = False
    """Rehearse with tiny shapes."""
    peers: bool = True
    """Without, ours alone is measured."""
    environments: Path = cache_dir() / "peers"
    """The peers are installed here."""
    to: Path = Path("runs/benchmarks/side_by_side.json")
    """Where the figures go."""


def main(args: list[str] | None = None) -> None:
    settings = parse(SideBySide, args, prog="experiments.benchmarks.side_by_side")
    if unknown := [name for name in settings.workloads if name not in WORKLOADS]:
        raise SystemExit(f"unknown workloads {unknown}; there are {', '.join(WORKLOADS)}")
    rows: list[dict[str, Any]] = []
    for name in settings.workloads:
        rows += measure(settings, name)
    settings.to.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"command": sys.argv[1:], "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    about |= {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()}
    settings.to.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print("\n".join(table(rows)))


def measure(settings: SideBySide, name: str) -> list[dict[str, Any]]:
    """One row for each trainer that does this work."""
    commands = {"ours": [sys.executable, "-m", "experiments.benchmarks.ours"]}
    for title, peer in PEERS.items():
        if settings.peers and name in peer.workloads:
            python = install(settings.environments / peer.module, peer)
            commands[title] = [str(python), "-m", f"experiments.benchmarks.peers.{peer.module}"]
    records: dict[str, list[dict[str, Any]]] = {title: [] for title in commands}
    asked = f"tiny:{name}" if settings.tiny else name
    with tempfile.TemporaryDirectory() as programs:  # cold for the first process of each trainer, warm for the others
        for repeat in range(settings.repeats):
            for title, command in commands.items():
                last = title == "ours" and repeat == settings.repeats - 1
                extra = ["machine"] if last else []
                cache = Path(programs) / title.replace(" ", "-")
                records[title].append(run([*command, asked, str(settings.iterations), *extra], cache))
                print(f"{name}, {title}, {repeat + 1} of {settings.repeats}", file=sys.stderr)
    return [{"workload": name, "trainer": title} | summary(asked, found) for title, found in records.items()]


def install(folder: Path, peer: Peer) -> Path:
    """The interpreter of a peer's environment, which is made where there is none."""
    python, done = folder / "bin" / "python", folder / "installed.json"
    if not done.is_file() or json.loads(done.read_text()) != [list(names) for names in peer.installs]:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for names in peer.installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *names], check=True)
        done.write_text(json.dumps(peer.installs))
    return python


def run(command: list[str], cache: Path) -> dict[str, Any]:
    """The record that a worker prints as its last line."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all processes."""
    later = [iteration for record in records for iteration in record["iterations"][1:]]
    first = [record["iterations"][0] for record in records]
    row: dict[str, Any] = {"peak_mib": [record["peak_mib"] for record in records]}
    for index, clock in enumerate(("wall", "cpu")):
        row[clock] = {phase: median(one[phase][index] for one in later) for phase in later[0]}
        row[clock]["whole"] = median(sum(part[index] for part in one.values()) for one in later)
        row[clock]["spread"] = [f(sum(part[index] for part in one.values()) for one in later) for f in (min, max)]
        row[clock]["first"] = [sum(part[index] for part in one.values()) for one in first]
    if "update" in row["wall"]:
        row["update_gflops"] = find_workload(name).update_flops() / row["wall"]["update"] / 1e9
    return row | {key: value for key, value in records[-1].items() if key not in ("iterations", "peak_mib")}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: seconds of an iteration and its phases, first iterations, memory, rates; ours is the measure."""
    columns = ["workload", "trainer", "wall s", "cpu s", "peer / ours (cpu)", "phases (wall s)"]
    columns += [
        "first, cold / warm (wall s)",
        "peak MiB, cold / warm",
        "update GFLOP/s (products)",
        "decode step ms (products)",
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    ours = {row["workload"]: row["cpu"]["whole"] for row in rows if row["trainer"] == "ours"}
    for row in rows:
        wall, cpu = row["wall"], row["cpu"]
        phases = ", ".join(f"{name} {wall[name]:.2f}" for name in wall if name not in ("whole", "spread", "first"))
        relative = "" if row["trainer"] == "ours" else f"{cpu['whole'] / ours[row['workload']]:.2f}"
        rate = f"{row['update_gflops']:.0f}" if "update_gflops" in row else ""
        rate += f" ({row['product_gflops']:.0f})" if "product_gflops" in row else ""
        step = f"{row['decode_ms']:.1f} ({row['decode_floor_ms']:.1f})" if "decode_ms" in row else ""
        first = " / ".join(f"{seconds:.1f}" for seconds in wall["first"][:2])
        peak = " / ".join(f"{most:,}" for most in row["peak_mib"][:2])
        low, high = wall["spread"]
        yield (
            f"| {row['workload']} | {row['trainer']} | {wall['whole']:.2f} ({low:.2f}-{high:.2f}) | {cpu['whole']:.2f} "
            f"| {relative} | {phases} | {first} | {peak} | {rate} | {step} |"
        )


if __name__ == "__main__":
    main()
