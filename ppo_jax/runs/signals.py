"""Signals that ask a run to stop: it finishes the step at hand and saves, and a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

SHOW_CURSOR = "\x1b[?25h"  # a live display hides it


@contextlib.contextmanager
def stop_requests(notify: Callable[[str], None]) -> Iterator[Callable[[], str | None]]:
    """Give, inside the block, asked() -> "SIGTERM" or "SIGINT" once that signal has arrived, else None.

    The first SIGTERM or SIGINT (Ctrl-C) only asks, and is announced through `notify`; more SIGTERMs change nothing,
    since a scheduler may send several. A second SIGINT ends the process at once, with exit status 130, even where it
    waits for a device: a thread reads the signals as they come, and does not wait for the interpreter.

    Signals belong to the main thread: in any other the block changes nothing, and asked() is always None. So it is in a
    run of several processes, which have to agree on the step to stop at: SIGTERM is left to JAX there, see
    `checkpoint.preempted`.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield lambda: None
        return
    arrived: list[str] = []
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while True:
            for number in os.read(read, 64):
                if not number:  # the block is left
                    return
                name = signal.Signals(number).name
                if name == "SIGINT" and "SIGINT" in arrived:
                    if sys.stdout.isatty():
                        os.write(1, SHOW_CURSOR.encode())
                    os.write(2, b"\ninterrupted at once; what was saved before is there\n")
                    os._exit(130)
                arrived.append(name)
                if len(arrived) == 1:
                    notify(f"{name}: finishing this step and saving (Ctrl-C ends the run at once)")

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    # The interpreter writes the number of every signal that has a handler in Python to this file, at once.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    earlier = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener.start()
    try:
        yield lambda: arrived[0] if arrived else None
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(write, b"\0")
        listener.join()
        os.close(read)
        os.close(write)
