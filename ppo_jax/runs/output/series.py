"""The records of metrics.jsonl as series of numbers, and which of their names are judges."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Records = Sequence[dict[str, Any]]
Labels = Mapping[str, str]  # name of a judge -> what people are shown
EVALUATED = "held-out prompts"  # what evaluations are of, unless there were too few to hold any out
NO_LABELS: Labels = {}
OWN = ("reward", "kl")  # scores of an evaluation that are no judges; nor are the parts of a reward, reward/NAME


def series(records: Records, phase: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric of one phase, in the order they were written."""
    points = [(r["step"], float(r[name])) for r in records if r.get("phase") == phase and r.get(name) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def judge_names(names: Iterable[str], labels: Labels = NO_LABELS) -> list[str]:
    """The judges among the names of an evaluation's values (each has a spread, NAME_std); those with a label first."""
    names = {name for name in names if not name.startswith("reward/")}
    found = {name.removesuffix("_std") for name in names if name.endswith("_std")} - set(OWN)
    found |= names & labels.keys()
    return [*(name for name in labels if name in found), *sorted(found - labels.keys())]


def evaluated_judges(records: Records, labels: Labels) -> list[str]:
    """The judges of all evaluations."""
    return judge_names((name for record in records if record.get("phase") == "eval" for name in record), labels)


def initial_spread(records: Records, name: str) -> float:
    """Standard deviation of a score over the held-out prompts at the first evaluation; 0 where it is unknown."""
    _, values = series(records, "eval", f"{name}_std")
    return values[0] if values else 0.0


def finite(values: Mapping[str, Any], name: str) -> float | None:
    """The finite number of that name, or None."""
    value = values.get(name)
    return float(value) if value is not None and math.isfinite(float(value)) else None
