"""Where the seconds of an update go: its operations as the profiler times them, added up by what they do.

    python -m experiments.benchmarks.update_profile --workloads T S-lora C --to runs/benchmarks/profile.json

The clock's time is shared out: at every moment among the innermost operations that run, so the shares add up to the
whole; `nothing` is when none runs. Products are dots, and what XLA hands to its library of products; anything else goes
by the function of ppo_jax that it comes from, which the compiled program tells (of a fusion, where its last operation
comes from).
"""

import dataclasses
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.profiler import ProfileData

from experiments.benchmarks import ours
from experiments.benchmarks.workloads import WORKLOADS, Workload, find_workload
from ppo_jax.cli.parse import parse

NAME, CODE, FRAME = (
    re.compile(p) for p in (r" +(?:ROOT )?%?([\w.\-]+) = ", r" ([a-z][\w\-]*)\(", r"stack_frame_id=(\d+)")
)
ENTRY = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$", re.M)  # of the tables before the program
NESTING = ("while", "call", "cond")  # they last as long as what they run
NOTHING = "nothing"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What is profiled."""

    workloads: tuple[str, ...] = ("T", "S-lora", "C")
    """Workloads of experiments.benchmarks.workloads; tiny:NAME rehearses."""
    tries: int = 3
    """So many updates are profiled, one by one; the shares are their means."""
    operations: int = 12
    """So many of the longest operations are printed."""
    to: Path = Path("runs/benchmarks/profile.json")
    """Where the figures go."""


class Span(NamedTuple):
    """One execution of an operation, in nanoseconds."""

    thread: str
    name: str
    start: float
    end: float


def main(args: list[str] | None = None) -> None:
    settings = parse(Profile, args, prog="experiments.benchmarks.update_profile")
    if unknown := [name for name in settings.workloads if name.removeprefix("tiny:") not in WORKLOADS]:
        raise SystemExit(f"unknown workloads {unknown}; there are {', '.join(WORKLOADS)}")
    found = {}
    for name in settings.workloads:
        work = find_workload(name)
        tries, text = profile(work, settings.tries)
        kinds = read_kinds(text)
        seconds: defaultdict[str, float] = defaultdict(float)
        for spans in tries:
            for operation, nanoseconds in share_out(spans).items():
                seconds[operation] += nanoseconds / settings.tries / 1e9
        found[name] = seconds
        print("\n".join(table(name, seconds, kinds, settings.operations)))
    settings.to.parent.mkdir(parents=True, exist_ok=True)
    settings.to.write_text(json.dumps({"command": sys.argv[1:], "workloads": found}, indent=1))


def profile(work: Workload, tries: int) -> tuple[list[list[Span]], str]:
    """The operations of each of so many updates, once compiled; and the compiled program."""
    config = ours.model_of(work)
    base = jax.jit(ours.init_params, static_argnums=1)(jax.random.key(0), config)
    state, frozen = ours.start(work, config, base)
    collect, learn = cast(tuple[Any, Any], ours.halves_of(work, config))
    rollout = collect(state, frozen, ours.prompts_of(work), ours.HYPER)
    inputs = rollout, ours.scorer_of(work, config)(frozen, rollout), ours.HYPER
    compiled = learn.lower(state, frozen, *inputs).compile()
    state, _ = jax.block_until_ready(compiled(state, frozen, *inputs))
    found = []
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, _ = jax.block_until_ready(compiled(state, frozen, *inputs))
            found.append(list(read_spans(Path(folder))))
    return found, compiled.as_text()


def read_spans(folder: Path) -> Iterator[Span]:
    """The operations of the longest program in a trace."""
    [file] = folder.rglob("*.xplane.pb")
    programs: defaultdict[str, list[Span]] = defaultdict(list)
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and event.duration_ns and not event.name.startswith("end: "):
                    end = event.start_ns + event.duration_ns
                    programs[stats["hlo_module"]].append(Span(line.name, stats["hlo_op"], event.start_ns, end))
    yield from max(programs.values(), key=lambda spans: max(s.end for s in spans) - min(s.start for s in spans))


def share_out(spans: Iterable[Span]) -> dict[str, float]:
    """Nanoseconds by operation: those between two events are shared by the innermost spans of every thread."""
    spent: defaultdict[str, float] = defaultdict(float)
    edges = sorted([(s.start, 1, s) for s in spans] + [(s.end, 0, s) for s in spans], key=lambda edge: edge[:2])
    running: defaultdict[str, list[str]] = defaultdict(list)  # of each thread, innermost last
    before = edges[0][0]
    for now, begins, span in edges:
        innermost = [names[-1] for names in running.values() if names]
        leaves = [name for name in innermost if not name.startswith(NESTING)] or ([NOTHING] if innermost else [])
        for name in leaves:
            spent[name] += (now - before) / len(leaves)
        names, before = running[span.thread], now
        if begins:
            names.append(span.name)
        else:
            del names[len(names) - 1 - names[::-1].index(span.name)]
    return spent


def read_kinds(text: str) -> dict[str, str]:
    """Of every instruction of a compiled program: `products`, or the function of ppo_jax that it comes from."""
    tables = {part.split("\n", 1)[0]: dict(read_entries(part)) for part in text.split("\n\n")[:6]}
    frames, places = tables["StackFrames"], tables["FileLocations"]
    shift = int(frames["1"].get("parent_frame_id", "0") == "1")  # this XLA counts a frame's parent from 1, none being 1

    def function(frame: str | None) -> str:
        while frame in frames:
            place = places[frames[frame]["file_location_id"]]
            file = tables["FileNames"][place["file_name_id"]]
            if "/ppo_jax/" in file:
                return f"{file.split('/ppo_jax/')[1]}: {tables['FunctionNames'][place['function_name_id']]}"
            frame = str(int(frames[frame].get("parent_frame_id", "0")) - shift)
        return "unnamed"

    kinds = {}
    for line in text.splitlines():
        if found := NAME.match(line):
            name, code, frame = found.group(1), CODE.search(line, found.end() - 1), FRAME.search(line)
            dot = name.startswith("ynn_fusion") or (code is not None and code.group(1) == "dot")
            kinds[name] = "products" if dot else function(frame and frame.group(1))
    return kinds


def read_entries(table: str) -> Iterator[tuple[str, Any]]:
    """(number, text or fields) of the lines of a table."""
    for number, text, fields in ENTRY.findall(table):
        yield number, dict(field.split("=") for field in fields.split()) if fields else text


def table(name: str, seconds: Mapping[str, float], kinds: Mapping[str, str], operations: int) -> Iterator[str]:
    """Markdown: milliseconds by kind, and of the longest operations that are no product."""
    whole = sum(seconds.values())
    by_kind: defaultdict[str, float] = defaultdict(float)
    for operation, spent in seconds.items():
        by_kind[kinds.get(operation, operation)] += spent
    yield f"| {name} | ms of {1e3 * whole:.0f} |"
    yield "|---|---|"
    for kind, spent in sorted(by_kind.items(), key=lambda item: -item[1]):
        if spent > 0.005 * whole:
            yield f"| {kind} | {1e3 * spent:.0f} ({spent / whole:.0%}) |"
    longest = sorted(
        (operation for operation in seconds if kinds.get(operation) != "products"), key=seconds.__getitem__
    )
    for operation in longest[: -operations - 1 : -1]:
        yield f"    {1e3 * seconds[operation]:.1f} ms {operation}: {kinds.get(operation, '')}"


if __name__ == "__main__":
    main()
