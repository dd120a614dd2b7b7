"""The run directory: one folder that holds all that a run leaves behind.

    README.txt         what is what, in a few lines            tensorboard/   events, a folder per phase
    config.yaml        everything needed to repeat it          plots/         SVG curves
    metrics.jsonl      one line per update                     checkpoints/   state to resume from
    samples.jsonl      the same prompts at several steps       export/        adapter and heads, merged model
    evaluations.jsonl  the scores of every held-out prompt     damaged/       checkpoints that could not be read
    run.json           command, commit, machine, facts         faults/        batches that training stopped at
    summary.json       what the report is told             trackers.json  the run's pages elsewhere
    report.html        one self-contained page
    log.txt            all that was said

Only the first process of a multi-host run opens and writes it.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from ppo_jax.data.disk import make_directory, parse_json, read_bytes, replace_file, strict
from ppo_jax.data.documents import StoredRun, StoredSummary, StoredTrackers, check_document
from ppo_jax.data.jsonl import append_jsonl, repair_jsonl, truncate_jsonl
from ppo_jax.data.locks import LOCK, hold_directory, release_directory
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.parallel.launch import PRIVATE
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints.reading import check_path

CONFIG, METRICS, SAMPLES, EVALUATIONS = "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl"
RUN, SUMMARY, REPORT, LOG, README = "run.json", "summary.json", "report.html", "log.txt", "README.txt"
TENSORBOARD, PLOTS, CHECKPOINTS = "tensorboard", "plots", "checkpoints"
DAMAGED, FAULTS = "damaged", "faults"  # only where something went wrong
TRACKERS = "trackers.json"  # only where there are some (`output.trackers`)

FILES = (REPORT, CONFIG, METRICS, EVALUATIONS, SAMPLES, RUN, SUMMARY, LOG)
LAYOUT = (*FILES, TENSORBOARD, PLOTS, CHECKPOINTS, EXPORT)

GUIDE = f"""\
The directory of a run of ppo_jax. Not everything below is there: it depends on the stage, and on how far it came.

{REPORT}        look at this first; `ppo-jax report DIRECTORY` draws it again, also in the middle of a run
export/model       the trained model: base and adapter merged, a Hugging Face directory
export/policy      the adapter of the last update alone (with the value head): what `ppo-jax generate DIRECTORY` takes
export/best        the same of the update with the best evaluation, where that is not the last one
export/reward      a reward model: `ppo-jax ppo --reward DIRECTORY`
{CHECKPOINTS}        whole states of training; the same command with --resume goes on from the newest
{CONFIG}        every setting: `--config {CONFIG} --run-dir ANOTHER` does it again
{METRICS}      one line per update or evaluation (docs/metrics.md says what the names mean); {TENSORBOARD}/: the same
{SAMPLES}      what the policy wrote for held-out prompts; {EVALUATIONS}: the scores of all of them
{RUN}           the commands that made this, their commit and machine
{LOG}            what the run said
"""


def holds_run(path: str | os.PathLike) -> bool:
    """Tell whether `path` holds a run: a config.yaml or a metrics.jsonl."""
    return any((Path(path) / name).exists() for name in (CONFIG, METRICS))


def open_run(
    path: str | os.PathLike, resume: bool | Literal["no", "yes", "auto"] = False, overwrite: bool = False
) -> Path:
    """Make `path` ready for a run and return it.

    A new or empty directory is taken as it is, and one that holds other things keeps them. A directory that
    already holds a run is refused, unless
      resume: the run goes on. With "auto" a new one starts where there is none, so that a job that may be pre-empted
        can always pass it; with "yes" (or True) that is an error, since the directory is likely mistyped.
      overwrite: the files of a run are deleted, and nothing else.

    From here until its end this process holds the directory (`data.locks`): another one is refused.

    Raises ValueError that says what is in the way and what to do.
    """
    if resume not in (False, "no") and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: choose one")
    path = Path(path).expanduser()
    check_path(path)
    if not (path / LOCK).exists():  # no process of ours is or was there
        _look(path, resume, overwrite)
    try:
        make_directory(path)
        with tempfile.TemporaryFile(dir=path):  # a mode bit does not tell: a disk may be read-only or full
            pass
    except OSError as error:
        raise ValueError(f"cannot write the run directory {path}: {error.strerror}; choose another one") from error
    taken = hold_directory(path)
    try:
        found = _look(path, resume, overwrite)
    except ValueError:
        if taken:
            release_directory(path)
        raise
    for name in found if overwrite else ():
        item = path / name
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    return path


def _look(path: Path, resume: bool | Literal["no", "yes", "auto"], overwrite: bool) -> list[str]:
    """What of a run lies in `path`. Raises ValueError where that is not what was asked for."""
    if resume in (True, "yes") and not any((path / name).exists() for name in LAYOUT):
        raise ValueError(f"{path} holds no run to go on with: --resume auto starts one, or name another directory")
    found = [name for name in (*LAYOUT, DAMAGED, FAULTS, TRACKERS) if (path / name).exists()]
    if not found or resume not in (False, "no"):
        return found
    if not overwrite:
        raise ValueError(
            f"{path} already holds a run ({', '.join(found)}): "
            "pass --resume to go on, --overwrite to delete it, or choose another directory"
        )
    if not holds_run(path):  # a `checkpoints/` of somebody else is not ours to delete
        raise ValueError(
            f"{path} holds {', '.join(found)} but neither {CONFIG} nor {METRICS}, so it may not be a run of "
            "ppo_jax and nothing was deleted: empty it by hand or choose another directory"
        )
    return found


def truncate_run(path: str | os.PathLike, step: int, phases: Sequence[str] = ("ppo", "eval")) -> None:
    """Drop what a resumed run wrote after `step`: metrics of `phases`, scores of held-out prompts, and samples."""
    truncate_jsonl(Path(path) / METRICS, step, phases)
    drop_evaluations(path, step)


def drop_evaluations(path: str | os.PathLike, step: int) -> None:
    """Drop the scores and samples of evaluations after `step`."""
    for name in (EVALUATIONS, SAMPLES):
        truncate_jsonl(Path(path) / name, step)


def write_evaluation(
    path: str | os.PathLike,
    step: int,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[float]],
    scores: Sequence[str],
    put_samples: Callable[..., object] | None = None,
    put_scores: Callable[..., object] | None = None,
) -> None:
    """Write the first responses of an evaluation by `write_samples`, and the scores of all by `write_scores`.

    Args:
      prompts, responses: the first of them.
      scores: the columns that a sample shows.
      put_samples, put_scores: stand in for the two writers.
    """
    shown = {name: list(columns[name])[: len(prompts)] for name in scores}
    (put_samples or write_samples)(path, step, prompts, responses, shown)
    (put_scores or write_scores)(path, step, columns)


def write_scores(path: str | os.PathLike, step: int, columns: Mapping[str, Sequence[float]]) -> None:
    """Append to evaluations.jsonl {"step", "columns": {name: a number per held-out prompt}}."""
    file = Path(path) / EVALUATIONS
    repair_jsonl(file)
    append_jsonl(file, [{"step": int(step), "columns": {name: list(column) for name, column in columns.items()}}])


def write_samples(
    path: str | os.PathLike,
    step: int,
    prompts: Sequence[str],
    responses: Sequence[str],
    scores: Mapping[str, Sequence[float]],
) -> None:
    """Append one line per sample to samples.jsonl: {"step", "index", "prompt", "response", "scores": {name: number}}.

    `index` counts the prompts of this call, so give the same prompts in the same order at every step.
    Raises ValueError when the lists differ in length.
    """
    for name, column in {"responses": responses, **scores}.items():
        if len(column) != len(prompts):
            raise ValueError(f"samples of step {step}: {len(prompts)} prompts but {len(column)} of {name!r}")
    file = Path(path) / SAMPLES
    repair_jsonl(file)
    records = (
        {
            "step": int(step),
            "index": index,
            "prompt": prompt,
            "response": responses[index],
            "scores": {name: float(column[index]) for name, column in scores.items()},
        }
        for index, prompt in enumerate(prompts)
    )
    append_jsonl(file, records)


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write summary.json, whole or not at all (NaN as null)."""
    _write_json(Path(path) / SUMMARY, summary)


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """Read the record that `write_summary` wrote; {} when there is none. Raise ValueError with file and field."""
    file = Path(path) / SUMMARY
    return check_document(StoredSummary, _read_json(file), str(file))


def add_facts(path: str | os.PathLike, **facts: Any) -> None:
    """Put facts into run.json, over those of the same name."""
    _write_json(Path(path) / RUN, read_facts(path) | facts)


def read_facts(path: str | os.PathLike) -> dict[str, Any]:
    """Read what run.json says; {} when there is none."""
    file = Path(path) / RUN
    return check_document(StoredRun, _read_json(file), str(file))


def write_trackers(path: str | os.PathLike, known: Mapping[str, Any]) -> None:
    """Write trackers.json: {tracker: {"id": of the run there, "sent": {"phase/name": last step}}}."""
    _write_json(Path(path) / TRACKERS, known)


def read_trackers(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `write_trackers` wrote; {} when there is none."""
    file = Path(path) / TRACKERS
    return check_document(StoredTrackers, _read_json(file), str(file))


def _write_json(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(strict(record), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(file, f"{text}\n".encode("utf-8", "replace"))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = parse_json(read_bytes(file))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a JSON object")
    return found


def write_readme(path: str | os.PathLike) -> None:
    """Write README.txt, unless there is one that somebody else wrote."""
    file = Path(path) / README
    if not file.exists() or file.read_bytes().startswith(GUIDE.splitlines()[0].encode()):
        replace_file(file, GUIDE.encode())


def run_directory(path: Path, open_run: Callable[[], Path]) -> Path:
    """Open the run directory, in process 0 alone, and return its path to all.

    Every other process is given a private directory that goes when it ends, with a copy of the records so far and the
    run's own `checkpoints`: what all processes write is a checkpoint, and what they read is the same in all. The
    run directory must be on a disk that all of them see.
    """
    if jax.process_count() == 1:
        return open_run()
    shared = Path(path).expanduser().resolve()
    if is_first():
        shared = open_run()
        (shared / CHECKPOINTS).mkdir(exist_ok=True)
    multihost_utils.sync_global_devices("run directory")
    if is_first():
        return shared
    if not (shared / CHECKPOINTS).is_dir():
        raise ValueError(f"process {jax.process_index()} does not see {shared}: put the run on a disk that all share")
    private = Path(tempfile.mkdtemp(prefix="ppo_jax-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    PRIVATE.append(private)
    for name in (CONFIG, METRICS, SAMPLES, EVALUATIONS):
        if (shared / name).exists():
            shutil.copy(shared / name, private / name)
    (private / CHECKPOINTS).symlink_to(shared / CHECKPOINTS)
    return private
