"""The pictures of training batches: what PPO, SFT, DPO and reward models log at every step.

What stays the same over the whole run is not drawn: `constants` lists it.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from ppo_jax.report import drawing
from ppo_jax.report.drawing import BLUE, COLORS, GREEN, GREY, RED, draw_curve, draw_evaluations, make_panels
from ppo_jax.report.evidence import Evidence
from ppo_jax.report.plots import Picture
from ppo_jax.runs.output.series import Records, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curves(NamedTuple):
    """Metrics that share one panel."""

    name: str
    title: str
    unit: str
    metrics: tuple[str, ...]  # the first is the main one
    caption: str = ""


PPO_CURVES = (
    Curves("entropy", "Entropy", "nats per token", ("entropy",), "Of the policy. Near 0 it writes one thing only."),
    Curves("reward_std", "Spread of the reward", "score (std)", ("reward_std",), "Between the responses of a batch."),
    Curves("clip_fraction", "Clip fraction", "fraction of tokens", ("clip_fraction",), "Where the ratio was clipped."),
    Curves("ratio", "Ratio new / old", "probability ratio", ("ratio", "ratio_min", "ratio_max"), "Mean and extremes."),
    Curves("approx_kl", "KL old to new policy", "nats per token", ("approx_kl",), "How far one update goes."),
    Curves("value_loss", "Value loss", "squared score", ("value_loss",), "Of the critic."),
    Curves(
        "value_clip_fraction", "Value clip fraction", "fraction of tokens", ("value_clip_fraction",),
        "Near 1 the critic may not follow the returns.",
    ),
    Curves("grad_norm", "Gradient norm", "before clipping", ("grad_norm", "policy_grad_norm", "critic_grad_norm")),
    Curves("kl_coef", "KL coefficient", "score per nat", ("kl_coef",)),
    Curves("learning_rate", "Learning rate", "", ("learning_rate",)),
    Curves("invalid_scores", "Rewards that failed", "fraction of responses", ("invalid_scores",)),
    Curves("tokens_per_second", "Speed", "response tokens / s", ("tokens_per_second",)),
    Curves(
        "seconds", "Time of an update", "seconds", ("seconds", "rollout_seconds", "reward_seconds", "learn_seconds"),
        "All of it, and its parts where the reward is computed on the host; without the first one, which compiles.",
    ),
)  # fmt: skip
OFFLINE_CURVES = (
    Curves("loss", "Loss", "nats", ("loss", "heldout_loss"), "Line: training batches. Dots: evaluations."),
    Curves("accuracy", "Pairs in the right order", "fraction of pairs", ("accuracy", "heldout_accuracy")),
    Curves("margin", "Lead of the better response", "score", ("margin", "heldout_margin")),
    Curves("grad_norm", "Gradient norm", "before clipping", ("grad_norm",)),
    Curves("learning_rate", "Learning rate", "", ("learning_rate",)),
)
LABELS = {
    "ratio": "mean", "ratio_min": "smallest", "ratio_max": "largest", "grad_norm": "all", "policy_grad_norm": "policy",
    "critic_grad_norm": "critic", "seconds": "whole update", "rollout_seconds": "rollout", "reward_seconds": "reward",
    "learn_seconds": "learning",
}  # fmt: skip


def ppo_curves(records: Records) -> list[Curves]:
    """Those of PPO, with the parts of the reward where it has some."""
    names = {name for record in records if record.get("phase") == "ppo" for name in record}
    parts = tuple(sorted(name for name in names if name.startswith("reward/")))
    caption = "Means of the parts that the reward is summed from."
    return [Curves("reward_parts", "Parts of the reward", "score", parts, caption)] * bool(parts) + [*PPO_CURVES]


def training_pictures(evidence: Evidence) -> list[Picture]:
    """The pictures of PPO's batches."""
    records = evidence.records
    return [
        Picture(
            "explained_variance",
            "Value head: explained variance",
            "1 is a perfect forecast of the returns, 0 no better than a constant.",
            lambda: explained_variance(records),
        ),
        Picture(
            "response_length",
            "Response length",
            "With the fraction that ends by itself.",
            lambda: response_length(evidence),
        ),
        *(_picture(records, "ppo", curves, "PPO update") for curves in ppo_curves(records)),
    ]


def offline_pictures(records: Records, phase: str, of: str = "", kind: str = "held-out") -> list[Picture]:
    """The pictures of a stage on fixed data; `of` says whose they are where those of another stage are beside them.

    `kind` is that of the data of evaluations.
    """
    curves: tuple[Curves, ...] = OFFLINE_CURVES
    if of:
        prefix = f"{of.lower().replace(' ', '_')}_"
        curves = tuple(c._replace(name=prefix + c.name, title=f"{of}: {c.title.lower()}") for c in curves)
    return [_picture(records, phase, c, "optimiser step", f"{kind} data") for c in curves]


def constants(records: Records, phase: str = "ppo") -> list[tuple[str, str]]:
    """(title, value with its unit) of every curve that never changes."""
    curves = ppo_curves(records) if phase == "ppo" else OFFLINE_CURVES
    rows = []
    for one in curves:
        values = [value for name in one.metrics for value in series(records, phase, name)[1]]
        if values and not _changes(records, phase, one):
            rows.append((one.title, f"{values[0]:.4g} {one.unit}".strip()))
    return rows


def _picture(records: Records, phase: str, curves: Curves, below: str, evaluated: str = "") -> Picture:
    make = lambda: draw_curves(records, phase, curves, below, evaluated)  # noqa: E731
    return Picture(curves.name, curves.title, curves.caption, make)


def _changes(records: Records, phase: str, curves: Curves) -> bool:
    """Whether one of its metrics ever has another value than at first."""
    for name in curves.metrics:
        values = series(records, phase, name)[1]
        if values and max(values) - min(values) > 1e-6 * max(map(abs, values)):
            return True
    return False


def draw_curves(
    records: Records, phase: str, curves: Curves, below: str, evaluated: str = "held-out data"
) -> "Figure | None":
    """The metrics over the steps of a phase in one panel; None where they are missing or never change.

    `evaluated` is what the evaluations were on.
    """
    if curves.name == "seconds":
        records = [r for r in records if r.get("phase") != phase or r["step"] > 1]
    present = [name for name in curves.metrics if series(records, phase, name)[0]]
    if not present or not _changes(records, phase, curves):
        return None
    figure, (axes,) = make_panels(1, 2.0)
    for name, color in zip(present, (BLUE, *COLORS * len(present)), strict=False):
        label = LABELS.get(name, name.removeprefix("reward/"))
        if name.startswith("heldout_"):
            steps, values = series(records, phase, name)
            drawing.draw_points(axes, steps, values, [0.0] * len(steps), GREEN, True, label=evaluated)
        else:
            draw_curve(axes, records, phase, name, color, "training batches" if len(curves.metrics) == 2 else label)
    chance = {"reward": {"loss": math.log(2), "accuracy": 0.5}, "dpo": {"accuracy": 0.5}}.get(phase, {})
    level = next((value for name, value in chance.items() if name in curves.metrics), None)
    if level is not None:
        axes.axhline(level, color=GREY, lw=0.9, ls=(0, (4, 3)), label="chance")
    axes.set_ylabel(curves.unit)
    if len(present) > 1 or level is not None:
        axes.legend(loc="best")
    drawing.number_steps(axes, below)
    return figure


def explained_variance(records: Records) -> "Figure | None":
    """1 - Var(returns - values) / Var(returns): how much of the returns the value head foresees."""
    steps, values = series(records, "ppo", "explained_variance")
    if not values:
        return None
    figure, (axes,) = make_panels(1, 2.0)
    # the first updates of a zero-initialised head may be at -50: they would flatten the curve and drag its average
    shown = [{"step": s, "phase": "ppo", "value": max(v, -1.1)} for s, v in zip(steps, values, strict=True)]
    draw_curve(axes, shown, "ppo", "value", BLUE)
    axes.axhline(0, color=GREY, lw=0.9)
    low = max(-1.0, min(values))
    axes.set_ylim(min(low * 1.1, -0.12), max(1.0, max(values)) * 1.03)
    below = sum(value < -1.1 for value in values)
    axes.set(title=f"{below} below −1.1 drawn there" if below else "", ylabel="fraction of variance")
    drawing.number_steps(axes)
    return figure


def response_length(evidence: Evidence) -> "Figure | None":
    """Tokens per response and, where it was measured, the fraction that ended with a stop token."""
    records = evidence.records
    if not series(records, "ppo", "response_length")[0]:
        return None
    stops = bool(series(records, "ppo", "eos_rate")[0])
    figure, panels = make_panels(2 if stops else 1)
    draw_curve(panels[0], records, "ppo", "response_length", BLUE, "training prompts")
    draw_evaluations(panels[0], evidence, "response_length", BLUE)
    panels[0].set(title="Response length", ylabel="tokens")
    panels[0].set_ylim(0, 1.15 * panels[0].get_ylim()[1])
    if stops:
        draw_curve(panels[1], records, "ppo", "eos_rate", RED, "training prompts")
        draw_evaluations(panels[1], evidence, "eos_rate", RED)
        panels[1].set(title="Responses that end by themselves", ylabel="fraction with EOS", ylim=(-0.05, 1.05))
    drawing.number_steps(panels[-1])
    if series(records, "eval", "response_length")[0]:
        panels[0].legend(loc="best")
    return figure
