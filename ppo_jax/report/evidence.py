"""What a run's report is made from: its records, the scores of its held-out prompts, and what it was told."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.series import EVALUATED, NO_LABELS, Labels, Records, finite

Values = Mapping[str, Any]  # of one evaluation, by the names of phase "eval"
Columns = Mapping[int, Mapping[str, np.ndarray]]  # step -> name -> one number per held-out prompt, NaN where none is
COLUMN_OF = {"response_length": "tokens", "eos_rate": "ended"}  # a mean -> the column that it is the mean of


HELD_OUT = "the first and the last evaluation"


class Evidence(NamedTuple):
    """What the numbers, the curves and the verdict of a PPO run are made from."""

    records: Records = ()
    before: Values = {}  # of the initial policy; has "step" where it is an evaluation of `records`
    after: Values = {}  # of the final one
    source: str | None = None  # where the two come from, if not from evaluations that somebody named
    prompts: int | None = None  # behind each evaluation
    measured_on: str = EVALUATED  # what these prompts are
    columns: Columns = {}
    labels: Labels = NO_LABELS  # of judges
    best_metric: str = "reward"
    kl_budget: float | None = None  # nats per response that were allowed
    reward_accuracy: float | None = None
    raters: str = "their labels say"  # who put the pairs of that accuracy in order
    pairs: str = "held-out pairs"  # which they are

    @property
    def held_out(self) -> bool:
        """Whether before and after are evaluations."""
        return self.source in (None, HELD_OUT)


class Gain(NamedTuple):
    """The change of one score between two policies over the same held-out prompts."""

    before: float
    after: float
    in_std: float | None  # (after - before) / standard deviation of the first policy's scores
    error: float | None  # standard error of after - before
    paired: bool = False  # std(x_1 - x_0) / sqrt(n), prompt by prompt; else sqrt((s_0^2 + s_1^2) / n)

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def direction(self) -> int:
        """1 rose, -1 fell, 0 within two standard errors (without an error: the sign of the change)."""
        if self.error is not None and abs(self.change) <= 2 * self.error:
            return 0
        return (self.change > 0) - (self.change < 0)


def scores_before_after(summary: Mapping[str, Any], records: Records) -> tuple[Values, Values, str | None]:
    """Scores of the initial and of the final policy, and where they come from (None: the summary).

    In this order: the summary (the evaluation of the records that has its numbers, if there is one); the first and the
    last record of phase "eval"; the mean of the first and of the last tenth of phase "ppo".
    """
    evaluations = list(evaluations_by_step(records).values())
    if summary.get("before") and summary.get("after"):
        before, after = summary["before"], summary["after"]
        same = [[e for e in evaluations if _equal(e, stored)] for stored in (before, after)]
        return (same[0] or [before])[0], (same[1] or [after])[-1], None
    if len(evaluations) > 1:
        return evaluations[0], evaluations[-1], HELD_OUT
    updates = [r for r in records if r.get("phase") == "ppo"]
    if len(updates) < 2:
        return {}, {}, None
    tenth = max(1, len(updates) // 10)
    first, last = updates[:tenth], updates[-tenth:]
    names = ["reward", "kl", "kl_per_token", "entropy", "response_length", "eos_rate"]
    names = [name for name in names if all(finite(r, name) is not None for r in first + last)]
    before, after = ({name: sum(r[name] for r in part) / tenth for name in names} for part in (first, last))
    if (spread := finite(updates[0], "reward_std")) is not None:
        before["reward_std"] = spread
    updates_text = "update" if tenth == 1 else f"{tenth} updates"
    return before, after, f"the training batches of the first and last {updates_text}; no held-out evaluation"


def evaluations_by_step(records: Records) -> dict[int, dict[str, Any]]:
    """The records of phase "eval", the last of each step, in the order of steps."""
    found = {record["step"]: record for record in records if record.get("phase") == "eval"}
    return dict(sorted(found.items()))


def read_columns(run_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """evaluations.jsonl, the last line of each step; {} of a run that has none."""
    lines = {line["step"]: line["columns"] for line in read_jsonl(run_dir / rundir.EVALUATIONS)}
    return {step: {name: _numbers(c) for name, c in columns.items()} for step, columns in lines.items()}


def _numbers(column: Sequence[Any]) -> np.ndarray:
    return np.array([math.nan if x is None else float(x) for x in column])


def gain(evidence: Evidence, name: str, before: Values | None = None, after: Values | None = None) -> Gain | None:
    """Change of `name` from `before` to `after` (those of the evidence); None where a number is missing.

    The error is that of the differences prompt by prompt, where the scores of both evaluations are kept: the same
    prompts and sampling keys make it smaller than that of independent samples.
    """
    before, after = evidence.before if before is None else before, evidence.after if after is None else after
    first, last = finite(before, name), finite(after, name)
    if first is None or last is None:
        return None
    spread, final_spread = finite(before, f"{name}_std"), finite(after, f"{name}_std")
    in_std = (last - first) / spread if spread else None
    differences = paired_differences(evidence.columns, before.get("step"), after.get("step"), name)
    if differences is not None:
        return Gain(first, last, in_std, float(differences.std(ddof=1)) / math.sqrt(len(differences)), True)
    if spread is None or not evidence.prompts:
        return Gain(first, last, in_std, None)
    final_spread = spread if final_spread is None else final_spread
    return Gain(first, last, in_std, math.hypot(spread, final_spread) / math.sqrt(evidence.prompts))


def paired_differences(columns: Columns, first: int | None, last: int | None, name: str) -> np.ndarray | None:
    """x_last - x_first of the prompts that have both; None without at least two, or without columns."""
    name = COLUMN_OF.get(name, name)
    sides = [columns.get(step, {}).get(name) for step in (first, last) if step is not None]
    if len(sides) < 2 or sides[0] is None or sides[1] is None or len(sides[0]) != len(sides[1]):
        return None
    differences = sides[1] - sides[0]
    differences = differences[np.isfinite(differences)]
    return differences if len(differences) > 1 else None


def mean_error(evidence: Evidence, values: Values, name: str) -> float | None:
    """Standard error of one evaluation's mean: spread / sqrt(prompts), of the kept scores where there are some."""
    column = evidence.columns.get(values.get("step", -1), {}).get(COLUMN_OF.get(name, name))
    if column is not None and np.isfinite(column).sum() > 1:
        scores = column[np.isfinite(column)]
        return float(scores.std(ddof=1)) / math.sqrt(len(scores))
    spread = finite(values, f"{name}_std")
    return None if spread is None or not evidence.prompts else spread / math.sqrt(evidence.prompts)


def best_evaluation(evidence: Evidence) -> Values | None:
    """The evaluation after update 0 with the highest `best_metric` (-NAME: the lowest), the last of equals, or None."""
    name = evidence.best_metric.removeprefix("-")
    sign = -1 if evidence.best_metric.startswith("-") else 1
    trained = [e for e in evaluations_by_step(evidence.records).values() if e["step"] and finite(e, name) is not None]
    return max(reversed(trained), key=lambda e: sign * e[name], default=None)


def _equal(record: Values, stored: Values) -> bool:
    ours, theirs = finite(record, "reward"), finite(stored, "reward")
    return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
