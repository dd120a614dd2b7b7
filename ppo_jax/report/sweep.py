"""One self-contained report.html for a sweep: the best settings, curves, frontier, importance, samples, all trials.

The page (sweep.html, page.css) loads nothing, runs no script and escapes every text. Here its numbers are gathered.
"""

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_jax.data.disk import replace_file
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.report import sweep_plots
from ppo_jax.report.drawing import STYLE, save_svg
from ppo_jax.report.sweep_plots import Run
from ppo_jax.report.templates import render
from ppo_jax.runs.output import rundir
from ppo_jax.runs.sweep.ranges import describe, label
from ppo_jax.runs.sweep.task import TRIALS
from ppo_jax.runs.sweep.values import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppo_jax.runs.sweep.results import Results, Row

BEST, PROMPTS = 5, 4  # settings and prompts that are shown side by side
IN_WORDS = {"trains": "in training", "waits": "waiting"}  # of a number of them


def write(directory: Path, results: "Results") -> Path:
    """Writes plots/*.svg and report.html into the sweep's directory; returns the path of the report."""
    path = directory / rundir.REPORT
    replace_file(path, render("sweep.html", **gather(directory, results)).encode("utf-8", "replace"))
    return path


def gather(directory: Path, results: "Results") -> dict[str, Any]:
    """What the page shows, by its name in sweep.html."""
    runs = {row.run: _run(directory, row, results) for row in results.rows}
    ranked = rank(results)
    best = ranked[:BEST]
    score = results.objective[0].removeprefix("-")
    counts = Counter(row.state for row in results.rows)
    return {
        "title": f"Sweep {directory.resolve().name}",
        "about": f"{len(results.rows)} settings of {', '.join(_short(path) for path in results.paths)}"
        + (f", each with {len(results.seeds)} seeds" if len(results.seeds) > 1 else ""),
        "headline": _headline(results, best),
        "states": [
            (IN_WORDS.get(state, state), counts[state]) for state in sorted(counts, key=lambda state: -counts[state])
        ],
        "objectives": [_words(metric) for metric in results.objective],
        "seeds": results.seeds,
        "best": [_best(directory, row, results) for row in best],
        "plots": draw(directory, list(runs.values()), [f"{row.run:04d}" for row in best], results, score),
        "samples": samples_side_by_side([(f"trial {row.run:04d}", directory / TRIALS / row.names[0]) for row in best]),
        "paths": [_short(path) for path in results.paths],
        "rows": [_line(row, results, row in best) for row in [*ranked, *(r for r in results.rows if r not in ranked)]],
        "storage": results.about.get("storage") or str(directory / "study.journal"),
    }


def rank(results: "Results") -> list["Row"]:
    """The finished settings, best first by the first objective."""
    sign = -1.0 if results.objective[0].startswith("-") else 1.0
    return sorted((row for row in results.rows if row.objectives), key=lambda row: -sign * row.objectives[0])


def _run(directory: Path, row: "Row", results: "Results") -> Run:
    records = tuple(read_records(directory / TRIALS / name) for name in row.names)
    ends = [[r for r in one if r.get("phase") == "eval" and r.get("step", 0) > 0][-1:] for one in records]
    finals = [end[0] for end in ends if end]
    point = tuple(_mean([end.get(name) for end in finals]) for name in ("kl", "reward"))
    sign = -1.0 if results.objective[0].startswith("-") else 1.0
    score = sign * row.objectives[0] if row.objectives else math.nan
    return Run(f"{row.run:04d}", describe(row.values), records, row.values, score, point, row.state)  # type: ignore[arg-type]


def _headline(results: "Results", best: Sequence["Row"]) -> str:
    if not best:
        return "No trial has finished yet."
    first = best[0]
    metric = results.objective[0].removeprefix("-")
    worst = rank(results)[-1].objectives[0]
    seeds = len(results.seeds)
    around = f" ± {first.spread[0]:.2g} over {seeds} seeds" if seeds > 1 and first.spread else ""
    reached = f"{metric} {first.objectives[0]:.3g}{around}"
    others = f"; the worst finished trial reached {worst:.3g}" if len(results.rows) > 1 else ""
    return f"Best: {describe(first.values)}, with {reached}{others}."


def _best(directory: Path, row: "Row", results: "Results") -> dict[str, Any]:
    config = directory / TRIALS / row.names[0] / rundir.CONFIG
    command = results.about.get("command", "ppo-jax ppo").split()
    again = shlex.join([*command, "--config", str(config), "--run-dir", "runs/again"])
    values = [(_short(path), label(row.values[path])) for path in results.paths if path in row.values]
    return {"name": f"{row.run:04d}", "values": values, "objectives": _objectives(row, results), "again": again}


def _objectives(row: "Row", results: "Results") -> list[tuple[str, str, str]]:
    several = len(results.seeds) > 1
    return [
        (metric.removeprefix("-"), f"{value:.4g}", f"{row.spread[i]:.2g}" if several and len(row.spread) > i else "")
        for i, (metric, value) in enumerate(zip(results.objective, row.objectives, strict=True))
    ]


def _line(row: "Row", results: "Results", best: bool) -> dict[str, Any]:
    return {
        "name": f"{row.run:04d}",
        "pages": [
            (f"{TRIALS}/{name}/{rundir.REPORT}", seed) for name, seed in zip(row.names, results.seeds, strict=True)
        ],
        "values": [label(row.values[path]) if path in row.values else "" for path in results.paths],
        "objectives": _objectives(row, results) if row.objectives else [("", "–", "")] * len(results.objective),
        "updates": row.updates,
        "state": row.state,
        "why": row.why if row.state != "pruned" else "",
        "attempts": row.attempts,
        "best": best,
    }


def draw(
    directory: Path, runs: Sequence[Run], best: Sequence[str], results: "Results", score: str
) -> list[dict[str, Any]] | None:
    """The pictures, also as plots/*.svg; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    paths = [path for path in results.paths if len({repr(run.values.get(path)) for run in runs}) > 1]
    with matplotlib.rc_context(STYLE):
        made = {
            "reward": sweep_plots.curves_over_updates(runs, best, "reward", "Reward of the training batches"),
            "kl": sweep_plots.curves_over_updates(runs, best, "kl", "KL of the training batches"),
            "frontier": sweep_plots.frontier(runs, best),
            "importance": sweep_plots.importance_bars(results.importance, score),
            "parallel": sweep_plots.parallel_coordinates(runs, paths, score),
        }
        return save_figures(directory, {name: figure for name, figure in made.items() if figure is not None}, CAPTIONS)


CAPTIONS = {
    "reward": "The best five in colour, means over their seeds; dotted and crossed: ended early.",
    "kl": "Nats per response to the reference.",
    "frontier": "Last evaluation on held-out prompts. On the line: no other trial has more reward at as little KL.",
    "importance": "Of finished trials. A field that was hardly varied, or that others mask, looks unimportant.",
    "parallel": "A line for each finished trial, from its settings to its objective; the bluer the better.",
}


def save_figures(directory: Path, figures: Mapping[str, "Figure"], captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Writes the figures into plots/ and returns them as the template takes them."""
    found = []
    for name, figure in figures.items():
        svg, wide = save_svg(figure, name, directory / rundir.PLOTS), figure.get_figwidth() > 1.3 * sweep_plots.WIDTH
        found.append({"title": name, "caption": captions[name], "svg": svg, "wide": wide})
    return found


def samples_side_by_side(runs: Sequence[tuple[str, Path]], prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """For the first prompts that all of the runs have: the prompt, and the last response of each run."""
    last: list[tuple[str, dict[str, Any]]] = []
    for name, path in runs:
        samples = read_jsonl(path / rundir.SAMPLES) if (path / rundir.SAMPLES).exists() else []
        final = max((sample["step"] for sample in samples), default=None)
        if final is not None:
            last.append((name, {s["prompt"]: s for s in samples if s["step"] == final}))
    if not last:
        return []
    shared = [prompt for prompt in last[0][1] if all(prompt in found for _, found in last)]
    cards = []
    for prompt in itertools.islice(shared, prompts):
        written = [(name, found[prompt]) for name, found in last]
        sides = [(name, sample["response"], sample.get("scores", {}).get("reward")) for name, sample in written]
        cards.append({"prompt": prompt, "sides": sides})
    return cards


def _mean(values: Sequence[Any]) -> float:
    known = [float(value) for value in values if value is not None and math.isfinite(float(value))]
    return sum(known) / len(known) if known else math.nan


def _short(path: str) -> str:
    return path.removeprefix("hyper.")


def _words(metric: str) -> str:
    return f"{metric.removeprefix('-')} ({'low' if metric.startswith('-') else 'high'} is good)"
