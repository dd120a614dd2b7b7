"""What a study holds, as rows: one for each setting, whatever became of its attempts."""

import contextlib
import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from ppo_jax.data.disk import replace_file
from ppo_jax.runs.sweep import search
from ppo_jax.runs.sweep.search import FINAL, RUN, SLICE, WHY
from ppo_jax.runs.sweep.study import ABOUT, attempts, runs

CSV, PARQUET, ABOUT_FILE = "trials.csv", "trials.parquet", "sweep.json"


class Row(NamedTuple):
    """One setting."""

    run: int
    names: tuple[str, ...]  # of its run directories, one for each seed
    values: dict[str, Any]
    state: str  # waits, trains, finished, pruned, stopped, given up
    why: str
    objectives: tuple[float, ...]  # means over the seeds; () before the end
    spread: tuple[float, ...]  # standard deviations over the seeds
    updates: int
    attempts: int
    slice: str
    course: dict[int, float]  # what it reported on the way, by update


class Results(NamedTuple):
    """A whole study."""

    rows: list[Row]
    paths: tuple[str, ...]  # the fields that were searched
    objective: tuple[str, ...]
    seeds: tuple[int, ...]
    importance: dict[str, float]  # of each field for the first objective, summing to 1; {}: not known
    about: dict[str, Any]  # where the study is, and the command that makes one run


def read_results(directory: Path, storage: str = "", name: str = "") -> Results:
    """Reads the study of the sweep in `directory`; by default the one that its sweep.json names.

    Raises FileNotFoundError where there is no sweep, ConnectionError where the database cannot be reached.
    """
    about = read_about(directory)
    url = storage or about["storage"]
    if not url and not (directory / search.JOURNAL).exists():
        raise FileNotFoundError(f"{directory}: its study, {search.JOURNAL}, is gone")
    study = optuna.load_study(study_name=name or about["study"], storage=search.open_storage(url, directory))
    return results_of(study)._replace(about=about)


def read_about(directory: Path) -> dict[str, Any]:
    """Where the study of a sweep is, and what makes one of its runs: {"storage", "study", "command"}."""
    path = directory / ABOUT_FILE
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no sweep: there is no {ABOUT_FILE} in it")
    return json.loads(path.read_text(encoding="utf-8"))


def write_about(directory: Path, storage: str, study: str, command: str) -> None:
    """Writes down where the study is (without the password), for `read_results`, and what makes one run."""
    shown = search.hide_password(storage) if storage else ""
    about = {"storage": shown, "study": study, "command": command}
    replace_file(directory / ABOUT_FILE, json.dumps(about).encode())


def results_of(study: optuna.Study) -> Results:
    """The rows of a study, in the order in which their settings were begun."""
    about = json.loads(study.user_attrs[ABOUT])
    trials = study.get_trials(deepcopy=False)
    seeds = tuple(about.pop("seeds"))
    objective = tuple(about.pop("objective"))
    rows = [_row(run, attempts(run.number, trials), seeds) for run in runs(trials)]
    kept = [row for row in rows if row.state != "none"]
    return Results(kept, tuple(about), objective, seeds, field_importance(study), {})


def _row(run: FrozenTrial, tries: Sequence[FrozenTrial], seeds: Sequence[int]) -> Row:
    ended = [one for one in tries if one.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    moving = [one for one in tries if one.state in (TrialState.RUNNING, TrialState.WAITING)]
    last = (ended or moving or list(tries))[-1]
    attributes = last.user_attrs
    why = str(attributes.get(WHY, attributes.get(FINAL, "")))
    return Row(
        run=run.number,
        names=tuple(f"{run.number:04d}" + (f"-seed{seed}" if len(seeds) > 1 else "") for seed in seeds),
        values=dict(max(tries, key=lambda one: len(one.params)).params),
        state=_state(last, why),
        why=why,
        objectives=tuple(last.values) if last.state == TrialState.COMPLETE and last.values else (),
        spread=tuple(attributes.get("spread", ())),
        updates=int(attributes.get("updates", max(last.intermediate_values, default=0))),
        attempts=len(tries),
        slice=str(attributes.get(SLICE, "")),
        course=dict(last.intermediate_values),
    )


def _state(trial: FrozenTrial, why: str) -> str:
    if trial.state == TrialState.FAIL:
        if FINAL not in trial.user_attrs:
            return "waits"  # its slice has died, and nobody has taken it up yet
        return "none" if RUN not in trial.user_attrs else "given up"
    names = {TrialState.COMPLETE: "finished", TrialState.RUNNING: "trains", TrialState.WAITING: "waits"}
    return names.get(trial.state, "pruned" if why.startswith("pruned") else "stopped")


def table(results: Results) -> list[dict[str, Any]]:
    """Rows of plain values: what the CSV and the Parquet file hold."""
    found = []
    for row in results.rows:
        line: dict[str, Any] = {"trial": row.run, "state": row.state} | {p: row.values.get(p) for p in results.paths}
        for i, metric in enumerate(results.objective):
            name = metric.removeprefix("-")
            line[name] = row.objectives[i] if row.objectives else None
            if len(results.seeds) > 1:
                line[f"{name}_std"] = row.spread[i] if len(row.spread) > i else None
        line |= {"updates": row.updates, "attempts": row.attempts, "slice": row.slice, "why": row.why}
        found.append(line | {"directories": " ".join(f"trials/{name}" for name in row.names)})
    return found


def write_tables(directory: Path, results: Results) -> None:
    """trials.csv, and trials.parquet where pyarrow is installed."""
    lines = table(results)
    names = list(lines[0]) if lines else ["trial", "state"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_file(directory / CSV, text.getvalue().encode())
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    columns: Mapping[str, list[Any]] = {name: _one_kind([line[name] for line in lines]) for name in names}
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), buffer)
    replace_file(directory / PARQUET, buffer.getvalue().to_pybytes())


def _one_kind(values: list[Any]) -> list[Any]:
    """A column of one type: text where values of several kinds meet."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    return [None if value is None else str(value) for value in values]


def forget_study(directory: Path, storage: str = "") -> None:
    """Deletes the study of a sweep where a database holds it."""
    about = read_about(directory)
    if url := storage or about["storage"]:
        with contextlib.suppress(KeyError):
            optuna.delete_study(study_name=about["study"], storage=search.open_storage(url, directory))


def field_importance(study: optuna.Study, objective: int = 0) -> dict[str, float]:
    """How much of an objective's spread over finished trials each field explains (PED-ANOVA, Watanabe et al. 2023).

    The shares sum to 1; {} where too few trials have finished.
    """
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    values = {trial.values[objective] for trial in finished if trial.values}
    if len(finished) < 4 or len(values) < 2:
        return {}
    sign = -1.0 if study.directions[objective] == optuna.study.StudyDirection.MAXIMIZE else 1.0
    with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError):
        warnings.simplefilter("ignore")
        low = optuna.importance.PedAnovaImportanceEvaluator()  # of what makes the target low
        target = lambda trial: sign * trial.values[objective]  # noqa: E731
        return dict(optuna.importance.get_param_importances(study, evaluator=low, target=target))
    return {}
