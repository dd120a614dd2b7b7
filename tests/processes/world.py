"""A world of processes, joined by gloo, that run a list of checks one after the other; each writes what it found."""

import contextlib
import importlib
import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ppo_jax.cli import main as cli
from ppo_jax.parallel.launch import DistributedConfig
from ppo_jax.parallel.launch import start as join
from tests.processes import forks


class Check(NamedTuple):
    """`function(*arguments)`, which every process of the world calls; what it returns is JSON."""

    name: str
    function: Callable[..., Any]
    arguments: Sequence[Any]


class World(NamedTuple):
    """A world that has ended, and what it leaves."""

    folder: Path
    processes: Sequence[forks.Fork]

    def found(self, name: str) -> list[Any]:
        """What each process found in this check."""
        files = [self.folder / f"{name}.{i}.json" for i in range(len(self.processes))]
        assert all(file.exists() for file in files), forks.logs(self.processes)
        return [json.loads(file.read_text()) for file in files]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    folder: Path, checks: Sequence[Check], processes: int = 2, devices: int = 1, heartbeat: int = 100
) -> list[forks.Fork]:
    """The processes of a world."""
    address = f"127.0.0.1:{free_port()}"
    words = [[c.name, c.function.__module__, c.function.__name__, list(c.arguments)] for c in checks]
    common = {"coordinator": address, "processes": processes, "heartbeat": heartbeat, "timeout": 120}
    return [
        forks.start(take_part, common | {"process": i}, words, folder=folder, devices=devices) for i in range(processes)
    ]


def run(folder: Path, checks: Sequence[Check], processes: int = 2, devices: int = 1) -> World:
    """A world, to its end. One that does not come to a good end leaves what its checks had found until then."""
    with forks.ending(start(folder, checks, processes, devices)) as started:
        for process in started:
            with contextlib.suppress(TimeoutError):
                process.wait()
    return World(folder, started)


def take_part(distributed: dict[str, Any], checks: list[list[Any]]) -> int:
    """One process of a world."""

    def work() -> None:
        join(DistributedConfig(**distributed))
        for name, module, function, arguments in checks:
            print(f"-- {name}", flush=True)
            found = getattr(importlib.import_module(module), function)(*arguments)
            Path(f"{name}.{jax.process_index()}.json").write_text(json.dumps(found))

    return cli.exit_code("world", work)


def one_after_another(count: int) -> list[jax.Device]:
    """`count` devices, each of the next process: two are one of each of two processes."""
    by_process = [[d for d in jax.devices() if d.process_index == i] for i in range(jax.process_count())]
    return [device for row in zip(*by_process, strict=True) for device in row][:count]
