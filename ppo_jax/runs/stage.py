"""One stage of training in one run directory, and where it starts: at its beginning, or at a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from ppo_jax.runs.checkpoints import resuming, store
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.train.loop import LoopConfig


class Stage(NamedTuple):
    """What the stages have in common."""

    directory: Path  # of the run, opened (`rundir.open_run`)
    phase: str  # what its records in metrics.jsonl are called
    loop: LoopConfig
    facts: Mapping[str, Any]  # what a checkpoint has to agree with before the run goes on from it
    config: str  # the resolved configuration, YAML; kept in config.yaml and in every checkpoint
    screen: Screen
    resume: bool | resuming.Resume = "no"
    evaluations: tuple[str, str] = ("eval", "")  # of the records of its evaluations: phase, and how their names begin
    length: str = "--loop.updates"  # the option that says how long it is

    @property
    def phases(self) -> tuple[str, ...]:
        """All phases of its records."""
        return tuple(dict.fromkeys((self.phase, self.evaluations[0])))


class Start(NamedTuple):
    """Where a stage starts."""

    state: Any
    last: int | None  # the update of the checkpoint; None: there is none
    best: dict[str, Any]  # the best evaluation so far: {"step", "metric", "value"}, or nothing


def start_or_resume(stage: Stage, state: Any) -> Start:
    """The newest whole checkpoint of the run, where it is to go on and has one; else `state`, which is a fresh one.

    What the run wrote after the checkpoint is dropped: it is done again.

    Raises:
      ValueError: the checkpoint is beyond the last update; or as `checkpoints.resuming.restore`.
    """
    stage.screen.begin(stage.phase)
    found = None if stage.resume in (False, "no") else _restore(stage, state)
    if found is None:
        return Start(state, None, {})
    state, best, metric = found.state, dict(found.meta.get("best", {})), stage.loop.best_metric
    if best and best.get("metric") != metric:
        stage.screen.message(
            f"the best checkpoint was chosen by {best.get('metric', 'something unknown')}, from here on by "
            f"{metric or 'none'}; earlier evaluations do not count"
        )
        state, best = dataclasses.replace(state, best=jnp.full_like(state.best, -jnp.inf)), {}
    return Start(state, found.step, best)


def _restore(stage: Stage, state: Any) -> resuming.Restored | None:
    directory, updates = stage.directory, stage.loop.updates
    checkpoints = directory / rundir.CHECKPOINTS
    latest = store.latest_step(checkpoints)
    if latest is not None and latest > updates:
        raise ValueError(
            f"{checkpoints} is at update {latest}, beyond {stage.length} {updates}: give at least {latest}, or another "
            "run directory"
        )
    found, phases = resuming.restore(directory, state, stage.facts, stage.screen.message), stage.phases
    if found is None:
        resuming.drop_later_records(directory, -1, phases)  # stopped before its first checkpoint: all is done again
        return None
    # Update 0 is saved where the first evaluation was given up or not yet followed by an update: it is made again.
    resuming.drop_later_records(directory, found.step or -1, phases)
    stage.screen.message(f"resumed at update {found.step}")
    return found
