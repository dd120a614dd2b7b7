"""`ppo-jax ppo` asked to stop at random moments, and one whose KL explodes: exit codes, and what is saved.

The wait has a limit, which is far above what a step and a save take here: a run that does not end in it has failed.
"""

import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ppo_jax.cli.main import FAILED, PREEMPTED
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.processes.running import folder, last_good, resume_to, running, updates

__all__ = ["folder"]  # a fixture

ENDLESS = ("--resume", "auto", "--loop.updates", "1000000")


BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.long  # SIGTERM of real processes: test_preemption; each moment and signal: runs/test_signals
@pytest.mark.parametrize("signals", [BOTH[:1], 4 * BOTH], ids=["1", "8"])
def test_it_ends_with_75_at_the_update_that_is_saved_whenever_it_is_asked(
    folder: Path, signals: Sequence[signal.Signals]
) -> None:
    rng, before = random.Random(), 0
    for number in signals:
        with running(folder, *ENDLESS) as run:
            run.until("asked 2")
            time.sleep(rng.uniform(0, 0.5))
            run.process.send_signal(number)
            assert run.ends() == PREEMPTED, run.text
        done = last_good(folder)
        assert f"{number.name}: finishing this step and saving" in run.text
        assert f"; update {done} is saved. Go on with --resume" in run.text, run.text
        assert done > before and updates(folder) == list(range(1, done + 1))  # what was done is what is saved
        before = done
    resume_to(folder, before + 1)


@pytest.mark.long
def test_an_explosion_ends_with_1_and_leaves_the_checkpoints_from_before(folder: Path) -> None:
    """The first process of the run is well; in the second any KL is too far (the estimate may be below 0 first)."""
    with running(folder, "--loop.updates", "2", "--loop.keep", "3") as run:
        assert run.ends() == 0, run.text
    with running(folder, "--resume", "--loop.updates", "40", "--loop.keep", "3", "--loop.max-kl", "1e-9") as run:
        code = run.ends()
    assert code == FAILED and "Traceback" not in run.text, run.text
    found = re.search(r"update (\d+): the KL of the policy after update (\d+) to the reference is", run.text)
    assert found is not None, run.text
    after, before = int(found[1]), int(found[2])
    assert after == before + 1 >= 3 and updates(folder)[-1] == after
    checkpoints = Path("run") / rundir.CHECKPOINTS
    kept = store.all_steps(folder / checkpoints)
    assert kept[-1] == before == last_good(folder)  # that of update `after` is not saved
    assert f"To go back to update {kept[-2]}: move {checkpoints / str(before)} to another place" in run.text, run.text
    assert not (folder / "run" / rundir.FAULTS).exists()  # the batch is that of a sound program: none is dumped
