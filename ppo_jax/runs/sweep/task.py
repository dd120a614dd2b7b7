"""What a sweep needs to know of the command or experiment that it runs again and again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.runs.setup import Result, Setup
from ppo_jax.runs.sweep.plan import Plan
from ppo_jax.runs.sweep.ranges import SEED, set_fields

TRIALS = "trials"


class Task(NamedTuple):
    """Either `setup` (PPO: runs become members of populations) or `run` (one run after another)."""

    command: str  # that makes one run of a config.yaml
    settings: type  # of one run: has seed and run_dir
    updates: Callable[[Any], int]  # how long a run is; 0: not known beforehand
    check: Callable[[Any], None] = lambda settings: None  # raises ValueError for settings that cannot be run
    setup: Callable[[Any], Setup] | None = None  # what a run is about; loads what runs share only once
    finish: Callable[[Path, Any, Setup, Result], None] = lambda directory, settings, setup, result: None
    run: Callable[[Any], None] | None = None


class Job(NamedTuple):
    """One run: a setting with one of its seeds."""

    trial: int  # the attempt, in the study
    run: int
    group: int
    values: dict[str, Any]
    seed: int


def job_name(job: Job, plan: Plan) -> str:
    """The name of its run directory: the number of the run, and its seed where there are several."""
    return f"{job.run:04d}" + (f"-seed{job.seed}" if len(plan.space.seeds) > 1 else "")


def job_settings(job: Job, plan: Plan, base: Any, directory: Path) -> Any:
    """The settings of one run of a sweep in `directory`: those of the command alone."""
    settings = set_fields(base, {**job.values, SEED: job.seed})
    own: dict[str, Any] = {"run_dir": directory / TRIALS / job_name(job, plan)}
    own |= {name: value for name, value in (("overwrite", False), ("resume", "no")) if hasattr(settings, name)}
    return dataclasses.replace(settings, **own)
