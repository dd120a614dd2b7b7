"""What a run has reached, read from its own metrics.jsonl: so it is the same whatever process wrote it, and when."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.writers import RESERVED

Records = Sequence[Mapping[str, Any]]


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of a run; none where there are none yet."""
    path = directory / rundir.METRICS
    return read_jsonl(path) if path.exists() else []


def final_value(records: Records, metric: str, updates: int) -> float:
    """`metric` (without its sign) of the last evaluation, else the mean of the last `updates` records that have it.

    NaN where nothing was measured; ValueError where no record has the name.
    """
    name = metric.removeprefix("-")
    evaluations = [record for record in records if record["phase"] == "eval" and name in record]
    if evaluations:
        return _number(evaluations[-1][name])
    found = [record for record in records if name in record]
    if not found:
        known = sorted({key for record in records for key in record} - set(RESERVED))
        raise ValueError(f"no metric is called {name!r}; there are: {', '.join(known)}")
    same = [record for record in found if record["phase"] == found[-1]["phase"]]
    return _mean([_number(record[name]) for record in same[-max(updates, 1) :]])


def value_at(records: Records, metric: str, done: int, chunk: int) -> float:
    """`metric` over the last `chunk` of the first `done` updates; of the newest evaluation so far where only those
    have it. With its sign as it is logged."""
    name = metric.removeprefix("-")
    inside = [r for r in records if r["phase"] != "eval" and name in r and done - chunk < r["step"] <= done]
    if inside:
        return _mean([_number(record[name]) for record in inside])
    evaluations = [r for r in records if r["phase"] == "eval" and name in r and r["step"] <= done]
    return _number(evaluations[-1][name]) if evaluations else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
