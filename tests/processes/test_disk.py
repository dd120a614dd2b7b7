"""`ppo-jax ppo` whose disk fills up, whose run directory turns read-only, is removed, or has a file in its place.

Training goes on, what failed is said at once, the exit code tells whether the state is saved, and the last good
checkpoint survives.
"""

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ppo_jax.cli.main import FAILED, MISTAKE
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.runs.output import rundir
from tests.processes.running import Run, folder, last_good, resume_to, running, saved, updates

__all__ = ["folder"]  # a fixture


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


@pytest.mark.long
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


@pytest.mark.long
def test_a_directory_that_is_removed_is_made_again_and_the_run_ends_well(folder: Path) -> None:
    with running(folder, "--loop.updates", "40") as run:
        saved(folder)
        (folder / "run").rename(folder / "gone")
        shutil.rmtree(folder / "gone", ignore_errors=True)
        assert run.ends() == 0, run.text
    # Whether a write fell into the gap is chance; that it would be said is shown by the next test.
    assert "Traceback" not in run.text, run.text
    assert last_good(folder) == 40 and (folder / "run" / EXPORT / "policy").is_dir()
    done = updates(folder)
    assert done and done == list(range(done[0], 41))  # what was written before is gone, the rest is all there
    assert (folder / "run" / rundir.CONFIG).is_file() and list((folder / "run" / rundir.TENSORBOARD).rglob("events*"))


def test_what_was_kept_in_memory_is_written_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No save is due before the end, and nothing else (TensorBoard) makes the directory again."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "tensorboardX.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "hidden"))
    with running(folder, "--loop.updates", "20", "--loop.checkpoint-every", "100") as run:
        run.goes_on()
        (folder / "run").rename(folder / "gone")
        assert run.ends() == 0, run.text
    assert "metrics.jsonl cannot be written" in run.text and "metrics.jsonl is written again" in run.text
    assert last_good(folder) == 20 and (folder / "run" / rundir.CONFIG).is_file()
    done = updates(folder)
    assert done and done == list(range(done[0], 21)) and done[0] <= 10


@pytest.mark.long
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
