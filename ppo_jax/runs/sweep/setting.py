"""Trials under way: a setting with its seeds, the runs that are members now, and how a run may end early."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.runs.sweep.routine import Routine
from ppo_jax.runs.sweep.study import Claim
from ppo_jax.runs.sweep.task import Job
from ppo_jax.train.loop import Interrupted


class Pruned(Interrupted):
    """The run ends early since others are better; it is saved, and could go on."""


class Lost(RuntimeError):
    """Another slice has taken the run up: this one must not write there any more."""


@dataclasses.dataclass
class Setting:
    """A trial under way: the runs of one setting, one for each seed."""

    claim: Claim
    seeds: set[int]  # that have not ended
    reports: dict[int, dict[int, float]] = dataclasses.field(default_factory=dict)  # update -> seed -> metric
    finals: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # seed -> objectives
    updates: dict[int, int] = dataclasses.field(default_factory=dict)  # seed -> how many were done
    fault: str = ""  # why it ends early
    lost: bool = False


@dataclasses.dataclass
class Member:
    """A run in a place."""

    job: Job
    routine: Routine
    directory: Path
    updates: int
    done: int = 0
    shown: tuple[float, float] = (math.nan, math.nan)  # reward and KL of the last update
    state: str = "trains"


def mean_of(metrics: Any, name: str) -> float:
    """One mean of a member's metrics; NaN where nothing was measured."""
    total, count = metrics.get(name, (math.nan, 1))
    return float(total / count) if count else math.nan


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 for one."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
