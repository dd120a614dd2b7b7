"""The curves of a run, drawn from its metrics.jsonl into plots/*.png.

Each function takes the records of metrics.jsonl and gives a matplotlib Figure, or None where the numbers for it
are missing. Matplotlib is imported when the first one is drawn: training does not need it.
"""

import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.report.drawing import (
    BLUE,
    COLORS,
    DPI,
    GREEN,
    GREY,
    RED,
    STYLE,
    WIDTH,
    draw_curve,
    draw_dots,
    make_panels,
    number_steps,
)
from ppo_jax.report.series import (
    NO_LABELS,
    Labels,
    Records,
    evaluated_judges,
    initial_spread,
    series,
    values_against_kl,
)
from ppo_jax.runs.output import rundir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plot(NamedTuple):
    """One picture of the report."""

    path: Path
    title: str
    caption: str  # how to read it


def draw(run_dir: str | os.PathLike, labels: Labels = NO_LABELS) -> list[Plot]:
    """Draws every curve that metrics.jsonl has the numbers for; returns them in the order of the report.

    `labels` names judges that their short names do not explain.

    Raises ImportError when matplotlib is missing.
    """
    import matplotlib

    records = read_jsonl(Path(run_dir) / rundir.METRICS)
    folder = Path(run_dir) / rundir.PLOTS
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, title, caption, make in CURVES:
            figure = make(records, labels) if make in (reward_against_kl, judges) else make(records)
            if figure is not None:
                folder.mkdir(exist_ok=True)
                figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white")
                drawn.append(Plot(folder / f"{name}.png", title, caption))
    return drawn


def reward_and_kl(records: Records) -> "Figure | None":
    """Reward above, KL below, over updates; held-out evaluations as dots."""
    if not series(records, "ppo", "reward")[0] and not series(records, "eval", "reward")[0]:
        return None
    figure, (top, bottom) = make_panels(2, height=4.0)
    draw_curve(top, records, "ppo", "reward", BLUE, "training prompts")
    draw_dots(top, records, "reward", BLUE)
    top.set(title="Reward per response", ylabel="reward score")
    draw_curve(bottom, records, "ppo", "kl", RED, "training prompts")
    draw_dots(bottom, records, "kl", RED)
    bottom.set(title="KL from the reference policy", ylabel="nats per response", xlabel="PPO update")
    number_steps(bottom)
    if series(records, "eval", "reward")[0]:
        top.legend(loc="best")
    return figure


def reward_against_kl(records: Records, labels: Labels = NO_LABELS) -> "Figure | None":
    """Reward over sqrt(KL), the axis on which over-optimisation has a simple form (Gao et al. 2022, section 3).

    Judges whose spread is about the reward's, up to a factor of 3, share its axis.
    """
    train, held_out = values_against_kl(records, "ppo", "reward"), values_against_kl(records, "eval", "reward")
    if not train and not held_out:
        return None
    figure, (axes,) = make_panels(1, height=4.0)
    if train:
        axes.plot(*zip(*train, strict=True), ".", color=BLUE, alpha=0.35, ms=5, mew=0, label="training prompts")
    own = initial_spread(records, "reward")
    lines = [("reward", BLUE, "held-out prompts")]
    for name, color in zip(evaluated_judges(records, labels), itertools.cycle(COLORS), strict=False):
        if own and 1 / 3 <= initial_spread(records, name) / own <= 3:
            lines.append((name, color, labels.get(name, name)))
    for name, color, label in lines:
        points = values_against_kl(records, "eval", name)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, ms=4.5, mec="white", mew=0.8, label=label)
    axes.margins(0.06)
    axes.set(title="Reward against distance from the reference")
    axes.set(xlabel="√KL per response (√nats)", ylabel="reward score")
    axes.legend(loc="best")
    return figure


def judges(records: Records, labels: Labels = NO_LABELS) -> "Figure | None":
    """Change since the first evaluation of the reward and of what it never saw, in initial standard deviations."""
    names = [
        name for name in ("reward", *evaluated_judges(records, labels)) if len(series(records, "eval", name)[0]) > 1
    ]
    if "reward" not in names or len(names) < 2:
        return None
    figure, (axes,) = make_panels(1, height=3.1)
    scaled = all(initial_spread(records, name) for name in names)
    for name, color in zip(names, itertools.chain([BLUE], itertools.cycle(COLORS)), strict=False):
        steps, values = series(records, "eval", name)
        scale = initial_spread(records, name) if scaled else 1.0
        gains = [(value - values[0]) / scale for value in values]
        label = "reward (optimised)" if name == "reward" else labels.get(name, name)
        axes.plot(steps, gains, "o-", color=color, ms=4.5, mec="white", mew=0.8, label=label)
    axes.axhline(0, color=GREY, lw=0.9)
    unit = "standard deviations at update 0" if scaled else "own units"
    axes.set(title="Gain of the reward and of independent judges", xlabel="PPO update", ylabel=f"gain ({unit})")
    axes.legend(loc="best")
    number_steps(axes)
    return figure


def explained_variance(records: Records) -> "Figure | None":
    """1 - Var(returns - values) / Var(returns): how much of the returns the value head foresees."""
    steps, values = series(records, "ppo", "explained_variance")
    if not values:
        return None
    figure, (axes,) = make_panels(1, height=3.1)
    # the first updates of a zero-initialised head may be at -50: they would flatten the curve and drag its average
    shown = [{"step": s, "phase": "ppo", "value": max(v, -1.1)} for s, v in zip(steps, values, strict=True)]
    draw_curve(axes, shown, "ppo", "value", BLUE)
    axes.axhline(0, color=GREY, lw=0.9)
    axes.annotate(
        "0: no better than a constant", (0.99, 0), xycoords=("axes fraction", "data"),
        xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=7.5, color="#5b616a",
    )  # fmt: skip
    low = max(-1.0, min(values))
    axes.set_ylim(min(low * 1.1, -0.12), max(1.0, max(values)) * 1.03)
    below = sum(value < -1.1 for value in values)
    hidden = f" ({below} below −1.1 drawn there)" if below else ""
    axes.set(title=f"Value head: explained variance{hidden}", xlabel="PPO update", ylabel="fraction of variance")
    number_steps(axes)
    return figure


def response_length(records: Records) -> "Figure | None":
    """Tokens per response and, where it was measured, the fraction that ended with a stop token."""
    if not series(records, "ppo", "response_length")[0]:
        return None
    stops = bool(series(records, "ppo", "eos_rate")[0])
    figure, panels = make_panels(2 if stops else 1, height=4.0 if stops else 2.7)
    draw_curve(panels[0], records, "ppo", "response_length", BLUE, "training prompts")
    draw_dots(panels[0], records, "response_length", BLUE)
    panels[0].set(title="Response length", ylabel="tokens per response")
    panels[0].set_ylim(0, 1.15 * panels[0].get_ylim()[1])
    if stops:
        draw_curve(panels[1], records, "ppo", "eos_rate", RED, "training prompts")
        draw_dots(panels[1], records, "eos_rate", RED)
        panels[1].set(title="Responses that end by themselves", ylabel="fraction with EOS", ylim=(-0.03, 1.03))
    panels[-1].set_xlabel("PPO update")
    number_steps(panels[-1])
    if series(records, "eval", "response_length")[0]:
        panels[0].legend(loc="best")
    return figure


def diagnostics(records: Records) -> "Figure | None":
    """Small multiples of what tells whether the optimiser behaves."""
    wanted = (
        ("entropy", "Entropy", "nats per token"),
        ("clip_fraction", "Clip fraction", "fraction of tokens"),
        ("approx_kl", "KL old to new policy", "nats per token"),
        ("value_loss", "Value loss", "squared reward"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("kl_coef", "KL coefficient", "reward per nat"),
    )
    present = [item for item in wanted if series(records, "ppo", item[0])[0]]
    if not present:
        return None
    from matplotlib.figure import Figure

    rows = math.ceil(len(present) / 3)
    figure = Figure(figsize=(2 * WIDTH, 2.15 * rows + 0.1), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).flat
    for axes, (name, title, unit) in zip(grid, present, strict=False):
        draw_curve(axes, records, "ppo", name, BLUE)
        axes.set(title=title, ylabel=unit, xlabel="PPO update")
        if name == "kl_coef":  # often constant
            axes.set_ylim(0, 1.3 * max(series(records, "ppo", name)[1]) or 1.0)
        number_steps(axes)
    for axes in list(grid)[len(present) :]:
        axes.set_visible(False)
    return figure


def reward_model(records: Records) -> "Figure | None":
    """Bradley-Terry loss and pairwise accuracy while the reward model is trained."""
    figure = training_curves(records, "reward", "Reward model: Bradley-Terry loss", "nats per pair")
    if figure is not None:
        for axes, value, label in zip(figure.axes, (math.log(2), 0.5), ("chance (ln 2)", "chance (1/2)"), strict=False):
            axes.axhline(value, color=GREY, lw=0.9, ls=(0, (4, 3)), label=label)
            axes.legend(loc="best")
    return figure


def sft(records: Records) -> "Figure | None":
    """Cross-entropy while fine-tuning."""
    return training_curves(records, "sft", "Supervised fine-tuning: loss", "nats per token")


def training_curves(records: Records, phase: str, title: str, unit: str) -> "Figure | None":
    if not series(records, phase, "loss")[0]:
        return None
    accuracy = bool(series(records, phase, "accuracy")[0])
    figure, panels = make_panels(2 if accuracy else 1, height=4.0 if accuracy else 2.7)
    draw_curve(panels[0], records, phase, "loss", BLUE, "training batches")
    panels[0].set(title=title, ylabel=unit)
    if accuracy:
        draw_curve(panels[1], records, phase, "accuracy", BLUE, "training pairs")
        steps, values = series(records, phase, "heldout_accuracy")
        if steps:
            panels[1].plot(steps, values, "o-", color=GREEN, ms=4.5, mec="white", mew=0.8, label="held-out pairs")
        panels[1].set(title="Pairwise accuracy", ylabel="fraction of pairs")
    panels[-1].set_xlabel("optimiser step")
    number_steps(panels[-1])
    return figure


CURVES = (
    (
        "reward_kl",
        "Reward and KL over updates",
        "Line: training batches. Dots: evaluations on prompts held out.",
        reward_and_kl,
    ),
    (
        "reward_sqrt_kl",
        "Reward against √KL",
        "What the reward gains for the distance travelled (as in Gao et al. 2022). An independent judge that bends "
        "down while the reward still rises is over-optimisation.",
        reward_against_kl,
    ),
    (
        "judges",
        "Reward and independent judges",
        "Judges never seen in training. A reward that climbs while they stay or fall has been gamed.",
        judges,
    ),
    ("explained_variance", "Value explained variance", "1 is a perfect forecast of the returns.", explained_variance),
    ("response_length", "Response length", "A reward that likes long or short texts shows here.", response_length),
    ("reward_model", "Reward-model training", "Accuracy: pairs in the order of the human ratings.", reward_model),
    ("sft", "Supervised fine-tuning", "Loss on response tokens only.", sft),
    ("diagnostics", "Optimiser diagnostics", "Training batches, mean over the epochs of each update.", diagnostics),
)
