"""One of two processes is gone, or never came: the other says so in a sentence and ends with 1. Started again, both go
on as if nothing had been."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from experiments import soak_report
from ppo_jax.cli import main as cli
from ppo_jax.parallel.launch import DistributedConfig, is_runtime_error
from ppo_jax.parallel.launch import start as join
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.processes import forks, world
from tests.processes.running import make_world, updates
from tests.processes.test_preemption import start_both
from tests.processes.world import Check, free_port


def meet_for_ever() -> None:
    """Collective calls without end: of a program called from Python, and of one that is dispatched without it."""
    mesh = jax.make_mesh((2,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    array = jax.make_array_from_process_local_data(rows, np.ones((1, 4), np.float32), (2, 4))
    center = jax.jit(lambda x: x - x.mean(0))
    for number in range(10**9):
        center(array).block_until_ready()
        multihost_utils.process_allgather(np.array(number))
        if number == 3:
            print("have met", flush=True)


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 0),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long),
    ],
)
def test_the_other_of_two_ends_with_1_and_says_that_it_was_left(
    tmp_path: Path, number: signal.Signals, victim: int
) -> None:
    """Process 0 is the one that all are joined through. One that is stopped is as one whose machine is gone."""
    with forks.ending(world.start(tmp_path, [Check("meeting", meet_for_ever, [])], heartbeat=3)) as started:
        for process in started:
            process.until("have met")
        started[victim].send_signal(number)
        left = started[1 - victim]
        assert left.wait(60) == cli.FAILED, left.text
    assert f"process {1 - victim} of 2 ends, since another one is gone" in left.text
    assert "start all of them again with --resume" in left.text and "Traceback" not in left.text


def wait_alone(process: int) -> int:
    given = DistributedConfig(
        coordinator=f"127.0.0.1:{free_port()}", processes=2, process=process, timeout=1, heartbeat=10
    )
    return cli.exit_code("prog", lambda: join(given))


def test_one_whose_partner_never_comes_says_so_and_ends_with_1(tmp_path: Path) -> None:
    with forks.ending([forks.start(wait_alone, process, folder=tmp_path) for process in range(2)]) as alone:
        for number, process in enumerate(alone):
            assert process.wait(60) == cli.FAILED, process.text
            assert process.text.startswith(f"prog: process {number} of 2 has waited 1 s at 127.0.0.1:"), process.text
            assert "not all of the others came" in process.text and process.text.count("\n") == 1


@pytest.mark.long
def test_a_pair_of_which_each_was_killed_leaves_what_a_quiet_pair_leaves(tmp_path: Path) -> None:
    for name in ("killed", "quiet"):
        (tmp_path / name).mkdir()
        make_world(tmp_path / name)
    killed, last = tmp_path / "killed", 6
    for victim in (0, 1):
        before = len(updates(killed))
        with forks.ending(start_both(killed, 100_000)) as both:
            end = time.monotonic() + forks.LIMIT
            while len(updates(killed)) < before + 2:
                assert time.monotonic() < end and both[0].poll() is None, forks.logs(both)
                time.sleep(0.02)
            both[victim].send_signal(signal.SIGKILL)
            assert both[1 - victim].wait() == cli.FAILED, forks.logs(both)
        last = max(last, (store.latest_step(killed / "run" / rundir.CHECKPOINTS) or 0) + 2)
    for name in ("killed", "quiet"):
        with forks.ending(start_both(tmp_path / name, last)) as both:
            assert [process.wait() for process in both] == [0, 0], forks.logs(both)
    soak_report.compare(killed / "run", tmp_path / "quiet" / "run")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed"), True),
        (jax.errors.JaxRuntimeError("anything"), True),
        (ValueError("UNKNOWN is not a reward"), False),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "INTERNAL: "), False),
        (RuntimeError("INTERNAL: "), False),
    ],
)
def test_what_a_program_on_the_devices_raises_is_told_from_a_mistake(error: Exception, expected: bool) -> None:
    assert is_runtime_error(error) == expected
