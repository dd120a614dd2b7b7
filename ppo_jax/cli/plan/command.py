"""`ppo-jax plan`: does PPO of this model fit these devices, how long must it take at least, and what would help.

Every program is compiled in a process of its own, one after the other; see `plan.programs` for what they are,
`plan.count` for what is counted and `plan.chips` for the bounds. Nothing is run: the times are lower bounds.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from ppo_jax.cli.plan.chips import GIB, Topology, bound, topology
from ppo_jax.cli.plan.programs import PlanSettings, Program, check, micro_rows
from ppo_jax.data.extras import install_line
from ppo_jax.models.config import Remat
from ppo_jax.runs.output import config

Report = dict[str, Any]
Compile = Callable[[Program, PlanSettings], Report]


class PlanError(RuntimeError):
    """A program did not compile for a reason other than memory."""


def plan(settings: PlanSettings) -> None:
    """Run `ppo-jax plan`."""
    report = make_plan(settings, compile_program, lambda text: print(text, file=sys.stderr, flush=True))
    if settings.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())


def make_plan(settings: PlanSettings, compile_one: Compile, say: Callable[[str], None]) -> Report:
    """Compile the programs and judge them.

    Returns:
      a JSON object: `model`, `topology`, `devices`, `how` ("compiled, not run"), `memory` (bytes per device that count
      as fitting; null: unknown), `mesh`, `choices` (those of the last attempt), `tried` (what did not fit and was given
      up for less, with its program), `fits` (every program does), and `programs`, a list of objects as `judge` makes
      them. Seconds are those of responses of full length.

    Raises:
      ValueError: unknown model or topology, a mesh that does not divide, or libtpu is missing.
      PlanError: the compiler failed.
    """
    check(settings)
    where = topology(settings.topology)
    limit = settings.memory * GIB or (where.chip.memory if where.chip else None)
    tried, reports = [], []
    for name in settings.programs:
        say(f"compiling {name} of {settings.model} for {settings.topology} ...")
        report = judge(compile_one(name, settings), where, limit, settings)
        while settings.search and report["fits"] is False and name in ("update", "iteration"):
            again = shrink(settings)
            if again is None or sum(report["held"].values()) > (limit or 0):
                break  # nothing is left to try, or what stays is too large whatever the program
            tried.append({"program": name, "peak": report["peak"], **choices(settings)})
            settings = again
            say(f"{name} does not fit; compiling it with {options_of(choices(settings))} ...")
            report = judge(compile_one(name, settings), where, limit, settings)
        reports.append(report)
    verdicts = [report["fits"] for report in reports]
    return {
        "model": settings.model,
        "topology": settings.topology,
        "devices": where.devices,
        "how": "compiled, not run",
        "memory": limit,
        "mesh": dataclasses.asdict(settings.mesh),
        "choices": choices(settings),
        "tried": tried,
        "fits": None if limit is None else all(verdicts),
        "programs": reports,
    }


def judge(report: Report, where: Topology, limit: float | None, settings: PlanSettings) -> Report:
    """Add to a program's report `fits` (null: unknown), `seconds` and `binds` (the bound), `choices`, and `advice`."""
    fits = None if limit is None else bool(report["compiled"] and report["peak"] <= limit)
    seconds, binds = None, None
    if where.chip and report["compiled"]:
        seconds, binds = bound(where.chip, report["flops"], report["traffic"], report["collectives"])
    tips = advice(report, limit, settings) if limit is not None and not fits else []
    return report | {"fits": fits, "seconds": seconds, "binds": binds, "choices": choices(settings), "advice": tips}


# -- search ----------------------------------------------------------------------------------------------------------


def shrink(settings: PlanSettings) -> PlanSettings | None:
    """Choose the next settings, with less memory for the same result: rematerialise, then halve the micro-batch."""
    order = get_args(Remat)
    if settings.compute.remat != order[-1]:
        more = order[order.index(settings.compute.remat) + 1]
        return dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, remat=more))
    pieces = 2 * settings.ppo.accumulate
    halved = dataclasses.replace(settings, ppo=dataclasses.replace(settings.ppo, accumulate=pieces))
    responses, parts = settings.batch * settings.ppo.group_size, settings.ppo.num_minibatches * pieces
    if responses % parts or micro_rows(halved) % (settings.mesh.data * settings.mesh.fsdp):
        return None
    return halved


def choices(settings: PlanSettings) -> Report:
    """List what the search may change."""
    return {"remat": settings.compute.remat, "accumulate": settings.ppo.accumulate}


def options_of(chosen: Report) -> str:
    """Write the choices as options of the command line."""
    return f"--compute.remat {chosen['remat']} --ppo.accumulate {chosen['accumulate']}"


def advice(report: Report, limit: float, settings: PlanSettings) -> list[str]:
    """List what to change, the most effective first."""
    held, tips = report["held"], []
    stays = sum(held.values())
    biggest = max(held, key=lambda name: held[name])
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in held.items())
    if stays > limit:
        copies = settings.mesh.data
        cut = f", or a larger --mesh.fsdp instead of --mesh.data {copies}" if copies > 1 else ""
        tips.append(f"what stays in memory is too large by itself ({parts}): more devices{cut}")
    if settings.policy.kind != "lora" and stays - held["base"] - held["reward"] > held["base"]:
        tips.append("--policy.kind lora: optimizer state and float32 masters shrink to a few per cent")
    if settings.compute.dtype == "float32":
        tips.append("--compute.dtype bfloat16 halves the base and the activations")
    if settings.compute.quantise == "none" and settings.policy.kind != "full":
        tips.append("--compute.quantise int8: a quarter of the base's linear maps in float32, half of bfloat16")
    if stays > limit:
        return tips
    if report["program"] in ("update", "iteration"):
        if (again := shrink(settings)) is not None:
            tips.append(f"{options_of(choices(again))} (same result in less memory; --search tries by itself)")
        if not settings.ppo.logprob_chunk:
            tips.append("--ppo.logprob-chunk 4096: never the logits of a whole micro-batch")
    tips.append(f"a smaller --batch than {settings.batch}, or shorter prompts and responses")
    tips.append(f"more devices, or another mesh: of what stays, the {biggest} takes {_gib(held[biggest])} per device")
    return tips


# -- the compiler, in its own process --------------------------------------------------------------------------------


def compile_program(name: Program, settings: PlanSettings) -> Report:
    """Run `plan.programs.measure` in a fresh process; raise PlanError with the end of its messages."""
    where = topology(settings.topology)
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", JAX_NUM_CPU_DEVICES=str(where.devices))
    if where.chip:
        environment["JAX_NUM_CPU_DEVICES"] = "1"
        if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"compiling for {settings.topology} needs libtpu: {install_line('tpu')} (no TPU is needed), or "
                "plan for CPUs, as in --topology cpu:8"
            )
    worker = subprocess.run(
        [sys.executable, "-m", "ppo_jax.cli.plan.programs", name],
        input=config.to_yaml(settings),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in worker.stdout.splitlines() if line.startswith("{")]
    if worker.returncode or not lines:
        end = "\n".join(worker.stderr.strip().splitlines()[-3:])
        reason = "was killed: out of host memory?" if worker.returncode == -9 else f"ended with {worker.returncode}"
        raise PlanError(f"compiling {name} for {settings.topology} {reason}\n{end}")
    report: Report = json.loads(lines[-1])
    if "error" in report:
        raise ValueError(report["error"])
    return report


# -- output ----------------------------------------------------------------------------------------------------------


def show(plan: Report, console: Console) -> None:
    """Show the plan as a table, a column per program, and what to change."""
    memory, programs = plan["memory"], plan["programs"]
    of = f", {_gib(memory)} of memory each" if memory else ""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    console.print(f"{plan['model']} on {plan['topology']} ({plan['devices']} devices{of}; {mesh})", highlight=False)
    table = Table(title=f"per device, {plan['how']}", title_justify="left")
    table.add_column("")
    for report in programs:
        table.add_column(report["program"], justify="right")
    for name in ("arguments", "temporary", "peak"):
        table.add_row(name, *(_gib(report[name]) for report in programs))
    table.add_row("fits", *({True: "yes", False: "NO", None: "?"}[report["fits"]] for report in programs))
    table.add_section()
    table.add_row("FLOPs", *(_si(report["flops"]) for report in programs))
    table.add_row("HBM traffic", *(_gib(report["traffic"]) for report in programs))
    for kind in sorted({kind for report in programs for kind in report["collectives"] or {}}):
        received = ((report["collectives"] or {}).get(kind, 0.0 if report["compiled"] else None) for report in programs)
        table.add_row(kind, *map(_gib, received))
    if any(report["seconds"] for report in programs):
        table.add_section()
        table.add_row("takes at least", *(_seconds(report["seconds"]) for report in programs))
        table.add_row("bound by", *(report["binds"] or "?" for report in programs))
    console.print(table)
    console.print("work and times are those for responses of full length; times are lower bounds", highlight=False)
    for report in programs:
        if report["fits"] is False:
            over = f"{_gib(report['peak'])} of {_gib(memory)}"
            console.print(f"[bold]{report['program']} does not fit[/bold] ({over}). What helps:", highlight=False)
            for tip in report["advice"]:
                console.print(f"  - {tip}", highlight=False, markup=False)
        if count := sum(other["program"] == report["program"] for other in plan["tried"]):
            end = "does not fit either" if report["fits"] is False else "fits"
            line = f"search: {count} did not fit; {report['program']} with {options_of(report['choices'])} {end}"
            console.print(line, highlight=False)


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.3g} s"


def _gib(size: float | None) -> str:
    if size is None:
        return "?"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _si(number: float | None) -> str:
    if number is None:
        return "?"
    steps: Sequence[tuple[float, str]] = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next((f"{number / size:.3g} {unit}" for size, unit in steps if number >= size), f"{number:.0f}")
