"""A whole sweep in one directory: planned, checked, searched by this slice, and written down as tables.

sweep.json       where the study is              trials/0000/   an ordinary run directory for each run
sweep.yaml       everything that repeats it      trials.csv, trials.parquet, report.html, plots/
study.journal    the study, unless a database holds it
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ppo_jax.data.disk import replace_file
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.parallel.agreement import agree
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.output import rundir
from ppo_jax.runs.sweep.board import show_board
from ppo_jax.runs.sweep.plan import Plan, SweepConfig, check_space, describe_plan, make_plan, make_space
from ppo_jax.runs.sweep.ranges import read_ranges
from ppo_jax.runs.sweep.task import TRIALS, Task

SETTINGS = "sweep.yaml"
FILES = ("sweep.json", SETTINGS, "trials.csv", "trials.parquet", rundir.REPORT)
Resume = Literal["no", "yes", "auto"]


def plan_sweep(task: Task, base: Any, ranges: Mapping[str, str], config: SweepConfig) -> Plan:
    """The plan of a sweep around the settings `base`; nothing is loaded, compiled or written.

    Raises ValueError, with the field named, for anything that could not be run.
    """
    found = read_ranges(task.settings, ranges, base)
    space = make_space(found, base.seed, config.search)
    plan = make_plan(space, config, task.setup is not None)
    check_space(base, space, task.check)
    return plan


def show_plan(task: Task, base: Any, plan: Plan, directory: Path) -> list[str]:
    """The plan in words, with the minutes that it takes where earlier trials in the directory tell."""
    return describe_plan(plan, task.updates(base), _seconds_of_an_update(directory))


def run_sweep(directory: Path, base: Any, plan: Plan, task: Task, settings: str, resume: Resume = "auto") -> None:
    """Works as one slice on the study in `directory`, until all of its trials have ended; call it on the mesh.

    Args:
      base: the settings that trials differ from in what is searched; an instance of `task.settings`.
      settings: YAML of everything that repeats the sweep.

    Raises:
      ValueError: the directory, or the study, belongs to another sweep.
      ConnectionError: the database cannot be reached at the start.
      Interrupted: it was asked to stop; all runs are saved, and the same call goes on.
    """
    from ppo_jax.runs.sweep.results import results_of, write_about, write_tables  # Optuna: an extra
    from ppo_jax.runs.sweep.sequence import run_in_sequence
    from ppo_jax.runs.sweep.slice import Slice
    from ppo_jax.runs.sweep.study import Study

    agree(lambda: open_sweep(directory, resume, plan), ValueError)
    name, updates = directory.resolve().name, task.updates(base)
    with show_board(f"ppo_jax · sweep of {task.command}", is_first()) as board:
        board.message("\n".join(show_plan(task, base, plan, directory)))

        def join() -> Study | None:
            if not is_first():
                return None
            study = Study(directory, plan, name, updates, board.message)
            write_about(directory, plan.config.storage, study.study.study_name, task.command)
            if not (directory / SETTINGS).exists():
                replace_file(directory / SETTINGS, settings.encode())
            return study

        study = agree(join, ValueError, ConnectionError)
        if task.setup is not None:
            Slice(directory, base, plan, task, study, board).run()
        else:
            run_in_sequence(directory, base, plan, task, study, board)
        if study is not None:
            write_tables(directory, results_of(study.study))


def open_sweep(directory: Path, resume: Resume, plan: Plan) -> None:
    """Makes the directory ready; ValueError where it holds what must not be touched."""
    if not is_first():
        return
    exists = (directory / "sweep.json").exists()
    if exists and resume == "no":
        raise ValueError(
            f"{directory} already holds a sweep: pass --resume auto to join it, or choose another directory"
        )
    if not exists and resume == "yes":
        raise ValueError(f"{directory} holds no sweep to go on with: --resume auto starts one")
    if not exists and rundir.holds_run(directory):
        raise ValueError(f"{directory} holds a run, not a sweep: choose another --run-dir")
    (directory / TRIALS).mkdir(parents=True, exist_ok=True)


def delete_sweep(directory: Path, forget: Callable[[], object] = lambda: None) -> None:
    """Deletes what a sweep has left in its directory, and nothing else; `forget` does so for a study in a database."""
    if not (directory / "sweep.json").exists():
        return
    forget()
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    for path in directory.glob("study.journal*"):
        path.unlink()
    for name in (TRIALS, rundir.PLOTS):
        shutil.rmtree(directory / name, ignore_errors=True)


def _seconds_of_an_update(directory: Path) -> float | None:
    """The median over the newest records of earlier trials, which the whole population took; None: there are none."""
    seconds: list[float] = []
    for path in sorted((directory / TRIALS).glob(f"*/{rundir.METRICS}"))[-8:]:
        seconds += [r["seconds"] for r in read_jsonl(path)[-20:] if r.get("phase") == "ppo" and r.get("seconds")]
    return sorted(seconds)[len(seconds) // 2] if seconds else None
