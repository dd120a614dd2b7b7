"""The run directory: one folder that holds all that a run leaves behind.

    config.yaml      everything needed to repeat it          tensorboard/   events, a folder per phase
    metrics.jsonl    one line per update                     plots/         PNG curves
    samples.jsonl    the same prompts at several steps       checkpoints/   state to resume from
    summary.json     the numbers of the report               export/        adapter and heads, merged model
    report.html      one self-contained page                damaged/       checkpoints that could not be read
    screen.log       what was said, with times              faults/        batches that training stopped at

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

from ppo_jax.data.disk import make_directory, parse_json, replace_file, strict
from ppo_jax.data.documents import StoredSummary, check_document
from ppo_jax.data.jsonl import append_jsonl, repair_jsonl, truncate_jsonl
from ppo_jax.data.locks import LOCK, hold_directory, release_directory
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.parallel.launch import PRIVATE
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints.reading import check_path

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"
SUMMARY, REPORT = "summary.json", "report.html"
TENSORBOARD, PLOTS, CHECKPOINTS = "tensorboard", "plots", "checkpoints"
DAMAGED, FAULTS = "damaged", "faults"  # only where something went wrong
LOG = "screen.log"

LAYOUT = (CONFIG, METRICS, SAMPLES, SUMMARY, REPORT, TENSORBOARD, PLOTS, CHECKPOINTS, EXPORT)


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
    hold_directory(path)
    try:
        found = _look(path, resume, overwrite)
    except ValueError:
        release_directory(path)
        raise
    for name in (*found, *[LOG] * (path / LOG).exists()) if overwrite else ():
        item = path / name
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    return path


def _look(path: Path, resume: bool | Literal["no", "yes", "auto"], overwrite: bool) -> list[str]:
    """What of a run lies in `path`. Raises ValueError where that is not what was asked for."""
    if resume in (True, "yes") and not any((path / name).exists() for name in LAYOUT):
        raise ValueError(f"{path} holds no run to go on with: --resume auto starts one, or name another directory")
    found = [name for name in (*LAYOUT, DAMAGED, FAULTS) if (path / name).exists()]
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
    """Drop what a resumed run wrote after `step`: metrics of `phases`, and samples."""
    truncate_jsonl(Path(path) / METRICS, step, phases)
    truncate_jsonl(Path(path) / SAMPLES, step)


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
    text = json.dumps(strict(summary), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(Path(path) / SUMMARY, f"{text}\n".encode("utf-8", "replace"))


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """Read the record that `write_summary` wrote; {} when there is none. Raise ValueError with file and field."""
    file = Path(path) / SUMMARY
    if not file.exists():
        return {}
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    return check_document(StoredSummary, found, str(file))


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
    for name in (CONFIG, METRICS, SAMPLES):
        if (shared / name).exists():
            shutil.copy(shared / name, private / name)
    (private / CHECKPOINTS).symlink_to(shared / CHECKPOINTS)
    return private
