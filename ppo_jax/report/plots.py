"""The pictures of a PPO run's evaluations, and how all pictures get into the page and into plots/*.svg.

Each function takes the evidence and gives a matplotlib Figure, or None where the numbers for it are missing. Matplotlib
is imported when the first one is drawn: training does not need it.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppo_jax.report import drawing
from ppo_jax.report.drawing import BLUE, COLORS, GREY, INK, RED, draw_curve, draw_evaluations, draw_points, make_panels
from ppo_jax.report.evidence import Evidence, evaluations_by_step, gain
from ppo_jax.report.measures import measure_of
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.series import evaluated_judges, finite, initial_spread, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """One picture of the report, to be drawn."""

    name: str  # of its file
    title: str
    caption: str  # how to read it
    make: Callable[[], "Figure | None"]


class Drawn(NamedTuple):
    """One picture of the report."""

    name: str
    title: str
    caption: str
    svg: str  # an <svg> element


def draw(run_dir: Path, pictures: Sequence[Picture]) -> list[Drawn]:
    """Draws those that there are numbers for, also into plots/NAME.svg. Raises ImportError without matplotlib."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(drawing.STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font has it
        for picture in pictures:
            figure = picture.make()
            if figure is not None:
                svg = drawing.save_svg(figure, picture.name, run_dir / rundir.PLOTS)
                drawn.append(Drawn(picture.name, picture.title, picture.caption, svg))
    return drawn


def evaluation_pictures(evidence: Evidence) -> list[Picture]:
    """The pictures of evaluations, in the order of the report."""
    bars = " Bars: two standard errors." if evidence.prompts else ""
    evaluated = evaluations_by_step(evidence.records)
    dots = f" Dots: evaluations on {evidence.measured_on}.{bars}" if evaluated else ""
    return [
        Picture(
            "reward_kl",
            "Reward and KL over updates",
            f"Line: training batches.{dots}",
            lambda: reward_and_kl(evidence),
        ),
        Picture(
            "judges",
            "Gain of the reward and of independent judges",
            "Judges never seen in training. A reward that climbs while they stay or fall has been gamed.",
            lambda: judges(evidence),
        ),
        Picture(
            "reward_sqrt_kl",
            "What is gained for the distance travelled",
            "Scores against √KL (as in Gao et al. 2022), each in its own unit; arrows lead from one evaluation to the "
            "next, the numbers are updates. A judge that bends down while the reward still rises is over-optimisation.",
            lambda: scores_against_kl(evidence),
        ),
        Picture(
            "scores",
            "Judges in their own units",
            f"Means over the {evidence.measured_on}.{bars}",
            lambda: judge_scores(evidence),
        ),
        Picture(
            "reward_distribution",
            "Rewards before and after",
            f"Each of the {evidence.measured_on} once. A gain of all of them moves the whole, a gain of a few makes a "
            "second hill.",
            lambda: distribution(evidence, "reward"),
        ),
        Picture(
            "length_distribution",
            "Response lengths before and after",
            f"Each of the {evidence.measured_on} once. A reward that likes long or short texts shows here.",
            lambda: distribution(evidence, "tokens"),
        ),
    ]


def reward_and_kl(evidence: Evidence) -> "Figure | None":
    """Reward above, KL below, over updates; held-out evaluations as dots."""
    records = evidence.records
    if not series(records, "ppo", "reward")[0] and not series(records, "eval", "reward")[0]:
        return None
    figure, (top, bottom) = make_panels(2)
    draw_curve(top, records, "ppo", "reward", BLUE, "training prompts")
    draw_evaluations(top, evidence, "reward", BLUE)
    top.set(title="Reward", ylabel="score")
    draw_curve(bottom, records, "ppo", "kl", RED, "training prompts")
    draw_evaluations(bottom, evidence, "kl", RED)
    bottom.set(title="KL from the reference", ylabel="nats per response")
    drawing.number_steps(bottom)
    if series(records, "eval", "reward")[0]:
        top.legend(loc="best")
    return figure


def scores_against_kl(evidence: Evidence) -> "Figure | None":
    """The reward and every judge over sqrt(KL), the axis on which over-optimisation has a simple form (section 3)."""
    records = evidence.records
    names = ["reward", *evaluated_judges(records, evidence.labels)]
    names = [name for name in names if drawing.values_against_kl(records, "eval", name)]
    train = drawing.values_against_kl(records, "ppo", "reward")
    if not names and not train:
        return None
    figure, panels = make_panels(len(names) or 1, 2.1)
    for axes, name, color in zip(panels, names or ["reward"], _colors(names), strict=False):
        if name == "reward" and train:
            shown = train[:: math.ceil(len(train) / 300)]
            axes.plot(*zip(*shown, strict=True), ".", color=color, alpha=0.35, ms=5, mew=0, label="training prompts")
        _travel(axes, evidence, name, color)
        measure = measure_of(name, evidence.labels)
        axes.set(title=measure.label, ylabel="score")
        axes.margins(0.1, 0.14)
        if name == "reward" and train and names:
            axes.legend(loc="best")
    panels[-1].set_xlabel("√KL per response (√nats)")
    panels[-1].set_xlim(left=-0.04 * panels[-1].get_xlim()[1])
    return figure


def _travel(axes: "Axes", evidence: Evidence, name: str, color: str) -> None:
    """The evaluations in their order: dots with bars, an arrow from each to the next, update numbers."""
    evaluations = evaluations_by_step(evidence.records).values()
    found = [e for e in evaluations if finite(e, name) is not None and finite(e, "kl") is not None]
    x, y = [math.sqrt(max(0.0, e["kl"])) for e in found], [float(e[name]) for e in found]
    draw_points(
        axes, x, y, [drawing.bar(evidence, e, name) for e in found], color, False, label=drawing.name_dots(evidence)
    )
    for i, j in itertools.pairwise(range(len(found))):
        arrow = dict(arrowstyle="-|>", color=color, lw=1.3, shrinkA=3, shrinkB=4, mutation_scale=9)
        axes.annotate("", (x[j], y[j]), (x[i], y[i]), arrowprops=arrow, zorder=2)
    told: list[int] = []  # the last ones first, and none that would be written over another
    width, height = (max(values) - min(values) if values else 0.0 for values in (x, y))
    for k in reversed(range(len(found))):
        if not any(abs(x[k] - x[j]) < 0.07 * width and abs(y[k] - y[j]) < 0.2 * height for j in told):
            told.append(k)
            offset: dict[str, Any] = dict(xytext=(5, 6), textcoords="offset points", fontsize=9.5, color=INK, zorder=4)
            axes.annotate(str(found[k]["step"]), (x[k], y[k]), **offset)


def judges(evidence: Evidence) -> "Figure | None":
    """Change since the first evaluation of the reward and of what it never saw, in initial standard deviations."""
    records, labels = evidence.records, evidence.labels
    scores = ("reward", *evaluated_judges(records, labels))
    names = [name for name in scores if len(series(records, "eval", name)[0]) > 1]
    if "reward" not in names or len(names) < 2:
        return None
    figure, (axes,) = make_panels(1, 2.7)
    scaled = all(initial_spread(records, name) for name in names)
    for name, color in zip(names, _colors(names), strict=False):
        found = [e for e in evaluations_by_step(records).values() if finite(e, name) is not None]
        scale = initial_spread(records, name) if scaled else 1.0
        gains = [gain(evidence, name, found[0], e) for e in found]
        bars = [0.0, *(2 * (g.error or 0.0) / scale for g in gains[1:] if g)]
        values = [g.change / scale for g in gains if g]
        label = "Reward (optimised)" if name == "reward" else labels.get(name, name)
        draw_points(axes, [e["step"] for e in found], values, bars, color, True, label=label)
    axes.axhline(0, color=GREY, lw=0.9)
    unit = "std at update 0" if scaled else "own units"
    axes.set_ylabel(f"gain ({unit})")
    axes.legend(loc="best")
    drawing.number_steps(axes)
    return figure


def judge_scores(evidence: Evidence) -> "Figure | None":
    """Every judge over updates, a panel each, in its own unit."""
    names = [n for n in evaluated_judges(evidence.records, evidence.labels) if series(evidence.records, "eval", n)[0]]
    if not names:
        return None
    figure, panels = make_panels(len(names))
    for axes, name, color in zip(panels, names, _colors(names)[1:], strict=False):
        draw_evaluations(axes, evidence, name, color, line=True)
        axes.set(title=measure_of(name, evidence.labels).label, ylabel="score")
    drawing.number_steps(panels[-1])
    return figure


def distribution(evidence: Evidence, column: str) -> "Figure | None":
    """Histograms of one column of the first and of the last evaluation, on the same bins."""
    steps = [evidence.before.get("step"), evidence.after.get("step")]
    found = [(step, evidence.columns.get(step, {}).get(column)) for step in dict.fromkeys(steps) if step is not None]
    sides = [(step, values[np.isfinite(values)]) for step, values in found if values is not None]
    sides = [(step, values) for step, values in sides if len(values)]
    if len(sides) < 2:
        return None
    figure, (axes,) = make_panels(1, 2.2)
    every = np.concatenate([values for _, values in sides])
    bins = bin_edges(every, whole=column == "tokens")
    for (step, values), color, style in zip(sides, (GREY, BLUE), ("stepfilled", "stepfilled"), strict=True):
        axes.hist(values, bins, histtype=style, color=color, alpha=0.35, lw=0)  # type: ignore[arg-type]
        axes.hist(values, bins, histtype="step", color=color, lw=1.4, label=f"update {step}")  # type: ignore[arg-type]
        axes.axvline(float(values.mean()), color=color, lw=1.2, ls=(0, (4, 3)))
    axes.set(ylabel="prompts", xlabel=("tokens" if column == "tokens" else "score") + " (dashed: mean)")
    axes.locator_params(axis="x", nbins=7, integer=column == "tokens")
    axes.legend(loc="best")
    return figure


def _colors(names: Sequence[str]) -> Sequence[str]:
    """Blue is the reward's; the judges' follow, as many as there are names."""
    return (BLUE, *COLORS * (len(names) or 1))


def bin_edges(values: np.ndarray, whole: bool) -> np.ndarray:
    """Edges of at most 24 bins; around whole numbers where the values are such."""
    low, high = float(values.min()), float(values.max())
    if whole:
        width = max(1, math.ceil((high - low + 1) / 24))
        return np.arange(low - 0.5, high + width + 0.5, width)
    return np.linspace(low, high, 21) if high > low else np.array([low - 0.5, low + 0.5])
