"""Checks of a world of two processes: what they save and resume side by side."""

import errno
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppo_jax.runs.checkpoints import manifests, resuming, saving, store
from ppo_jax.runs.output import rundir
from ppo_jax.train.loop import Interrupted, LoopConfig, Stopped
from tests.disk import small_disk
from tests.processes.world import one_after_another
from tests.runs.checkpoints.test_resuming import arrays_file, cut, flip

FACTS = {"seed": 1}
ROWS, COLUMNS = 16, 1000
LOOP = LoopConfig(updates=1000, keep=9)


def values(step: int) -> dict[str, np.ndarray]:
    """`w` is spread over the processes, `r` is copied to both."""
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(ROWS, COLUMNS)).astype(np.float32),
        "r": rng.normal(size=(COLUMNS,)).astype(np.float32),
        "step": np.int32(step),
    }


def state(step: int, axis: int = 0) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=one_after_another(2))
    spec = P("data") if axis == 0 else P(None, "data")
    where = {"w": NamedSharding(mesh, spec), "r": NamedSharding(mesh, P()), "step": NamedSharding(mesh, P())}
    return {
        name: jax.make_array_from_callback(x.shape, where[name], lambda index, x=x: x[index])
        for name, x in values(step).items()
    }


def holds(found: Any, step: int) -> bool:
    """Whether this process's pieces of a state are those of `step`, bit for bit."""
    return all(
        np.array_equal(np.asarray(shard.data), values(step)[name][shard.index])
        for name, array in found.items()
        for shard in array.addressable_shards
    )


def together(name: str) -> None:
    multihost_utils.sync_global_devices(name)


def own_directory(run: Path) -> Path:
    """As `distributed.run_directory` gives it: the second process writes all but checkpoints elsewhere."""
    if jax.process_index() == 0:
        return run
    private = run.with_name(f"{run.name}-private")
    private.mkdir(exist_ok=True)
    if not (private / rundir.CHECKPOINTS).exists():
        (private / rundir.CHECKPOINTS).symlink_to(run / rundir.CHECKPOINTS)
    return private


def resume(run: Path, axis: int = 0) -> dict[str, Any]:
    said: list[str] = []
    found: dict[str, Any] = {"said": said}
    try:
        restored = resuming.restore(own_directory(run), state(0, axis), FACTS, said.append)
        assert restored is not None
        found |= {"step": restored.step, "whole": holds(restored.state, restored.step), "meta": restored.meta}
    except store.CheckpointError as error:
        found |= {"error": str(error), "kind": type(error).__name__}
    return found


def wrong_sum(run: Path, step: int) -> None:
    """As if a byte had changed beneath all sums of Orbax, in the second process's half: its sum does not fit."""
    file = run / rundir.CHECKPOINTS / str(step) / "meta" / "metadata"
    document = json.loads(file.read_text())
    pieces = document["manifest"]["w"]["pieces"]
    pieces[sorted(pieces, key=lambda bounds: int(bounds.split(":")[0]))[-1]] ^= 1
    document["checksum"] = manifests.document_sum(document)
    file.write_text(json.dumps(document))


def meta_of(run: Path, step: int) -> Path:
    return run / rundir.CHECKPOINTS / str(step) / "meta" / "metadata"


DAMAGE: dict[str, Callable[[Path, int], object]] = {
    "nothing": lambda run, step: None,
    "flipped": lambda run, step: flip(arrays_file(run, step)),
    "truncated": lambda run, step: cut(arrays_file(run, step)),
    "missing": lambda run, step: arrays_file(run, step).unlink(),
    "meta flipped": lambda run, step: flip(meta_of(run, step)),
    "meta missing": lambda run, step: meta_of(run, step).unlink(),
    "another value": wrong_sum,
}


def damages(where: str) -> dict[str, Any]:
    """The newest of three checkpoints is damaged, in one way after another; what both make of it."""
    record: dict[str, Any] = {}
    folder = Path(where)
    saved = folder / "saved"
    with store.open_manager(saved / rundir.CHECKPOINTS, keep=None) as manager:
        for step in (2, 4, 6):
            store.save(manager, step, state(step), {"facts": FACTS})
    for name, damage in DAMAGE.items():
        run = folder / name
        if jax.process_index() == 0:
            shutil.copytree(saved, run)
            damage(run, 6)
            shutil.copytree(run, folder / f"{name} alone")  # for one process to be compared with
        together(name)
        record[name] = resume(run)
        together(name)
    record["split otherwise"] = resume(folder / "another value", axis=1)  # the damaged one has been moved
    if jax.process_index() == 0:
        flip(arrays_file(folder / "nothing", 6))
        wrong_sum(folder / "another value", 4)
    together("split")
    record["split otherwise, damaged"] = resume(folder / "another value", axis=1)
    handler = store.ocp.PyTreeCheckpointHandler
    restore = handler.restore

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if jax.process_index() == 1:
        handler.restore = fails
    together("unreadable")
    record["unreadable for one"] = resume(folder / "saved")
    handler.restore = restore
    return record


def failures(where: str) -> dict[str, Any]:
    """Saves that fail in one process, at once and in the background; training goes on in both."""
    record: dict[str, Any] = {}
    for failing in (0, 1):
        for limit in (100, 20_000):  # the first is too small for anything, the second for the arrays
            said: list[str] = []
            path = Path(where) / f"{failing}-{limit}"
            with saving.saver(path, LOOP, {"facts": FACTS}, said.append, None) as keep:
                keep(1, state(1), True)
                good = [keep.settle()]
                with small_disk(limit if jax.process_index() == failing else 10**9):
                    for step in range(2, 6):
                        keep(step, state(step), step == 2)
                        good.append(keep.settle())
                    try:
                        saving.leave(Interrupted("stopped"), keep, (5, state(5)))
                    except Stopped as stopped:
                        left = f"{type(stopped).__name__}: {stopped}"
                for step in range(6, 20):
                    keep(step, state(step), step == 6)
                good.append(keep.settle())
                for step in range(20, 100):  # nobody waits for this one: it is looked for at every update
                    keep(step, state(step), step == 20)
                    if keep.pending is None:
                        break
                    time.sleep(0.05)
                good.append(keep.good)
            record[path.name] = {"said": said, "good": good, "left": left, "steps": store.all_steps(path)}
            found, step = store.restore(path, state(0))
            record[path.name]["whole"] = holds(found, step)
    return record


def broken(where: str) -> None:
    """The first process fails between two of Orbax's meetings, where the other waits for it."""
    with saving.saver(Path(where) / "broken", LOOP, {}, print, None) as keep:
        keep(1, state(1), True)
        keep.settle()

        def fails(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if jax.process_index() == 0:
            store.ocp.CheckpointManager.save = fails
        keep(2, state(2), True)
        keep(3, state(3), True)
