"""A study: settings that are run one after another, each of which leaves one line; what has its line is not run again.

python -m experiments.papers.kl_estimators                # into experiments/results/papers/kl_estimators.jsonl
python -m experiments.papers.kl_estimators --minutes 30   # no setting begins later than that; goes on next time
python -m experiments.papers.kl_estimators --smoke        # a toy of everything, into a temporary folder
"""

import dataclasses
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse
from ppo_jax.runs.facts import commit_of_code

RESULTS = Path(__file__).parent.parent / "results" / "papers"
Setting = dict[str, Any]  # JSON values; a record is known by its setting
Record = dict[str, Any]  # setting, result, and what is known of the run


class Study(NamedTuple):
    """What one notebook shows."""

    name: str
    settings: Callable[[bool], list[Setting]]  # (toy) -> in the order in which they are run
    run: Callable[[Setting, bool], dict[str, Any]]  # (setting, toy) -> JSON values


@dataclasses.dataclass(frozen=True)
class Options:
    """Run the settings of a study that have no record yet."""

    smoke: bool = False
    """Run a toy of every setting, to see that everything runs; by default into a temporary folder."""
    to: Path = Path()
    """The records go into this folder; by default experiments/results/papers."""
    minutes: float = math.inf
    """No setting begins later than this; the same line goes on with the others."""


def run_study(study: Study, args: list[str] | None = None) -> Path:
    """Run what has no record; return the file of the records."""
    options = parse(Options, args, prog=f"experiments.papers.{study.name}")
    folder = options.to if options.to != Path() else Path(tempfile.mkdtemp()) if options.smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path, begin = folder / f"{study.name}.jsonl", time.monotonic()
    facts = {"commit": commit_of_code(), "machine": describe_machine()}
    done = [record["setting"] for record in read_records(path)]
    missing = [setting for setting in study.settings(options.smoke) if setting not in done]
    for number, setting in enumerate(missing, start=1):
        if time.monotonic() - begin > 60 * options.minutes:
            break
        clock, processor = time.monotonic(), time.process_time()
        result = study.run(setting, options.smoke)
        times = {
            "date": datetime.now().astimezone().date().isoformat(),
            "minutes": round((time.monotonic() - clock) / 60, 3),
            "processor_minutes": round((time.process_time() - processor) / 60, 3),
        }
        line = json.dumps({"setting": setting, "result": result, **times, **facts}, allow_nan=True)
        append_line(path, line)
        print(f"{study.name} {number}/{len(missing)}  {times['minutes']:.2f} min  {setting}", flush=True)
    return path


def append_line(path: Path, line: str) -> None:
    """Add a line; one that a stop has cut off before it stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")


def read_records(path: Path) -> list[Record]:
    """The records of a file, in its order; a line that a stop cut off does not count."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def describe_machine() -> dict[str, Any]:
    """What the seconds of a record depend on."""
    try:
        load = round(os.getloadavg()[0], 1)
    except OSError:
        load = math.nan
    return {"cores": os.cpu_count(), "architecture": platform.machine(), "load": load}


def rounded(values: Any, digits: int = 5) -> Any:
    """Arrays and numbers as JSON lists of a few significant digits, which keeps the files small."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, dict):
        return {name: rounded(value, digits) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    return float(f"{values:.{digits}g}") if isinstance(values, float) else values


def run_as_command(study: Study) -> None:
    """What `python -m experiments.papers.NAME` does."""
    sys.exit(exit_code(f"experiments.papers.{study.name}", partial(run_study, study), resumable=True))
