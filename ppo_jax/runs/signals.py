"""Signals that ask a run to stop. In training it finishes the step at hand and saves; outside it ends at once, since
all that it has done is saved or made again. A second Ctrl-C ends it at once wherever it is."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from ppo_jax.runs.output.caller import in_words_of_caller

# Exit status of a run that is to be gone on with (sysexits.h's EX_TEMPFAIL), and of one that was interrupted at once.
PREEMPTED, INTERRUPTED = 75, 130
SHOW_CURSOR = "\x1b[?25h"  # a live display hides it
PATIENCE = 10.0  # seconds for a first step, which compiles and has nothing to lose yet
ASKS = (signal.SIGTERM, signal.SIGHUP)  # of a scheduler, and of a terminal that is gone
Notify = Callable[[str], None]


class Requests:
    """What `stop_requests` gives: called, the name of the first signal that has asked to stop, or None.

    unsaved: whether a step has been done here; until then the process may end without losing anything.
    saved: () -> the newest update that is on disk, or None; called in another thread than the run's.
    """

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self.unsaved = False
        self.saved: Callable[[], int | None] = lambda: None

    def __call__(self) -> str | None:
        return self.arrived[0] if self.arrived else None


class _Listener:
    """Reads signals in a thread as they come, also where the interpreter waits for a device.

    What they mean depends on where the run is: inside `stop_requests` they ask, through `requests`; inside
    `end_when_asked` (`leaves`) and outside of that SIGTERM and SIGHUP end the process.
    """

    def __init__(self) -> None:
        self.leaves = False
        self.requests: Requests | None = None
        self.notify: Notify = lambda text: None
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        # The interpreter writes the number of every signal that has a handler in Python to this file, at once.
        self.earlier = signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self.earlier)
        os.write(self.write, b"\0")
        self.thread.join()
        os.close(self.read)
        os.close(self.write)

    def _listen(self) -> None:
        while True:
            for number in os.read(self.read, 64):
                if not number:
                    return
                self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells all processes of
        elif self.requests is not None:
            self._ask(number.name, self.requests)
        elif self.leaves and number in ASKS:
            end_at_once(
                PREEMPTED, f"stopped by {number.name} at once; all that was saved is there. Go on with --resume"
            )

    def _ask(self, name: str, requests: Requests) -> None:
        if name == "SIGINT" and "SIGINT" in requests.arrived:
            end_at_once(INTERRUPTED, f"interrupted at once; {_what_is_saved(requests)}")
        requests.arrived.append(name)
        if len(requests.arrived) == 1:
            if self.leaves:
                later = threading.Timer(PATIENCE, self._leave_unless_unsaved, [name, requests])
                later.daemon = True
                later.start()
            self.notify(f"{name}: finishing this step and saving (Ctrl-C ends the run at once)")

    def _leave_unless_unsaved(self, name: str, requests: Requests) -> None:
        """End a run that is still in its first step here: a compilation may take longer than a scheduler waits."""
        if self.requests is requests and not requests.unsaved:
            end_at_once(PREEMPTED, f"stopped by {name} before a step was done; go on with --resume")


_listener: _Listener | None = None


@contextlib.contextmanager
def _listening(numbers: tuple[signal.Signals, ...]) -> Iterator[_Listener]:
    """Give the process's listener, with handlers for these signals; what is ignored (nohup) stays so."""
    global _listener
    own = _listener is None
    listener = _listener = _listener or _Listener()
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in wanted}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if own:
            _listener = None
            listener.close()


@contextlib.contextmanager
def end_when_asked() -> Iterator[None]:
    """End the process at once, inside the block, with exit status 75 where SIGTERM or SIGHUP arrives.

    The block is a whole command, and `stop_requests` inside it is where the run trains. Signals belong to the main
    thread: in any other the block changes nothing. In a run of several processes SIGTERM is JAX's from its start on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _listening(ASKS) as listener:
        listener.leaves = True
        try:
            yield
        finally:
            listener.leaves = False


@contextlib.contextmanager
def stop_requests(notify: Notify) -> Iterator[Requests]:
    """Give, inside the block, asked() -> "SIGTERM", "SIGHUP" or "SIGINT" once that signal has arrived, else None.

    The first of them only asks, and is announced through `notify`; more SIGTERMs change nothing, since a scheduler may
    send several. A second SIGINT (Ctrl-C) ends the process at once, with exit status 130.

    Signals belong to the main thread: in any other the block changes nothing, and asked() is always None. So it is in a
    run of several processes, which have to agree on the step to stop at: SIGTERM is left to JAX there, see
    `checkpoints.store.preempted`.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield requests
        return
    with _listening((signal.SIGINT, *ASKS)) as listener:
        listener.requests, listener.notify = requests, notify
        try:
            yield requests
            if requests.arrived and listener.leaves:  # too late to be heard in the block
                end_at_once(PREEMPTED, f"stopped by {requests()} at once; all is saved. Go on with --resume")
        finally:
            listener.requests = None


def _what_is_saved(requests: Requests) -> str:
    saved = None
    with contextlib.suppress(Exception):  # the process ends, whatever the disk says
        saved = requests.saved()
    return "no update has been saved" if saved is None else f"update {saved} is saved. Go on with --resume"


def end_at_once(code: int, text: str) -> None:
    """End this process without further ado; say why on standard error, where there is one."""
    text = in_words_of_caller(text)
    with contextlib.suppress(Exception):
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(1, SHOW_CURSOR.encode())
    with contextlib.suppress(Exception):
        if sys.stderr is not None:
            os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
    os._exit(code)
