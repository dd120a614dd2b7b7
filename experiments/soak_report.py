"""What a soak leaves, compared with the quiet run, and its report: `python -m experiments.soak_report RECORD ...`."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files.artifacts import BEST, EXPORT
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir

TIMES = ("time", "seconds", "tokens_per_second", "rollout_seconds", "reward_seconds", "learn_seconds")


class SoakError(RuntimeError):
    """A fault that the run did not survive as it should."""


def compare(hurt: Path, quiet: Path, full_disk: bool = False) -> dict[str, str]:
    """{what was compared: how much}; a `full_disk` may have cost `hurt` its best policy. SoakError: what differs."""
    found = {}
    for name in (rundir.METRICS, rundir.SAMPLES):
        left, right = ([timeless(r) for r in read_jsonl(run / name)] for run in (hurt, quiet))
        if left != right:
            first = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
            )
            raise SoakError(f"{name}: record {first + 1} differs ({len(left)} and {len(right)} records)")
        found[f"{name}, without times"] = f"{len(left)} records"
    steps = [store.latest_step(run / rundir.CHECKPOINTS) for run in (hurt, quiet)]
    sums = [store.read_manifest(run / rundir.CHECKPOINTS) for run in (hurt, quiet)]
    if steps[0] != steps[1] or sums[0] != sums[1]:
        wrong = sorted(name for name in sums[0].keys() | sums[1].keys() if sums[0].get(name) != sums[1].get(name))
        raise SoakError(f"the last checkpoints {steps} differ in {', '.join(wrong)}")
    found[f"state at update {steps[0]} (CRC-32 of every array)"] = f"{len(sums[0])} arrays"
    files = sorted(p.relative_to(quiet) for p in (quiet / EXPORT).rglob("*.safetensors"))
    best = store.read_meta(quiet / rundir.CHECKPOINTS)["best"].get("step")
    if full_disk and best is not None and best not in store.all_steps(hurt / rundir.CHECKPOINTS):
        files = [file for file in files if BEST not in file.parts]
        found["best policy"] = f"not in the tormented run: the disk was full at update {best}"
    only = {p.relative_to(hurt) for p in (hurt / EXPORT).rglob("*.safetensors")} ^ set(files)
    if only:
        raise SoakError(f"{', '.join(map(str, sorted(only)))}: in one of the runs only")
    for file in files:
        if (hurt / file).read_bytes() != (quiet / file).read_bytes():
            raise SoakError(f"{file} differs")
    found["exported policies"] = f"{len(files)} files"
    return found


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMES}


def report(pieces: list[dict[str, Any]]) -> str:
    """Markdown."""
    pieces = sorted(pieces, key=lambda piece: piece["seed"])
    commands = dict.fromkeys(f"`python -m experiments.soak {piece['options']}`" for piece in pieces)
    faults: Counter[str] = sum((Counter(piece["faults"]) for piece in pieces), Counter())
    requests: Counter[str] = sum((Counter(piece["requests"]) for piece in pieces), Counter())
    days, commits = sorted({piece["date"] for piece in pieces}), sorted({str(piece["commit"])[:7] for piece in pieces})
    versions = ", ".join(f"{name} {version}" for name, version in pieces[-1]["versions"].items())
    lines = [
        "# The soak: last report",
        "",
        f"{', '.join(commands)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}, {pieces[-1]['machine']}, "
        f"{versions}, commit {', '.join(commits)}.",
        f"{sum(piece['minutes'] for piece in pieces) / 60:.3g} hours of faults in {len(pieces)} pieces, "
        f"{sum(piece['updates'] for piece in pieces)} PPO updates, {faults.pop('lives')} processes. The run that "
        "those of a piece make up is bit for bit the quiet one that was never disturbed.",
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(faults.items())),
        "",
        f"Requests that met a failing server: {', '.join(f'{n} {name}' for name, n in sorted(requests.items()))}. "
        f"Longest time from SIGTERM to the end of the process, with its state saved: "
        f"{max(piece['longest_stop_seconds'] for piece in pieces):.1f} s.",
        "",
        "| piece | compared with its quiet run, bitwise equal | its longest process: MB, files, threads |",
        "|---|---|---|",
    ]
    for piece in pieces:
        equal = "; ".join(f"{name}: {count}" for name, count in piece["compared"].items())
        held = [
            f"{u['megabytes']:.0f}, {u['files']}, {u['threads']} after {u['minutes']:.0f} min"
            for u in piece["long_life"]
        ]
        lines.append(f"| {piece['seed']} | {equal} | {'; '.join(held[1:][:: max(len(held) // 3, 1)])} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(report([piece for file in sys.argv[1:] for piece in json.loads(Path(file).read_text())]), end="")
