"""`ppo-jax ppo` whose disk fills up, whose run directory turns read-only, is removed, or has a file in its place.

Training goes on, what failed is said at once, the exit code tells whether the state is saved, and the last good
checkpoint survives.
"""

import contextlib
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ppo_jax import checkpoint, metrics, rundir
from ppo_jax.cli import FAILED, MISTAKE
from tests.test_launch import make_world, options

LIMIT = 240.0  # seconds until a wait has failed
REWARD = """
import time
calls = 0
def length(prompts, responses, metadata):
    global calls
    calls += 1
    print("asked", calls, flush=True)
    time.sleep(0.02)
    return [len(response) / 10 for response in responses]
"""
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


# Run in the new process before the command: mode bits count, also for root, who is above them by one capability.
AS_ANYBODY = f"""
import ctypes, os, sys
if os.geteuid() == 0:
    ctypes.CDLL(None, use_errno=True).prctl({PR_CAPBSET_DROP}, {CAP_DAC_OVERRIDE}, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Run:
    """The command in a process of its own, and what it says, line by line."""

    def __init__(self, folder: Path, *more: str) -> None:
        command = [
            sys.executable,
            "-c",
            AS_ANYBODY,
            str(Path(sys.executable).with_name("ppo-jax")),
            "ppo",
            *options("run"),
            *more,
        ]
        command += ["--loop.eval-every", "0", "--loop.checkpoint-every", "1", "--loop.schedule", "constant"]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "400"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def until(self, *words: str) -> None:
        """Waits until every one of `words` has been said, from now on."""
        end, left = time.monotonic() + LIMIT, set(words)
        while left:
            line = self.lines.get(timeout=max(end - time.monotonic(), 0.01))
            assert line is not None, f"{left} was never said:\n{self.text}"
            self.said.append(line)
            left -= {word for word in left if word in line}

    def goes_on(self) -> None:
        """Waits for three more updates."""
        for _ in range(3):
            self.until("asked")

    def ends(self) -> int:
        code = self.process.wait(LIMIT)
        while (line := self.lines.get(timeout=LIMIT)) is not None:
            self.said.append(line)
        return code

    @property
    def text(self) -> str:
        return "".join(self.said)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for all runs of this file."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def folder(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    make_world(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


@contextlib.contextmanager
def running(folder: Path, *more: str) -> Iterator[Run]:
    run = Run(folder, *more)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def saved(folder: Path) -> None:
    """Waits until there are checkpoints."""
    end = time.monotonic() + LIMIT
    while (checkpoint.latest_step(folder / "run" / rundir.CHECKPOINTS) or 0) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)


def last_good(folder: Path) -> int:
    """The newest checkpoint, every array of which is what was saved."""
    path = folder / "run" / rundir.CHECKPOINTS
    arrays = checkpoint.read_arrays(path, [n for n, e in checkpoint.read_manifest(path).items() if 0 not in e["shape"]])
    assert all(np.isfinite(x).all() for x in arrays.values() if np.issubdtype(x.dtype, np.floating))
    found = checkpoint.latest_step(path)
    assert found is not None
    return found


def updates(folder: Path) -> list[int]:
    return [r["step"] for r in metrics.read_jsonl(folder / "run" / rundir.METRICS) if r["phase"] == "ppo"]


def resume_to(folder: Path, last: int) -> None:
    with running(folder, "--resume", "--loop.updates", str(last)) as run:
        assert run.ends() == 0, run.text
    assert updates(folder) == list(range(1, last + 1))
    assert last_good(folder) == last
    assert (folder / "run" / rundir.REPORT).is_file()


def fill(run: Run, folder: Path) -> None:
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def empty(run: Run, folder: Path) -> None:
    if run.process.poll() is None:
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def forbid(run: Run, folder: Path) -> None:
    for path in (folder / "run", *(folder / "run").rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


def allow(run: Run, folder: Path) -> None:
    for path in (folder / "run", *(folder / "run").rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


FAULTS: dict[str, tuple[Callable, Callable, str]] = {
    "full disk": (fill, empty, "File too large"),
    "read-only": (forbid, allow, "Permission denied"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_written_is_said_kept_and_written_later_and_no_saved_state_is_promised(
    folder: Path, fault: str
) -> None:
    """The fault comes and goes; it comes again, and the run is asked to stop in it."""
    begin, end, why = FAULTS[fault]
    with running(folder, "--loop.updates", "1000000") as run:
        saved(folder)
        begin(run, folder)
        run.until("metrics.jsonl cannot be written", "a checkpoint could not be saved")
        run.goes_on()
        end(run, folder)
        run.until("metrics.jsonl is written again, and nothing of it is missing")
        run.goes_on()
        begin(run, folder)
        run.until("metrics.jsonl cannot be written", "a checkpoint could not be saved")
        run.goes_on()
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == FAILED, run.text
    assert why in run.text and "Traceback" not in run.text, run.text
    end(run, folder)
    good = last_good(folder)
    assert "its state is not saved: " in run.text and f"--resume goes on from update {good}" in run.text, run.text
    resume_to(folder, good + 2)


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_done(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run").chmod(0o555)
    with running(folder) as run:
        assert run.ends() == MISTAKE
    assert run.text.strip().endswith("choose another one") and len(run.text.strip().splitlines()) == 1, run.text
    assert "cannot write the run directory run: Permission denied" in run.text and "asked" not in run.text


def test_a_directory_that_is_removed_is_made_again_and_the_run_ends_well(folder: Path) -> None:
    with running(folder, "--loop.updates", "40") as run:
        saved(folder)
        (folder / "run").rename(folder / "gone")
        shutil.rmtree(folder / "gone", ignore_errors=True)
        assert run.ends() == 0, run.text
    assert "a checkpoint could not be saved" in run.text or "metrics.jsonl cannot be written" in run.text
    assert "Traceback" not in run.text, run.text
    assert last_good(folder) == 40 and (folder / "run" / rundir.EXPORT / "policy").is_dir()
    done = updates(folder)
    assert done and done == list(range(done[0], 41))  # what was written before is gone, the rest is all there


def test_where_a_file_has_taken_its_place_training_goes_on_and_the_end_is_no_success(folder: Path) -> None:
    with running(folder, "--loop.updates", "40") as run:
        saved(folder)
        (folder / "run").rename(folder / "moved")
        (folder / "run").write_text("")
        run.until("metrics.jsonl cannot be written")
        assert run.ends() == FAILED, run.text
    assert "asked 40" in run.text and "cannot hold checkpoints: [Errno 20] Not a directory" in run.text
    assert "Traceback" not in run.text, run.text
    (folder / "run").unlink()
    (folder / "moved").rename(folder / "run")
    assert 2 <= last_good(folder) < 40
