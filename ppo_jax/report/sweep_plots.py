"""The pictures of several runs: curves over each other, the frontier, parallel coordinates, importance."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ppo_jax.report.drawing import BLUE, COLORS, GREY, INK, RED, WIDTH, make_panels, moving_average, number_steps
from ppo_jax.runs.output.series import Records, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = "#c9ced5"
MANY = (BLUE, *COLORS[:-1], "#4f8fbf", "#8c6d46", "#5f9e6e", "#c08aa8")


class Run(NamedTuple):
    """One line of a picture: a setting (with all its seeds), or a run."""

    name: str
    label: str  # short: what tells it from the others
    records: tuple[Records, ...]  # of each seed
    values: Mapping[str, object]  # of the fields that differ
    score: float  # the first objective, high is good; NaN: not known
    point: tuple[float, float]  # KL and reward at the end; NaN: not known
    state: str = "finished"


def curves_over_updates(runs: Sequence[Run], best: Sequence[str], metric: str, label: str) -> "Figure | None":
    """One metric of the training batches of all runs; the best ones stand out."""
    lines = {run.name: _mean_curve(run.records, metric) for run in runs}
    if not any(steps for steps, _ in lines.values()):
        return None
    figure, (axes,) = make_panels(1, height=3.4)
    colours = dict(zip(best, itertools.cycle(MANY), strict=False))
    order = {name: place for place, name in enumerate(reversed(best), 1)}  # the best last, above all others
    for run in sorted(runs, key=lambda run: order.get(run.name, 0)):
        steps, values = lines[run.name]
        if not steps:
            continue
        if run.name in colours:
            axes.plot(steps, values, color=colours[run.name], lw=2.0, label=f"{run.name}: {run.label}", zorder=3)
        else:
            style = ":" if run.state in ("pruned", "stopped") else "-"
            axes.plot(steps, values, style, color=FAINT, lw=0.9)
        if run.state in ("pruned", "stopped"):
            axes.plot(steps[-1:], values[-1:], "x", color=colours.get(run.name, GREY), ms=4, zorder=4)
    axes.set(title=label, ylabel=metric)
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # below: so many lines leave no room among them
        figure.legend(handles[::-1], labels[::-1], loc="outside lower left", fontsize=6.8, ncols=1)
    number_steps(axes)
    return figure


def frontier(runs: Sequence[Run], best: Sequence[str]) -> "Figure | None":
    """Reward against KL at the end of each run, and the line of those that no other beats in both."""
    known = [run for run in runs if all(map(math.isfinite, run.point))]
    if not known:
        return None
    figure, (axes,) = make_panels(1, height=3.6)
    front = pareto([run for run in known if run.state == "finished"])
    if front:
        axes.plot(*zip(*(run.point for run in front), strict=True), "-", color=RED, lw=1.2, alpha=0.8, label="frontier")
    for run in known:
        colour = BLUE if run in front else FAINT
        marker = "x" if run.state in ("pruned", "stopped") else "o"
        axes.plot(
            *run.point,
            marker,
            color=colour,
            ms=6 if run.name in best else 4.5,
            mec="white" if marker == "o" else colour,
        )
    low, high = axes.get_ylim()
    above = -math.inf
    for run in sorted((run for run in front if run.name in best or len(front) < 8), key=lambda run: run.point):
        if run.point[1] - above > (high - low) / 25:  # names must not lie on each other
            axes.annotate(run.name, run.point, xytext=(5, -2), textcoords="offset points", fontsize=7, color=INK)
            above = run.point[1]
    axes.margins(0.08)
    axes.set(title="Reward against KL at the end", xlabel="KL to the reference (nats per response)", ylabel="reward")
    if front:
        axes.legend(loc="best")
    return figure


def pareto(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other beats in reward at a KL that is no larger, by rising KL."""
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.point[0], -run.point[1])):
        if not kept or run.point[1] > kept[-1].point[1]:
            kept.append(run)
    return kept


def parallel_coordinates(runs: Sequence[Run], paths: Sequence[str], score: str) -> "Figure | None":
    """Every finished run as a line through its settings to its score; good ones are blue and drawn last."""
    from matplotlib.figure import Figure

    known = [run for run in runs if math.isfinite(run.score)]
    if len(known) < 2 or not paths:
        return None
    columns = [*paths, score]
    figure = Figure(figsize=(max(WIDTH, 1.5 * len(columns) + 1), 3.4), layout="constrained")
    axes = figure.subplots()
    scales = [_scale([run.values.get(path) for run in known]) for path in paths]
    scales.append(_scale([run.score for run in known]))
    ranked = sorted(known, key=lambda run: run.score)
    for place, run in enumerate(ranked):
        share = place / (len(ranked) - 1)
        heights = [scale.place(run.values.get(path)) for scale, path in zip(scales, paths, strict=False)]
        heights.append(scales[-1].place(run.score))
        axes.plot(range(len(columns)), heights, color=_blend(share), lw=0.8 + 1.2 * share**4, alpha=0.35 + 0.65 * share)
    for x, (name, scale) in enumerate(zip(columns, scales, strict=True)):
        axes.axvline(x, color="#b9bec5", lw=0.9, zorder=0)
        for height, text in scale.ticks:
            axes.annotate(text, (x, height), xytext=(3, 0), textcoords="offset points", fontsize=6.5, va="center",
                          bbox={"fc": "white", "ec": "none", "pad": 0.4, "alpha": 0.75})  # fmt: skip
        axes.annotate(name.removeprefix("hyper."), (x, 1.06), ha="center", fontsize=7.5, weight="bold")
    axes.set(ylim=(-0.06, 1.14), xlim=(-0.2, len(columns) - 0.55))
    axes.axis("off")
    return figure


class Scale(NamedTuple):
    """One axis: values to heights in [0, 1]."""

    positions: Mapping[object, float]  # of words and of few numbers
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: object) -> float:
        if self.positions or not isinstance(value, int | float):
            return self.positions.get(value, 0.5)
        return _share(float(value), self.low, self.high, self.log)


def _scale(values: Sequence[object]) -> Scale:
    distinct = sorted({v for v in values if v is not None}, key=lambda v: (isinstance(v, str), v))
    numbers = [v for v in distinct if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(distinct) or len(distinct) <= 4:
        heights = {v: i / max(len(distinct) - 1, 1) if len(distinct) > 1 else 0.5 for i, v in enumerate(distinct)}
        return Scale(heights, 0, 1, False, tuple((h, _tick(v)) for v, h in heights.items()))
    low, high = float(min(numbers)), float(max(numbers))
    log = low > 0 and high / low > 20
    middle = math.sqrt(low * high) if log else (low + high) / 2
    ticks = tuple((_share(v, low, high, log), _tick(v)) for v in (low, middle, high))
    return Scale({}, low, high, log, ticks)


def _share(value: float, low: float, high: float, log: bool) -> float:
    if high == low:
        return 0.5
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _tick(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _blend(share: float) -> tuple[float, float, float]:
    """Grey for the worst, blue for the best."""
    grey, blue = (0.79, 0.81, 0.84), (0.17, 0.37, 0.56)
    return tuple(g + (b - g) * share for g, b in zip(grey, blue, strict=True))  # type: ignore[return-value]


def importance_bars(importance: Mapping[str, float], score: str) -> "Figure | None":
    """How much of the spread of the objective each field explains."""
    if not importance:
        return None
    figure, (axes,) = make_panels(1, height=0.75 + 0.32 * len(importance))
    names = sorted(importance, key=lambda name: importance[name])
    axes.barh(
        [name.removeprefix("hyper.") for name in names], [importance[name] for name in names], color=BLUE, height=0.6
    )
    axes.set(title=f"What decides {score}", xlabel="share of the spread between trials (PED-ANOVA)", xlim=(0, 1))
    axes.grid(False, axis="y")
    return figure


def _mean_curve(every: Sequence[Records], metric: str) -> tuple[list[int], list[float]]:
    """The mean over the seeds, where all have the update, smoothed over 1/20 of the run."""
    found = [dict(zip(*series(records, "ppo", metric), strict=True)) for records in every]
    found = [curve for curve in found if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    values = [sum(curve[step] for curve in found) / len(found) for step in steps]
    return steps, moving_average(values, 2 * (len(values) // 40) + 1)


def overlay(axes: "Axes", runs: Sequence[Run], phase: str, metric: str) -> bool:
    """One metric of some runs, a colour each; whether there was anything to draw."""
    drawn = False
    for run, colour in zip(runs, itertools.cycle(MANY), strict=False):
        for records in run.records:
            steps, values = series(records, phase, metric)
            if steps:
                smooth = moving_average(values, 2 * (len(values) // 40) + 1) if phase != "eval" else values
                axes.plot(steps, smooth, "o-" if phase == "eval" else "-", color=colour, ms=4, label=run.name)
                drawn = True
    return drawn
