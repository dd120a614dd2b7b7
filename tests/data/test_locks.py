"""One process at a time in a directory: another is refused and told who has it; the dead hold nothing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from ppo_jax.data import locks
from ppo_jax.data.locks import Held, hold_directory, hold_target, release_all, release_directory, wait_for_target

# The file is run by itself: a process that imports no jax is there at once.
OTHER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("locks", {locks.__file__!r})
locks = importlib.util.module_from_spec(spec)
sys.modules["locks"] = locks
spec.loader.exec_module(locks)
from pathlib import Path
{{}}
print("has it", flush=True)
sys.stdin.read()
"""
DIRECTORY = "locks.hold_directory(Path(sys.argv[1]))"
TARGET = "held = locks.hold_target(Path(sys.argv[1])); held.__enter__()"


@contextlib.contextmanager
def other(path: Path, action: str = DIRECTORY) -> Iterator[subprocess.Popen]:
    """Another process that has it."""
    command = [sys.executable, "-c", OTHER.format(action), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "has it\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release_all()


def test_another_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with other(tmp_path / "run") as process:
        for path in (tmp_path / "run", tmp_path / "run" / ".." / "run"):
            with pytest.raises(
                Held, match=rf"run is in use by process {process.pid} on {socket.gethostname()} \(since"
            ):
                hold_directory(path)
        (tmp_path / "link").symlink_to("run")
        with pytest.raises(Held, match=f"process {process.pid} "):
            hold_directory(tmp_path / "link")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_the_dead_hold_nothing_and_the_stopped_do(number: signal.Signals, tmp_path: Path) -> None:
    with other(tmp_path) as process:
        process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitpid(process.pid, os.WUNTRACED)
            with pytest.raises(Held, match=f"process {process.pid} "):
                hold_directory(tmp_path)
            return
        process.wait()
        hold_directory(tmp_path)
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / locks.LOCK).acquire(timeout=0)


def test_again_is_once_and_a_fork_is_another(tmp_path: Path) -> None:
    hold_directory(tmp_path)
    hold_directory(tmp_path)
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(Held):
            hold_directory(tmp_path)
            code = 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    with pytest.raises(filelock.Timeout):  # nor has its end let go
        filelock.FileLock(tmp_path / locks.LOCK).acquire(timeout=0)
    release_directory(tmp_path)
    with other(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {locks.LOCK, locks.HOLDER}


def test_a_directory_that_was_removed_is_taken_again_unless_another_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    hold_directory(run)
    run.rename(tmp_path / "gone")
    run.mkdir()
    hold_directory(run)
    assert (run / locks.LOCK).is_file()
    run.rename(tmp_path / "gone too")
    run.mkdir()
    with other(run) as process, pytest.raises(Held, match=f"process {process.pid} "):
        hold_directory(run)


def test_a_target_is_held_while_it_is_made_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with other(target, TARGET) as process:
        with pytest.raises(Held, match=f"export is in use by process {process.pid} "), hold_target(target):
            pass
        said: list[str] = []
        with pytest.raises(Held), wait_for_target(target, said.append, timeout=0.1):
            pass
        assert len(said) == 1 and said[0].startswith(f"process {process.pid} on ") and "waiting" in said[0]
        process.kill()
        process.wait()
        with hold_target(target):
            pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_has_it_when_the_other_is_done(tmp_path: Path) -> None:
    target, said = tmp_path / "made once", []
    with other(target, TARGET) as process:

        def end(text: str) -> None:
            said.append(text)
            process.kill()

        before = time.monotonic()
        with wait_for_target(target, end):
            assert process.wait() and time.monotonic() >= before
    assert len(said) == 1


def test_what_a_holder_wrote_of_itself_need_not_be_readable(tmp_path: Path) -> None:
    with other(tmp_path):
        for content in ("", "{}", "[1]", '{"host": "h", "process": "x", "since": 0}'):
            (tmp_path / locks.HOLDER).write_text(content)
            with pytest.raises(Held, match="in use by another process: wait for it"):
                hold_directory(tmp_path)


def test_where_there_are_no_locks_a_file_is_one_and_the_message_says_how_to_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk without flock, when a process of another machine died and left its file."""
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    (tmp_path / locks.LOCK).write_text("12345\nanother-machine\n")
    (tmp_path / locks.HOLDER).write_text('{"host": "another-machine", "process": 12345, "since": 0}')
    with pytest.raises(Held, match=rf"process 12345 on another-machine.*is gone, remove {tmp_path / locks.LOCK}"):
        hold_directory(tmp_path)
    (tmp_path / locks.LOCK).unlink()
    hold_directory(tmp_path)
    release_directory(tmp_path)
    assert not (tmp_path / locks.LOCK).exists()
