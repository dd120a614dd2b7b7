"""A sweep whose runs are made one after another: of `sft`, `reward`, `dpo`, or of any function of its settings."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import replace_file
from ppo_jax.parallel.agreement import of_first
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.sweep.board import Board
from ppo_jax.runs.sweep.plan import Plan
from ppo_jax.runs.sweep.ranges import describe
from ppo_jax.runs.sweep.study import Study
from ppo_jax.runs.sweep.task import Job, Task, job_settings
from ppo_jax.runs.sweep.values import final_value, read_records
from ppo_jax.train.loop import Interrupted, Stopped

FINISHED = "finished.json"  # the objectives of a run that has come to its end


def run_in_sequence(directory: Path, base: Any, plan: Plan, task: Task, study: Study | None, board: Board) -> None:
    """Runs settings of the study until all have ended, here or elsewhere.

    A run that another slice has left goes on from its checkpoint where the command can, and else begins anew; one that
    had come to its end is not repeated.
    """
    try:
        while True:
            claim = of_first(_claim(study) if is_first() else None)
            if claim is None:
                if of_first(study.all_ended() if study is not None else None):
                    return
                time.sleep(min(plan.config.heartbeat, 2.0))
                continue
            finals, fault = [], ""
            try:
                for seed in plan.space.seeds:
                    finals.append(_run(Job(claim[0], claim[1], claim[2], claim[3], seed), directory, base, plan, task))
            except Interrupted:
                if study is not None:
                    study.release(claim[0])
                raise
            except Stopped as error:
                fault = str(error)
            board.message(f"trial {claim[1]:04d} ({describe(claim[3])}): {fault or _shown(finals, plan)}")
            if study is not None:
                _tell(study, claim[0], finals, fault, plan)
    finally:
        if study is not None:
            for trial in list(study.held):
                study.release(trial)
            study.close()


def _claim(study: Study | None) -> list[Any] | None:
    claim = study.next() if study is not None else None
    return None if claim is None else list(claim)


def _run(job: Job, directory: Path, base: Any, plan: Plan, task: Task) -> list[float]:
    """The objectives of one run."""
    settings = job_settings(job, plan, base, directory)
    marker = settings.run_dir / FINISHED
    done = of_first(json.loads(marker.read_text()) if is_first() and marker.exists() else None)
    if done is not None:
        return done
    again: dict[str, Any] = {"resume": "auto"} if hasattr(settings, "resume") else {}
    if hasattr(settings, "overwrite") and not again:
        again = {"overwrite": _holds_run(settings.run_dir)}
    assert task.run is not None
    task.run(dataclasses.replace(settings, **again))
    values: list[float] = []
    if is_first():
        records = read_records(settings.run_dir)
        values = [final_value(records, metric, 1) for metric in plan.config.objective]
        replace_file(marker, json.dumps(values).encode())
    return of_first(values)


def _holds_run(path: Path) -> bool:
    """Whether an earlier attempt has begun there. What holds nothing that can be kept is removed."""
    if path.is_dir() and not (path / "config.yaml").exists() and is_first():
        shutil.rmtree(path)
    return path.is_dir()


def _shown(finals: list[list[float]], plan: Plan) -> str:
    columns = zip(*finals, strict=True)
    means = [sum(column) / len(column) for column in columns]
    return ", ".join(
        f"{metric.removeprefix('-')} {mean:.4g}" for metric, mean in zip(plan.config.objective, means, strict=True)
    )


def _tell(study: Study, trial: int, finals: list[list[float]], fault: str, plan: Plan) -> None:
    columns = [list(column) for column in zip(*finals, strict=True)]
    means = [sum(column) / len(column) for column in columns]
    facts = {"seeds": list(plan.space.seeds), "by_seed": columns}
    if fault or not all(mean == mean for mean in means):
        study.stop(trial, fault or "an objective is not a number", {})
    else:
        study.finish(trial, means, facts)
