"""The tables of the report: scores before, at the best evaluation and after; accuracies; what never changed."""

from collections.abc import Mapping
from typing import Any

from ppo_jax.report.evidence import Evidence, Values, best_evaluation, gain
from ppo_jax.report.measures import HELD_OUT_MEASURES, MEASURES, Measure, measure_of
from ppo_jax.runs.output.series import Records, finite, judge_names, series


def score_columns(evidence: Evidence) -> list[tuple[str, Values]]:
    """(heading, values): before, the best evaluation where that is another than the last, and after."""
    before, after, best = evidence.before, evidence.after, best_evaluation(evidence)
    columns = [("before", before)]
    if best is not None and after.get("step") not in (None, best["step"]):
        columns.append((f"best (update {best['step']})", best))
    last = f"after (update {after['step']})" if len(columns) > 1 else "after"
    return [*columns, (last, after)]


def score_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The scores of `score_columns`, with units; only rewards and judges are measured in their own spread."""
    names = {*evidence.before, *evidence.after}
    judges = judge_names(names, evidence.labels)
    parts = sorted(name for name in names if name.startswith("reward/") and not name.endswith("_std"))
    columns = score_columns(evidence)
    rows = []
    for name in dict.fromkeys(("reward", *parts, *judges, *MEASURES)):
        found = gain(evidence, name)
        if found is None:
            continue
        measure = measure_of(name, evidence.labels)
        in_std = found.in_std if name in ("reward", *judges) else None
        error = f" ± {measure.write(found.error)}" if found.error else ""
        row = {
            "label": measure.label,
            "unit": measure.unit,
            "cells": [(heading, *_mean_and_spread(values, name, measure)) for heading, values in columns],
            "change": measure.write(found.change, sign=True),
            "error": error,
            "in_std": "" if in_std is None else Measure("", "").write(in_std, sign=True),
        }
        rows.append(row)
    return rows


def _mean_and_spread(values: Values, name: str, measure: Measure) -> tuple[str, str]:
    mean, spread = finite(values, name), finite(values, f"{name}_std")
    return "–" if mean is None else measure.write(mean), "" if spread is None else measure.write(spread)


def is_paired(evidence: Evidence) -> bool:
    """Whether the errors of the changes are those of differences prompt by prompt."""
    found = gain(evidence, "reward")
    return found is not None and found.paired


def held_out_rows(records: Records, phase: str) -> list[dict[str, Any]]:
    """The first and the last held-out value of everything that a stage on fixed data measures."""
    rows = []
    for name, measure in HELD_OUT_MEASURES.items():
        values = series(records, phase, f"heldout_{name}")[1]
        if values:
            cells = [("before", measure.write(values[0]), ""), ("after", measure.write(values[-1]), "")]
            change = measure.write(values[-1] - values[0], sign=True)
            rows.append({"label": measure.label, "unit": measure.unit, "cells": cells, "change": change})
            rows[-1] |= {"error": "", "in_std": ""}
    return rows


def accuracy_bars(summary: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """(label, accuracy, whether it is the model that was optimised): it beside floors and ceilings, best first."""
    rows = [(label, value, False) for label, value in summary.get("reference_accuracies", {}).items()]
    if summary.get("reward_accuracy") is not None:
        rows.append(("this reward model", summary["reward_accuracy"], True))
    if summary.get("judge_accuracy") is not None:
        rows.append(("the second reward model (judge)", summary["judge_accuracy"], False))
    return sorted(rows, key=lambda row: -row[1])
