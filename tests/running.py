"""`ppo-jax ppo` with a tiny model in a process of its own, whose words are read as it says them."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.checkpoints import read_arrays
from tests.parallel.test_launch import make_world, options

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
        ]
        command += ["--loop.eval-every", "0", "--loop.checkpoint-every", "1", "--loop.schedule", "constant", *more]
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
    while (store.latest_step(folder / "run" / rundir.CHECKPOINTS) or 0) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)


def last_good(folder: Path) -> int:
    """The newest checkpoint, every array of which is what was saved."""
    path = folder / "run" / rundir.CHECKPOINTS
    arrays = read_arrays(path, [n for n, e in store.read_manifest(path).items() if 0 not in e["shape"]])
    assert all(np.isfinite(x).all() for x in arrays.values() if np.issubdtype(x.dtype, np.floating))
    found = store.latest_step(path)
    assert found is not None
    return found


def updates(folder: Path) -> list[int]:
    return [r["step"] for r in read_jsonl(folder / "run" / rundir.METRICS) if r["phase"] == "ppo"]


def resume_to(folder: Path, last: int) -> None:
    with running(folder, "--resume", "--loop.updates", str(last)) as run:
        assert run.ends() == 0, run.text
    assert updates(folder) == list(range(1, last + 1))
    assert last_good(folder) == last
    assert (folder / "run" / rundir.REPORT).is_file()
