"""Two `ppo-jax` commands at once in one directory: one of them works undisturbed, the other is refused, told who is
there, and changes nothing."""

import signal
import time
from pathlib import Path

import pytest

from ppo_jax.cli.main import MISTAKE, PREEMPTED
from ppo_jax.runs.output import rundir
from tests.processes import forks
from tests.processes.forks import LIMIT
from tests.processes.running import Run, folder, last_good, running, updates

__all__ = ["folder"]  # a fixture

ENDLESS = ("--loop.updates", "1000000")


def refused(run: Run, by: Run) -> None:
    assert run.ends() == MISTAKE, run.text
    assert f"run is in use by process {by.process.pid} on " in run.text and "Traceback" not in run.text, run.text
    assert "asked" not in run.text


def test_the_second_is_refused_and_the_first_goes_on(folder: Path) -> None:
    with running(folder, *ENDLESS) as one, running(folder, *ENDLESS) as two:  # 0 s between them
        end = time.monotonic() + LIMIT
        while one.process.poll() is None and two.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        first, second = (two, one) if one.process.poll() is not None else (one, two)
        refused(second, first)
        first.goes_on()
        for options in (("--resume", "auto"), ("--overwrite",)):
            with running(folder, *ENDLESS, *options) as late:
                refused(late, first)
            first.goes_on()
        first.process.send_signal(signal.SIGTERM)
        assert first.ends() == PREEMPTED, first.text
    done = last_good(folder)
    assert updates(folder) == list(range(1, done + 1))  # each once


def test_two_exports_into_one_directory(folder: Path) -> None:
    with running(folder, "--loop.updates", "1") as run:
        assert run.ends() == 0, run.text
    words = ["export", "run", "--to", "out"]
    with forks.ending([forks.start(forks.command, words, folder=folder) for _ in range(2)]) as both:
        codes = [process.wait() for process in both]
    assert sorted(codes) == [0, MISTAKE], forks.logs(both)
    (refusal,) = [process.text for process, code in zip(both, codes, strict=True) if code]
    assert "out is in use by process" in refusal or "out already exists" in refusal
    assert (folder / "out" / "model.safetensors").is_file()
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("name", ["lr=[0.1]"])
def test_a_name_that_cannot_be_read_back_trains_nothing(name: str, folder: Path) -> None:
    with running(folder, "--run-dir", name) as run:
        assert run.ends() == MISTAKE
    assert "checkpoints cannot be kept below a directory with [ in its name" in run.text and "asked" not in run.text
    assert not (folder / name).exists() and rundir.CONFIG not in {path.name for path in folder.iterdir()}
