"""Start one run on several machines, or as several processes on one.

    Cloud TPU pod slice      every host runs the same command with --distributed.start on
    Slurm                    srun starts one task per GPU or host; found by itself
    anything else            --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I

`experiments/launch/` holds a commented script for each. A process that dies is missed after `heartbeat` seconds, and
the others end with an error instead of waiting for it for ever: start the run again with --resume. One that fails
ends at once (`end_process`).
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import jax

PRIVATE: list[Path] = []  # directories that this process has made for itself


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


def end_process(code: int) -> None:
    """End this process at once where it is one of several; return where it is not.

    At its usual end a process waits for the others, which wait for this one inside a program: all would hang until
    they are timed out. So one that has failed, and has said why, does not say goodbye; the others then fail too.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    for path in PRIVATE:
        shutil.rmtree(path, ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
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
    try:
        jax.distributed.initialize(
            **explicit, initialization_timeout=config.timeout, heartbeat_timeout_seconds=config.heartbeat
        )
    except (RuntimeError, ValueError, OSError) as error:  # OSError: a metadata server that does not answer
        where = config.coordinator or "the address that the platform names"
        raise ConnectionError(
            f"the processes did not come together at {where}: {error}. Give --distributed.coordinator, .processes and "
            ".process where the platform does not tell, and the same coordinator to all"
        ) from error
    if jax.default_backend() == "cpu":
        # One process may find a program in the cache that another compiles; the two do not order gloo's collectives
        # alike, and each waits for the other for ever.
        jax.config.update("jax_enable_compilation_cache", False)
