"""Two slices of two processes each on one study, one of them killed at random moments, ten times and more.

All trials end, none counts twice, and every trial's records have no gap and no repeat.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_jax.runs.sweep.results import read_results
from tests.postgres import needs_postgres, postgres
from tests.runs.sweep.test_slice import records

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[3]
UPDATES, KILLS = 40, 10


class Slice:
    """One slice: processes that run the same command."""

    def __init__(self, directory: Path, config: dict, count: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environment.pop("XLA_FLAGS", None)
        if count == 1:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(directory.parent / "programs")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.out = log.open("ab")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.sweep_task", str(directory), json.dumps(config),
                 *([] if count == 1 else [coordinator, str(count), str(number)])],
                cwd=ROOT, env=environment, stdout=self.out, stderr=self.out,
            )
            for number in range(count)
        ]  # fmt: skip

    def kill(self) -> None:
        for process in random.sample(self.processes, len(self.processes)):
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.out.close()

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int | None]:
        return [process.wait(600) for process in self.processes]


@contextlib.contextmanager
def slices(directory: Path, config: dict, count: int, log: Path) -> Iterator[list[Slice]]:
    made = [Slice(directory, config, count, log) for _ in range(2)]
    try:
        yield made
    finally:
        for one in made:
            for process in one.processes:
                if process.poll() is None:
                    process.kill()


def done(directory: Path) -> int:
    return sum(len(records(path.parent)) for path in directory.glob("trials/*/metrics.jsonl"))


def kill_and_start_again(directory: Path, config: dict, count: int, log: Path, rng: random.Random) -> int:
    """The second slice is killed at a random moment after it has come to training, and started again."""
    kills = 0
    with slices(directory, config, count, log) as both:
        while not all(one.ended() for one in both):
            if kills < KILLS:
                before, until = done(directory), time.monotonic() + 90
                while done(directory) < before + 4 and time.monotonic() < until and not both[1].ended():
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 3.0))
                if not both[1].ended():
                    both[1].kill()
                    kills += 1
                    both[1] = Slice(directory, config, count, log)
            else:
                time.sleep(0.2)
        assert [one.codes() for one in both] == [[0] * count] * 2, log.read_text()[-6000:]
    return kills


def check(directory: Path, trials: int, log: Path) -> None:
    rows = read_results(directory).rows
    told = log.read_text()[-4000:]
    assert len(rows) == trials and {row.state for row in rows} == {"finished"}, told
    for row in rows:
        path = directory / "trials" / row.names[0]
        assert [r["step"] for r in records(path)] == list(range(1, UPDATES + 1)), row
        assert [r["step"] for r in records(path, "eval")] == list(range(0, UPDATES + 1, 10)), row
        assert row.objectives[0] == pytest.approx(records(path, "eval")[-1]["reward"])
    assert sum(row.attempts for row in rows) > trials, "nobody was killed with a trial"


CONFIG = {
    "trials": 16, "members": 2, "heartbeat": 0.5, "grace": 6.0, "chunk": 5, "attempts": 100, "pause": 0.25,
    "loop": {"updates": UPDATES, "eval_every": 10, "checkpoint_every": 4},
}  # fmt: skip


def test_journal_and_single_processes(tmp_path: Path) -> None:
    log, rng = tmp_path / "log", random.Random(1)
    kills = kill_and_start_again(tmp_path / "sweep", CONFIG, 1, log, rng)
    assert kills == KILLS
    check(tmp_path / "sweep", CONFIG["trials"], log)


@needs_postgres
def test_postgres_and_slices_of_two_processes(tmp_path: Path) -> None:
    """The database is killed and restarted meanwhile, too."""
    log, rng = tmp_path / "log", random.Random(2)
    with postgres() as server:
        config = CONFIG | {"storage": server.url, "study": "killed"}
        kills = kill_and_start_again(tmp_path / "sweep", config, 2, log, rng)
        assert kills == KILLS
        check(tmp_path / "sweep", config["trials"], log)


def test_journal_and_slices_of_two_processes(tmp_path: Path) -> None:
    log, rng = tmp_path / "log", random.Random(3)
    kills = kill_and_start_again(tmp_path / "sweep", CONFIG, 2, log, rng)
    assert kills == KILLS
    check(tmp_path / "sweep", CONFIG["trials"], log)
