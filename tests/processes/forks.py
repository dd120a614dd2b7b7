"""Processes of their own for tests, without an interpreter to start: one that has imported everything forks them.

`start(function, ...)` is what `python -m` would be, in milliseconds; a `Fork` is waited for and signalled like any
process. It shares nothing with the process of the tests but the environment, and has touched no device.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
LIMIT = 240.0  # seconds: a process that hangs has failed
MOST = 2**18  # bytes of a request
IMPORTED = (
    "ppo_jax.cli.main",
    # What the commands import when they come to it.
    "grain",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tensorboardX",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
)


class Fork:
    """A process of `start`, and what it says."""

    def __init__(self, control: int, output: int):
        self.pid, self._code = 0, None
        self._control, self._told = control, b""
        self._said: list[bytes] = []
        self._reader = threading.Thread(target=self._read, args=[output], daemon=True)
        self._reader.start()
        self.pid = int(self._line(LIMIT))

    def _read(self, output: int) -> None:
        with open(output, "rb", buffering=0) as file:
            while data := file.read(2**16):
                self._said.append(data)

    def _line(self, seconds: float) -> str:
        """The next line of the process that forks: the number of this one, or its exit code."""
        stop = time.monotonic() + seconds
        while not self._told.endswith(b"\n"):
            if not select.select([self._control], [], [], max(stop - time.monotonic(), 0.0))[0]:
                raise TimeoutError(f"process {self.pid} has not ended:\n{self.text}")
            self._told += (data := os.read(self._control, 1))
            assert data, "the process that forks has ended"
        line, self._told = self._told.decode(), b""
        return line

    def wait(self, seconds: float = LIMIT) -> int:
        """Its exit code, negative for a signal; TimeoutError where it has not ended after `seconds`."""
        if self._code is None:
            self._code = int(self._line(seconds))
            os.close(self._control)
            self._reader.join(10)
        return self._code

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            return self.wait(0.0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kills it where it still runs."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    @property
    def text(self) -> str:
        return b"".join(self._said).decode(errors="replace")

    def until(self, *words: str, since: int = 0) -> int:
        """Waits until every one of `words` stands in what it says after `since`; where the last one of them ends."""
        stop = time.monotonic() + LIMIT
        while True:
            ended, text = self.poll() is not None, self.text
            missing = [word for word in words if word not in text[since:]]
            if not missing:
                return max(text.index(word, since) + len(word) for word in words)
            assert not ended and time.monotonic() < stop, f"{missing} was never said:\n{text}"
            time.sleep(0.02)


@contextlib.contextmanager
def ending(started: Sequence[Fork]) -> Iterator[Sequence[Fork]]:
    """Ends those that are left, whatever happens."""
    try:
        yield started
    finally:
        for process in started:
            process.end()


def logs(started: Sequence[Fork]) -> str:
    """The ends of what they have said."""
    return "\n".join(f"-- process {i}:\n{process.text[-4000:]}" for i, process in enumerate(started))


def start(
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    devices: int = 1,
    environment: Mapping[str, str | None] | None = None,
) -> Fork:
    """`function(*arguments)` in a process of its own, which works in `folder`; its result is the exit code (None: 0).

    Args:
      function: of a module; its arguments are JSON.
      devices: CPU devices that it sees.
      environment: beside that of this process; None takes a variable away.
    """
    request = {
        "module": function.__module__,
        "name": function.__name__,
        "arguments": arguments,
        "folder": str(folder),
        "devices": devices,
        "environment": {k: v for k, v in (os.environ | (environment or {})).items() if v is not None},
    }
    message = json.dumps(request).encode()
    assert len(message) < MOST
    (control, their_control), (output, their_output) = os.pipe(), os.pipe()
    socket.send_fds(_server(), [message], [their_control, their_output])
    os.close(their_control)
    os.close(their_output)
    return Fork(control, output)


def command(words: list[str]) -> int:
    """`ppo-jax` with these words: a `function` for `start`."""
    from ppo_jax.cli import main as cli

    sys.argv = ["ppo-jax", *words]
    return cli.main(words)


# -- the process that forks --------------------------------------------------------------------------------------------


@functools.cache
def _server() -> socket.socket:
    """Started when a test first asks; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.processes.forks", str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()

    def stop() -> None:
        ours.close()
        server.wait()

    atexit.register(stop)
    return ours


def serve(control: socket.socket) -> None:
    """Forks a process for each request; tells its number, and at its end its exit code, through the request's pipe."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # no fork looks through what all have imported
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            wake.recv(1000)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with contextlib.suppress(BrokenPipeError):
                    os.write(running[pid], f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os.close(running.pop(pid))
        if control in ready:
            message, pipes, _, _ = socket.recv_fds(control, MOST, 2)
            if not message:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return
            told, output = pipes
            if pid := os.fork():
                running[pid] = told
                os.write(told, f"{pid}\n".encode())
                os.close(output)
            else:
                for other in (*running.values(), told):
                    os.close(other)
                _run(json.loads(message), output)


def _run(request: dict[str, Any], output: int) -> NoReturn:
    """As a process of its own: ends as an interpreter does, after its threads and what was registered for the end."""
    import jax

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # as TMPDIR says now
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        jax.config.update("jax_num_cpu_devices", request["devices"])
        found = getattr(importlib.import_module(request["module"]), request["name"])(*request["arguments"])
        code = 0 if found is None else int(found)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
