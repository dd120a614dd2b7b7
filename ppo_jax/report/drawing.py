"""How the curves look: colours, type, and the parts that they share. Needs matplotlib when something is drawn."""

from typing import TYPE_CHECKING, Any

from ppo_jax.report.series import Records, moving_average, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY, INK = "#2b5f8f", "#b5482e", "#3d7f6b", "#8a8f98", "#22262b"
COLORS = (GREEN, RED, "#7a5c99", "#b08a2e", GREY)  # of judges, in turn
WIDTH, DPI = 5.4, 200  # inches; 1080 pixels, shown at half that

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b9bec5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ebee",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#5b616a",
    "ytick.color": "#5b616a",
    "lines.linewidth": 1.6,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
}


def make_panels(count: int, height: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = list(figure.subplots(count, 1, sharex=True, squeeze=False).flat)
    return figure, panels


def draw_curve(axes: "Axes", records: Records, phase: str, name: str, color: str, label: str | None = None) -> None:
    """The values as a line; of a long run faint, behind their moving average over 1/20 of it."""
    steps, values = series(records, phase, name)
    window = 2 * (len(values) // 40) + 1
    if window == 1:
        axes.plot(steps, values, "-" if len(values) > 1 else ".", color=color, label=label)
        return
    axes.plot(steps, values, color=color, alpha=0.25, lw=0.9)
    axes.plot(steps, moving_average(values, window), color=color, label=label and f"{label} (mean of {window})")


def draw_dots(axes: "Axes", records: Records, name: str, color: str) -> None:
    steps, values = series(records, "eval", name)
    if steps:
        axes.plot(steps, values, "o", color="white", mec=color, mew=1.4, ms=5, label="held-out prompts", zorder=3)


def number_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
