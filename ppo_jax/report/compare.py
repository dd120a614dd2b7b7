"""One page for several runs that were not swept: curves over each other, settings that differ, samples side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_jax.data.disk import replace_file
from ppo_jax.report import sweep_plots
from ppo_jax.report.drawing import STYLE, make_panels, number_steps
from ppo_jax.report.sweep import samples_side_by_side, save_figures
from ppo_jax.report.sweep_plots import Run
from ppo_jax.report.templates import render
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.config import read_mapping
from ppo_jax.runs.output.series import EVALUATED, Labels, evaluated_judges, series
from ppo_jax.runs.sweep.values import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# metric: title, unit. The evaluations are drawn where all runs have them, else the training batches.
METRICS = {
    "reward": ("Reward", "score"),
    "kl": ("KL to the reference", "nats per response"),
    "loss": ("Loss", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "response_length": ("Response length", "tokens"),
    "explained_variance": ("Value head: explained variance", "fraction"),
}
ABSENT = "–"  # of a setting that a run does not have: it is of another command, or of older code
OWN = ("run_dir", "resume", "overwrite")  # settings in which any two runs differ


def write(directory: Path, paths: Sequence[Path]) -> Path:
    """Writes plots/*.svg and report.html about the runs at `paths` into `directory`; returns the report's path.

    Raises FileNotFoundError for a path that holds no run, ValueError for fewer than two.
    """
    if len(paths) < 2:
        raise ValueError("compare wants at least two run directories")
    for path in paths:
        if not rundir.holds_run(path):
            raise FileNotFoundError(f"{path} holds no run: there is neither {rundir.CONFIG} nor {rundir.METRICS} in it")
    page = directory / rundir.REPORT
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(page, render("compare.html", **gather(directory, paths)).encode("utf-8", "replace"))
    return page


def gather(directory: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """What the page shows, by its name in compare.html."""
    names = short_names(paths)
    runs = [
        Run(name, "", (read_records(path),), {}, math.nan, (math.nan, math.nan))
        for name, path in zip(names, paths, strict=True)
    ]
    facts = [rundir.read_facts(path) for path in paths]
    metrics = name_metrics(runs, {name: label for one in facts for name, label in one.get("judges", {}).items()})
    differing = differences([read_settings(path) for path in paths])
    measured_on = sorted({one.get("measured_on", EVALUATED) for one in facts})
    return {
        "title": f"{len(paths)} runs compared",
        "names": names,
        "differences": [(name, values) for name, values in differing if ABSENT not in values],
        "missing": [(name, values) for name, values in differing if ABSENT in values],
        "numbers": final_numbers(runs, metrics),
        "plots": draw(directory, runs, metrics, " and ".join(measured_on)),
        "samples": samples_side_by_side(list(zip(names, paths, strict=True)), prompts=6),
    }


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_settings(path: Path) -> dict[str, str]:
    """The settings of a run by dotted name, as text; {} where it has none."""
    file = path / rundir.CONFIG
    if not file.exists():
        return {}
    found = _flat(read_mapping(file.read_text(encoding="utf-8"), str(file)))
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in found}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def differences(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, its value in each run) of every setting that is not the same in all."""
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [(name, [one.get(name, ABSENT) for one in settings]) for name in names if name not in OWN]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def name_metrics(runs: Sequence[Run], labels: Labels) -> dict[str, tuple[str, str]]:
    """METRICS, and after the reward the judges that evaluated any of the runs."""
    judges = dict.fromkeys(name for run in runs for name in evaluated_judges(run.records[0], labels))
    first = {"reward": METRICS["reward"], **{name: (labels.get(name, name), "score") for name in judges}}
    return first | METRICS


def final_numbers(runs: Sequence[Run], metrics: Mapping[str, tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(metric, its last evaluation in each run) of those that all have."""
    rows = []
    for name, (title, unit) in metrics.items():
        last = [series(run.records[0], "eval", name)[1][-1:] for run in runs]
        if all(last):
            rows.append((f"{title} ({unit})", [f"{values[0]:.4g}" for values in last]))
    return rows


def draw(
    directory: Path, runs: Sequence[Run], metrics: Mapping[str, tuple[str, str]], measured_on: str
) -> list[dict[str, Any]] | None:
    """The curves over each other; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    figures: dict[str, Figure] = {}
    captions: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        for name, (title, unit) in metrics.items():
            for phase in phases(runs, name):
                figure, (axes,) = make_panels(1, height=3.1)
                if sweep_plots.overlay(axes, runs, phase, name):
                    axes.set(title=title, ylabel=unit)
                    axes.legend(loc="best", fontsize=7)
                    number_steps(axes, "update")
                    key = name if phase != "eval" else f"{name}_eval"
                    figures[key] = figure
                    captions[key] = f"{measured_on.capitalize()}." if phase == "eval" else "Training batches, smoothed."
        return save_figures(directory, figures, captions)


def phases(runs: Sequence[Run], metric: str) -> list[str]:
    """The phases in which at least one of the runs has recorded the metric."""
    found = dict.fromkeys(r["phase"] for run in runs for records in run.records for r in records if metric in r)
    return sorted(found, key=lambda phase: phase == "eval")
