"""How the curves look: colours, type, the parts that they share, and how a figure becomes SVG inside the page.

A figure is drawn 5 inches (360 points) wide, about the width of a phone, so that its letters are read there as they
are. Its colours become CSS variables, which the page sets for light and for dark. Needs matplotlib when it draws.
"""

import io
import itertools
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_jax.data.disk import replace_file
from ppo_jax.report.evidence import Evidence, Values, evaluations_by_step, mean_error
from ppo_jax.runs.output.series import EVALUATED, Records, finite, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # that it looks for fonts at first concerns nobody

BLUE, RED, GREEN, PURPLE, GOLD = "#2b5f8f", "#b5482e", "#3d7f6b", "#7a5c99", "#b08a2e"
GREY, INK, SOFT, EDGE, GRID, PAPER = "#8a8f98", "#22262b", "#5b616a", "#b9bec5", "#e9ebee", "#ffffff"
COLORS = (GREEN, RED, PURPLE, GOLD, GREY)  # of judges and parts, in turn
VARIABLES = {
    BLUE: "--blue", RED: "--red", GREEN: "--green", PURPLE: "--purple", GOLD: "--gold", GREY: "--grey",
    INK: "--ink", SOFT: "--soft", EDGE: "--edge", GRID: "--grid", PAPER: "--paper",
}  # fmt: skip
WIDTH = 5.0  # inches

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
    "legend.edgecolor": "none",
    "legend.facecolor": PAPER,
    "legend.framealpha": 0.85,
    "legend.fontsize": 10,
    "text.parse_math": False,  # a dollar in a judge's name is a dollar
    "svg.fonttype": "none",  # letters stay letters: small files, and the reader's own font
    "svg.hashsalt": "ppo_jax",
}


def make_panels(count: int, height: float = 1.75, share: bool = True) -> tuple["Figure", list["Axes"]]:
    """A figure of `count` panels, one below the other, each `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * count + 0.35), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=share, squeeze=False).flat)


def draw_curve(axes: "Axes", records: Records, phase: str, name: str, color: str, label: str | None = None) -> None:
    """The values as a line; of a long run faint, behind their moving average over 1/20 of it.

    Of a very long one the faint line becomes a band, from the least to the greatest value of each 1/300.
    """
    steps, values = series(records, phase, name)
    window = 2 * (len(values) // 40) + 1
    if window == 1:
        axes.plot(steps, values, "-" if len(values) > 1 else ".", color=color, label=label)
        return
    size = math.ceil(len(values) / 300)
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    if size == 1:
        axes.plot(steps, values, color=color, alpha=0.25, lw=0.9)
    else:
        axes.fill_between(steps[::size], [*map(min, parts)], [*map(max, parts)], color=color, alpha=0.25, lw=0)
    smooth = moving_average(values, window)[::size]
    axes.plot(steps[::size], smooth, color=color, label=label and f"{label} (mean of {window})")


def draw_evaluations(axes: "Axes", evidence: Evidence, name: str, color: str, line: bool = False, **how: Any) -> None:
    """The means of evaluations as dots, with bars of two standard errors where the number of prompts is known."""
    points = [e for e in evaluations_by_step(evidence.records).values() if finite(e, name) is not None]
    if points:
        x, y = [e["step"] for e in points], [float(e[name]) for e in points]
        bars = [bar(evidence, e, name) for e in points]
        draw_points(axes, x, y, bars, color, line, **({"label": name_dots(evidence)} | how))


def name_dots(evidence: Evidence) -> str:
    """What the dots of evaluations are called in a legend that may have the batches of training prompts too."""
    return evidence.measured_on if evidence.measured_on == EVALUATED else f"{evidence.measured_on}, evaluated"


def draw_points(
    axes: "Axes", x: Sequence[float], y: Sequence[float], bars: Sequence[float], color: str, line: bool, **how: Any
) -> None:
    """Dots with bars of half-length `bars` (0: none); `line` joins them."""
    errors = bars if any(bars) else None
    dots: dict[str, Any] = dict(color=color, ms=5, mec=color, mew=1.4, mfc=PAPER, zorder=3)
    axes.errorbar(x, y, yerr=errors, fmt="o-" if line else "o", capsize=2.5, elinewidth=1.1, **(dots | how))


def bar(evidence: Evidence, values: Values, name: str) -> float:
    """Two standard errors of an evaluation's mean; 0 where they are not known."""
    return 2 * (mean_error(evidence, values, name) or 0.0)


def number_steps(axes: "Axes", label: str = "PPO update") -> None:
    """Whole numbers below, and what they count."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(label)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` (an odd number) values around each one; fewer at the ends."""
    half = window // 2
    sums = list(itertools.accumulate(values, initial=0.0))
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def values_against_kl(records: Records, phase: str, name: str) -> list[tuple[float, float]]:
    """(sqrt(kl), value) of the records that have both; a sampled KL just below 0 counts as 0."""
    both = [r for r in records if r.get("phase") == phase and None not in (r.get("kl"), r.get(name))]
    points = [(math.sqrt(max(0.0, float(r["kl"]))), float(r[name])) for r in both]
    return [point for point in points if all(map(math.isfinite, point))]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def to_svg(figure: "Figure", name: str) -> str:
    """The figure as an <svg> element: ids begin with `name`, colours are CSS variables with themselves as a fallback.

    It stands alone too: whoever does not know the variables sees the light colours.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(href=\"#|url\(#)", rf"\1{name}-", text)
    text = re.sub(r"(font: [^\"]*?[\d.]+px) [^\";]*", r"\1 system-ui, sans-serif", text)
    text = re.sub(r"font-family: [^\";]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), text)
    return text.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1).strip()


def save_svg(figure: "Figure", name: str, folder: Path) -> str:
    """Write NAME.svg, on paper of its own, into the folder; return the <svg> element."""
    svg = to_svg(figure, name)
    folder.mkdir(parents=True, exist_ok=True)
    alone = svg.replace('<svg style="', f'<svg style="background: {PAPER}; ', 1)
    replace_file(folder / f"{name}.svg", alone.encode("utf-8", "replace"))
    return svg


def _variable(color: str) -> str:
    return f"var({VARIABLES[color]}, {color})" if color in VARIABLES else color
