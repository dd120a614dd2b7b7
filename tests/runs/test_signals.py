"""Signals: the first one asks, a second Ctrl-C ends the process at once, and afterwards all is as before."""

import os
import signal
import subprocess
import sys
import threading

from ppo_jax.runs.signals import stop_requests


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
    assert "interrupted at once" in process.stderr.read()
