"""SIGTERM of one process of two: both stop after the same update, save, and say so. What they saved is damaged: both go
on from the checkpoint before. One alone goes on from that."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ppo_jax.cli.main import PREEMPTED
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.parallel.test_launch import make_world, options
from tests.runs.checkpoints.test_resuming import arrays_file, flip

LIMIT = 400.0  # seconds until a wait has failed


def start(folder: Path, more: list[str]) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name("ppo-jax")), "ppo", *options("run"), "--loop.eval-every", "0", *more]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CALLS": str(folder / "calls-")}
    with (folder / f"log-{len(list(folder.glob('log-*')))}").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def updates(folder: Path) -> list[int]:
    path = folder / "run" / rundir.METRICS
    return [r["step"] for r in read_jsonl(path) if r["phase"] == "ppo"]


def start_both(folder: Path, last: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        joined = ["--distributed.coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--distributed.processes", "2"]
    joined += ["--mesh.fsdp", "2", "--resume", "auto", "--loop.updates", str(last), "--loop.schedule", "constant"]
    joined += ["--loop.checkpoint-every", "1"]
    return [start(folder, [*joined, "--distributed.process", str(i)]) for i in range(2)]


def test_one_is_evicted_and_all_stop_together(tmp_path: Path) -> None:
    make_world(tmp_path)
    both = start_both(tmp_path, 100_000)
    logs = lambda: "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("log-*")))
    try:
        end = time.monotonic() + LIMIT
        while len(updates(tmp_path)) < 2:
            assert time.monotonic() < end and both[0].poll() is None, logs()
            time.sleep(0.2)
        both[1].send_signal(signal.SIGTERM)
        assert [process.wait(LIMIT) for process in both] == [PREEMPTED] * 2, logs()
    finally:
        for process in both:
            process.kill()
            process.wait()
    done = updates(tmp_path)[-1]
    assert store.latest_step(tmp_path / "run" / rundir.CHECKPOINTS) == done
    assert f"after update {done}; update {done} is saved" in logs()

    flip(arrays_file(tmp_path / "run", done))
    again = start_both(tmp_path, done)
    try:
        assert [process.wait(LIMIT) for process in again] == [0, 0], logs()
    finally:
        for process in again:
            process.kill()
            process.wait()
    kept = Path("run") / rundir.DAMAGED / str(done)
    assert f"the damaged checkpoint of update {done} was moved to {kept}; going on from update {done - 1}" in logs()
    assert (tmp_path / kept).is_dir() and updates(tmp_path) == list(range(1, done + 1))

    alone = start(
        tmp_path, ["--resume", "auto", "--loop.updates", str(done + 1), "--loop.schedule", "constant"]
    )  # fmt: skip
    assert alone.wait(LIMIT) == 0, logs()
    assert updates(tmp_path) == list(range(1, done + 2))
    assert f"resumed at update {done}" in logs() and "machine.processes: 2 in the checkpoint, 1 now" in logs()
