"""Start one run on several machines, or as several processes on one.

    Cloud TPU pod slice      every host runs the same command with --distributed.start on
    Slurm                    srun starts one task per GPU or host; found by itself
    anything else            --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I

`experiments/launch/` holds a commented script for each. A process that dies is missed at once by those that compute
with it, and after `heartbeat` seconds by all; they end with exit status 1 and a sentence instead of waiting for it for
ever: start the run again with --resume. One that fails ends at once (`end_process`).
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

PRIVATE: list[Path] = []  # directories that this process has made for itself
SPARE = 3600  # seconds that JAX waits longer than we do: at its own limit it ends the process by a signal
LOST = 1  # exit status of a process that another has left alone
# How the libraries below begin an error of their own, which may come as a ValueError too (from a call that is
# dispatched without Python), and what they say where another process is gone.
_STATUS = re.compile(
    "(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|INTERNAL|UNAVAILABLE|DATA_LOSS): "
)
_GONE = re.compile("Gloo|NCCL|coordination service|heartbeat|[Cc]onnection (closed|reset|refused)|[Ss]ocket closed")
_joining: list[str] = []  # where this process waits for the others, or has in vain


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others."""

    start: Literal["auto", "on", "off"] = "auto"
    """Join the other processes where Slurm or a TPU pod says that there are several, or `coordinator` is given (auto);
    always, as the platform says (on); or never (off)."""
    coordinator: str = ""
    """Process 0 listens on this HOST:PORT; it is only needed where the platform does not tell."""
    processes: int = 0
    """There are this many processes; it goes with `coordinator`."""
    process: int = -1
    """This process has this number, from 0; it goes with `coordinator`."""
    heartbeat: int = 100
    """A process counts as dead after this many silent seconds, and all others end."""
    timeout: int = 300
    """A process waits this many seconds for the others at the start."""

    def __post_init__(self) -> None:
        if self.start not in ("auto", "on", "off"):
            raise ValueError(f"distributed.start={self.start!r} must be one of auto, on, off")
        given = bool(self.coordinator), self.processes > 0, self.process >= 0
        if any(given) and not all(given):
            raise ValueError(
                "distributed.coordinator, .processes and .process belong together: give all three "
                "(--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I)"
            )
        if all(given) and self.process >= self.processes:
            raise ValueError(f"distributed.process={self.process} must be below distributed.processes={self.processes}")
        for name in ("heartbeat", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"distributed.{name}={getattr(self, name)} must be at least 1 second")


def is_one_of_more() -> bool:
    """Tell whether this process has joined others, or waits for them."""
    return bool(_joining) or (jax.distributed.is_initialized() and jax.process_count() > 1)


def is_runtime_error(error: BaseException) -> bool:
    """Tell whether an error comes from a program on the devices, not from what was given to it."""
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(
        type(error) is ValueError and _STATUS.match(str(error))
    )


def describe_lost_peer(error: BaseException) -> str | None:
    """Say in a sentence that another process is gone, where that is what an error means; else None."""
    if not is_runtime_error(error) or _joining or not is_one_of_more() or not _GONE.search(str(error)):
        return None
    reason = str(error).strip().splitlines()[0][:300]
    return f"{_name_self()} ends, since another one is gone or cannot be reached: see why there. {_ADVICE} ({reason})"


_ADVICE = "Then start all of them again with --resume; what was saved is there."


def _name_self() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def end_process(code: int) -> None:
    """End this process at once where it is one of several; return where it is not.

    At its usual end a process waits for the others, which wait for this one inside a program: all would hang until
    they are timed out. So one that has failed, and has said why, does not say goodbye; the others then fail too.
    """
    if is_one_of_more():
        _end_now(code)


def _end_now(code: int) -> None:
    for path in PRIVATE:
        shutil.rmtree(path, ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def is_one_of_several(environment: dict[str, str]) -> bool:
    """Tell whether Slurm or a TPU pod slice says, in the environment, that this is one of several processes."""
    # The step's list of nodes is what srun adds; a batch script that calls the program itself has the rest too.
    if all(f"SLURM_{name}" in environment for name in ("JOB_ID", "PROCID", "STEP_NODELIST")):
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return len([host for host in hosts.split(",") if host]) > 1 or "MEGASCALE_NUM_SLICES" in environment


def start(config: DistributedConfig = DistributedConfig()) -> None:
    """Join the other processes, if there are any; call it before anything touches a device.

    Raises:
      ConnectionError: they did not come together in time, or the platform does not say who they are.
    """
    if config.start == "off" or jax.distributed.is_initialized():
        return
    if not (config.coordinator or config.start == "on" or is_one_of_several(dict(os.environ))):
        return
    explicit: dict[str, Any] = {}
    if config.coordinator:
        names = ("coordinator_address", "num_processes", "process_id")
        explicit = dict(zip(names, (config.coordinator, config.processes, config.process), strict=True))
    where = config.coordinator or "the address that the platform names"
    _joining.append(where)
    try:
        _call_within(
            config.timeout,
            lambda: jax.distributed.initialize(
                **explicit,
                initialization_timeout=config.timeout + SPARE,
                heartbeat_timeout_seconds=config.heartbeat,
            ),
        )
    except TimeoutError as error:
        number = f"process {config.process} of {config.processes}" if config.coordinator else "this process"
        raise ConnectionError(
            f"{number} has waited {config.timeout} s at {where}, and not all of the others came: see whether each was "
            "started, with the same coordinator and a number of its own, and whether it reaches that address "
            "(--distributed.timeout waits longer)"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:  # OSError: a metadata server that does not answer
        if not jax.distributed.is_initialized():
            _joining.clear()
        raise ConnectionError(
            f"the processes did not come together at {where}: {error}. Give --distributed.coordinator, .processes and "
            ".process where the platform does not tell, and the same coordinator to all"
        ) from error
    _end_when_told(config.heartbeat)
    _joining.clear()
    if jax.default_backend() == "cpu":
        # One process may find a program in the cache that another compiles; the two do not order gloo's collectives
        # alike, and each waits for the other for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def _call_within(seconds: float, action: Callable[[], None]) -> None:
    """Call `action` in a thread; raise what it raises, or TimeoutError, and then it is left to itself."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True, name="joining")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if failed:
        raise failed[0]


def _end_when_told(heartbeat: int) -> None:
    """Let this process end with `LOST` and a sentence where JAX would end it by SIGABRT, from a thread in C++.

    That thread watches the others: it is what ends a process that waits inside a program for one whose machine is gone.
    JAX has no public callback for it that takes one in Python, and a handler of the module `signal` is called too late.
    """
    here = _name_self()

    def end(_: int) -> None:
        with contextlib.suppress(OSError):
            os.write(
                2,
                f"{here} ends, since another one is gone, or has been silent for {heartbeat} s "
                f"(--distributed.heartbeat), or the runtime has failed: see above, and there. {_ADVICE}\n".encode(),
            )
        _end_now(LOST)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(_kept[-1], ctypes.c_void_p))


_kept: list[Any] = []  # the handler that the kernel knows the address of
