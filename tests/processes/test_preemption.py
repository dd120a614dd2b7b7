"""SIGTERM of one process of two: both stop after the same update, save, and say so. What they saved is damaged: both go
on from the checkpoint before. One alone goes on from that."""

import signal
import time
from pathlib import Path

import pytest

from ppo_jax.cli.main import PREEMPTED
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.processes import forks
from tests.processes.running import make_world, options, updates
from tests.processes.world import free_port
from tests.runs.checkpoints.test_resuming import arrays_file, flip


def start(folder: Path, last: int, *more: str) -> forks.Fork:
    words = ["ppo", *options("run"), "--loop.eval-every", "0", "--resume", "auto", "--loop.updates", str(last)]
    words += ["--loop.schedule", "constant", *more]
    return forks.start(forks.command, words, folder=folder, environment={"CALLS": str(folder / "calls-")})


def start_both(folder: Path, last: int) -> list[forks.Fork]:
    joined = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", "2"]
    joined += ["--mesh.fsdp", "2", "--loop.checkpoint-every", "1"]
    return [start(folder, last, *joined, "--distributed.process", str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def evicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder, and the update after which both have stopped."""
    folder = tmp_path_factory.mktemp("evicted")
    make_world(folder)
    with forks.ending(start_both(folder, 100_000)) as both:
        end = time.monotonic() + forks.LIMIT
        while len(updates(folder)) < 2:
            assert time.monotonic() < end and both[0].poll() is None, forks.logs(both)
            time.sleep(0.1)
        both[1].send_signal(signal.SIGTERM)
        assert [process.wait() for process in both] == [PREEMPTED] * 2, forks.logs(both)
    done = updates(folder)[-1]
    assert f"after update {done}; update {done} is saved" in forks.logs(both)
    return folder, done


def test_one_is_evicted_and_all_stop_together(evicted: tuple[Path, int]) -> None:
    folder, done = evicted
    assert updates(folder) == list(range(1, done + 1))
    assert store.latest_step(folder / "run" / rundir.CHECKPOINTS) == done


@pytest.mark.long
def test_what_they_saved_is_damaged_and_both_then_one_alone_go_on(evicted: tuple[Path, int]) -> None:
    folder, done = evicted
    flip(arrays_file(folder / "run", done))
    with forks.ending(start_both(folder, done)) as again:
        assert [process.wait() for process in again] == [0, 0], forks.logs(again)
    said, kept = forks.logs(again), Path("run") / rundir.DAMAGED / str(done)
    assert f"the damaged checkpoint of update {done} was moved to {kept}; going on from update {done - 1}" in said
    assert (folder / kept).is_dir() and updates(folder) == list(range(1, done + 1))

    with forks.ending([start(folder, done + 1)]) as [alone]:
        assert alone.wait() == 0, alone.text
    assert updates(folder) == list(range(1, done + 2))
    assert f"resumed at update {done}" in alone.text
    assert "machine.processes: 2 in the checkpoint, 1 now" in alone.text
