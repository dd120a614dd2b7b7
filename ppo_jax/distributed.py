"""Starting one run on several machines, or as several processes on one.

    Cloud TPU pod slice      every host runs the same command with --distributed.start on
    Slurm                    srun starts one task per GPU or host; found by itself
    anything else            --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I

`experiments/launch/` holds a commented script for each. A process that dies is missed after `heartbeat` seconds, and
the others end with an error instead of waiting for it for ever: start the run again with --resume. One that fails
leaves at once (`leave`).
"""

import atexit
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from ppo_jax import rundir, sharding
from ppo_jax.processes import is_first
from ppo_jax.sharding import MeshConfig
from ppo_jax.train.ppo import PPOConfig

_PRIVATE: list[Path] = []  # directories that this process has made for itself


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others."""

    start: Literal["auto", "on", "off"] = "auto"
    """auto: where Slurm or a TPU pod says that there are several, or `coordinator` is given; on: ask the platform."""
    coordinator: str = ""
    """HOST:PORT on which process 0 listens; only where the platform does not tell."""
    processes: int = 0
    """How many there are, with `coordinator`."""
    process: int = -1
    """Number of this one, from 0, with `coordinator`."""
    heartbeat: int = 100
    """Seconds after which a silent process counts as dead, and all others end."""
    timeout: int = 300
    """Seconds to wait for the others at the start."""

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


def leave(code: int) -> None:
    """Ends this process at once where it is one of several; returns where it is not.

    At its usual end a process waits for the others, which wait for this one inside a program: all would hang until
    they are timed out. So one that has failed, and has said why, does not say goodbye; the others then fail too.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    for path in _PRIVATE:
        shutil.rmtree(path, ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def several(environment: dict[str, str]) -> bool:
    """Whether Slurm or a TPU pod slice says, in the environment, that this is one of several processes."""
    # The step's list of nodes is what srun adds; a batch script that calls the program itself has the rest too.
    if all(f"SLURM_{name}" in environment for name in ("JOB_ID", "PROCID", "STEP_NODELIST")):
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return len([host for host in hosts.split(",") if host]) > 1 or "MEGASCALE_NUM_SLICES" in environment


def start(config: DistributedConfig = DistributedConfig()) -> None:
    """Joins the other processes, if there are any; call it before anything touches a device.

    Raises:
      ConnectionError: they did not come together in time, or the platform does not say who they are.
    """
    if config.start == "off" or jax.distributed.is_initialized():
        return
    if not (config.coordinator or config.start == "on" or several(dict(os.environ))):
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


def use_mesh(config: MeshConfig) -> contextlib.AbstractContextManager[object]:
    """Inside the block everything runs on the mesh. One device alone needs none."""
    if config.size == 1 and jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(config))


def check_rows(config: MeshConfig, batch_size: int, ppo: PPOConfig) -> None:
    """Raises ValueError when a micro-batch would not spread over the devices that cut the batch."""
    pieces = ppo.num_minibatches * ppo.accumulate
    group = f" x ppo.group_size={ppo.group_size}" if ppo.group_size > 1 else ""
    what = f"a micro-batch (loop.batch_size={batch_size}{group} / ({ppo.num_minibatches} x {ppo.accumulate}))"
    sharding.check_rows(batch_size * ppo.group_size // pieces, config, what)


def run_directory(path: Path, open_run: Callable[[], Path]) -> Path:
    """The run directory, opened by process 0 alone.

    Every other process is given a private directory that goes when it ends, with a copy of the records so far and the
    run's own `checkpoints`: what all processes write is a checkpoint, and what they read is the same in all. The
    run directory must be on a disk that all of them see.
    """
    if jax.process_count() == 1:
        return open_run()
    shared = Path(path).expanduser().resolve()
    if is_first():
        shared = open_run()
        (shared / rundir.CHECKPOINTS).mkdir(exist_ok=True)
    multihost_utils.sync_global_devices("run directory")
    if is_first():
        return shared
    if not (shared / rundir.CHECKPOINTS).is_dir():
        raise ValueError(f"process {jax.process_index()} does not see {shared}: put the run on a disk that all share")
    private = Path(tempfile.mkdtemp(prefix="ppo_jax-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    _PRIVATE.append(private)
    for name in (rundir.CONFIG, rundir.METRICS, rundir.SAMPLES):
        if (shared / name).exists():
            shutil.copy(shared / name, private / name)
    (private / rundir.CHECKPOINTS).symlink_to(shared / rundir.CHECKPOINTS)
    return private
