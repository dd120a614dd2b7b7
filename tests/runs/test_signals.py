"""Signals: the first one asks, a second Ctrl-C ends the process at once, and afterwards all is as before."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from ppo_jax.runs import signals
from ppo_jax.runs.signals import PREEMPTED, end_when_asked, stop_requests


def until(condition) -> None:
    """The signals arrive in a thread."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_the_first_signal_asks_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    said: list[str] = []
    with stop_requests(said.append) as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: asked() == "SIGTERM" and said)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send several
        os.kill(os.getpid(), signal.SIGINT)  # one Ctrl-C after it is still polite
    assert asked() == "SIGTERM" and len(said) == 1 and "finishing this step" in said[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_another_thread_changes_nothing():
    found = []

    def work() -> None:
        with stop_requests(print) as asked:
            found.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, signal.SIG_DFL)]


BUSY = """
import sys, time
import numpy as np
from ppo_jax.runs.signals import stop_requests
with stop_requests(lambda text: print(text, flush=True)) as asked:
    asked.saved = lambda: 20
    print("ready", flush=True)
    x = np.ones((1500, 1500))
    while True:      # in C code most of the time, as a run that waits for its device
        np.linalg.svd(x)
"""


def test_a_second_interrupt_ends_it_at_once_even_in_c_code():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "finishing this step" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted at once; update 20 is saved. Go on with --resume" in process.stderr.read()


# -- a whole command ---------------------------------------------------------------------------------------------------


def life(act: Callable[[], object]) -> tuple[int, str]:
    """What becomes of a fork that calls `act`: its exit status, and what it said on standard error."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.dup2(write, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # pytest's own has no file
            act()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with open(read) as file:
        return os.waitstatus_to_exitcode(status), file.read()


def wait() -> None:
    threading.Event().wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_outside_training_it_ends_at_once_with_75(number: signal.Signals):
    def act() -> None:
        with end_when_asked():
            os.kill(os.getpid(), number)
            wait()

    code, said = life(act)
    assert code == PREEMPTED == 75 and f"stopped by {number.name} at once" in said and "--resume" in said


def test_inside_training_it_asks_and_afterwards_it_ends_at_once_again():
    said: list[str] = []

    def train() -> None:
        with stop_requests(said.append) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: asked() == "SIGHUP" and said)
            asked.unsaved = True

    def act() -> None:
        with end_when_asked():
            train()  # it has not looked, so it ends where the block does

    code, words = life(act)
    assert code == PREEMPTED and "stopped by SIGHUP at once; all is saved" in words
    assert life(train)[0] == 0  # without a command around it nothing ends it

    def later() -> None:
        with end_when_asked():
            with stop_requests(said.append):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            wait()

    assert life(later)[0] == PREEMPTED


def test_a_first_step_that_takes_long_has_nothing_to_lose(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)

    def act(unsaved: bool) -> None:
        with end_when_asked(), stop_requests(lambda text: None) as asked:
            asked.unsaved = unsaved
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(2)
            raise KeyError  # as `Interrupted` would leave the block

    code, said = life(lambda: act(False))
    assert code == PREEMPTED and "stopped by SIGTERM before a step was done" in said
    assert life(lambda: act(True))[0] == 99


def test_what_is_ignored_stays_so():
    """As under nohup."""

    def act() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with end_when_asked(), stop_requests(lambda text: None) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            threading.Event().wait(0.3)
            assert asked() is None

    assert life(act)[0] == 0


def test_an_interrupt_outside_training_is_the_interpreters():
    def act() -> None:
        with end_when_asked(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            wait()

    assert life(act)[0] == 0


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_two_interrupts_with_closed_streams_end_it_at_once(closed: tuple[int, ...]):
    """The interpreter then has None in their place."""

    def act() -> None:
        for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            if number in closed:
                os.close(number)
                setattr(sys, name, None)
        with stop_requests(lambda text: None) as asked:
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: asked() == "SIGINT")
            os.kill(os.getpid(), signal.SIGINT)
            wait()

    assert life(act)[0] == 130


def test_the_handlers_of_a_command_go_with_it():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with end_when_asked(), stop_requests(lambda text: None):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before
    assert not any(thread.name == "signals" for thread in threading.enumerate())
