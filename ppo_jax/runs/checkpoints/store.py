"""Save and restore a state (any pytree of arrays) with Orbax: asynchronous, atomic, checked when it is read.

A checkpoint is a directory `DIRECTORY/STEP` with two items: `arrays`, the leaves under their paths, and `meta`, JSON
with the caller's facts and a manifest {path: shape, dtype or key implementation, CRC-32 of the bytes}. The tree's
structure is the target's on restore, so no class is looked up by a name that a file holds. Typed PRNG keys are stored
as their words, empty arrays in the manifest alone (Orbax takes neither).

An array that is spread over several processes has one sum for each of its pieces (`checksums`). What fails in one
process, fails in all of them, with the same error (`agreement`): those functions here that say so are collective.

    with store.open_manager(run / "checkpoints", keep=3) as manager:
        store.save(manager, step, state, {"config": config_yaml})
    state, step = store.restore(run / "checkpoints", abstract_state)
"""

import asyncio
import contextlib
import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ppo_jax.data.disk import sync, sync_tree
from ppo_jax.parallel.agreement import agree, anywhere, of_first
from ppo_jax.runs.checkpoints import checksums, manifests
from ppo_jax.runs.checkpoints.barrier import save_barrier
from ppo_jax.runs.checkpoints.errors import (
    CheckpointError,
    CheckpointSaveBroken,
    CheckpointSaveError,
    DamagedCheckpoint,
)
from ppo_jax.runs.checkpoints.manifests import Manifest
from ppo_jax.runs.checkpoints.quiet import quiet
from ppo_jax.runs.checkpoints.reading import (
    FORMAT,
    LARGEST_META,
    all_steps,
    check_path,
    check_written,
    find_step,
    first_line,
    read_document,
    read_leaves,
)
from ppo_jax.types import PyTree


class _Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint in the making. Before it gets its name it is read once, and it is on the disk itself."""

    async def finalize(self) -> None:
        final = Path(self.get_final())
        if not final.name.isdecimal():  # one of its items, which is looked at with the whole
            return await super().finalize()
        await asyncio.to_thread(check_written, Path(self.get()))
        await asyncio.to_thread(sync_tree, Path(self.get()))
        await super().finalize()
        await asyncio.to_thread(sync_tree, final)  # what Orbax says of it, which nobody needs to read it
        for folder in (final.parent, final.parent.parent):
            await asyncio.to_thread(sync, folder)


class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `newest` (None: all), every step that `every` divides (0: none), and what `best` names."""

    def __init__(self, newest: int | None, every: int, best: Callable[[], int | None]) -> None:
        self.newest, self.every, self.best = newest, every, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = _kept(steps, self.newest, self.every, self.best())
        return [step in kept for step in steps]


def _kept(steps: Sequence[int], newest: int | None, every: int, best: int | None) -> set[int]:
    if newest is None:
        return set(steps)
    return {step for step in steps if step == best or (every and step % every == 0)} | set(sorted(steps)[-newest:])


def delete_old(directory: str | Path, keep: int | None, every: int, best: int | None) -> None:
    """Deletes what `open_manager` with these arguments would, and goes on where one cannot be; in process 0."""
    steps = all_steps(directory) if jax.process_index() == 0 else []
    for step in set(steps) - _kept(steps, keep, every, best):
        shutil.rmtree(Path(directory) / str(step), ignore_errors=True)


@contextlib.contextmanager
def open_manager(
    directory: str | Path, keep: int | None = 3, every: int = 0, best: Callable[[], int | None] = lambda: None
) -> Iterator[ocp.CheckpointManager]:
    """An Orbax manager that writes steps under `directory` (made if absent) and deletes old ones.

    Leaving the block waits for the last save; a save that failed in the background raises `CheckpointSaveError`
    there, unless the block is already being left by another error. Entering is collective.

    Args:
      keep: the newest ones that stay; None: all.
      every: steps that are multiples of it stay as well; 0: off.
      best: the step that stays whatever its age, asked at every save.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint has to be kept (None keeps all)")
    path = Path(directory).resolve()
    check_path(path)
    quiet()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Keep(keep, every, best),
        cleanup_tmp_directories=True,
        temporary_path_class=_Durable,
        # Made in the background, a directory that cannot be made leaves Orbax's threads waiting for it for minutes.
        async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False,
            barrier_sync_fn=save_barrier if jax.process_count() > 1 else None,
        ),
    )
    _check_writable(path)
    try:
        manager = ocp.CheckpointManager(path, options=options)
    except OSError as error:
        kind = CheckpointSaveBroken if jax.process_count() > 1 else CheckpointSaveError
        raise kind(f"{path}: cannot hold checkpoints: {error}") from error
    try:
        yield manager
    except BaseException:
        # The error on its way out matters more than that of a save in the background.
        with contextlib.suppress(Exception):
            manager.close()
        raise
    with _save_errors(manager):
        manager.close()


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, meta: Mapping[str, Any] | None = None) -> None:
    """Saves `state` as `step`; returns when the arrays may be donated, and writes to disk in the background.

    The step appears under its name only when it is complete. `meta` is any JSON value, see `read_meta`. Collective.

    Raises:
        ValueError: `step` is not newer than what the directory holds, the state has no array, or `meta` is too large.
        CheckpointSaveError: this save, or the one before it in the background, failed (in any process).
      CheckpointSaveBroken: it failed in this one of several processes only, between two of Orbax's meetings.
    """
    latest = manager.latest_step()
    if latest is not None and step <= latest:
        raise ValueError(
            f"{manager.directory}: step {step} is not after the newest checkpoint, {latest}; "
            "save into another directory, or delete the newer checkpoints first"
        )
    leaves = manifests.flatten(state)
    arrays = {path: manifests.storable(leaf) for path, leaf in leaves.items() if np.size(leaf)}
    if not arrays:
        raise ValueError(f"{manager.directory}: the state has no array to save")
    sums = checksums.sums(arrays)
    manifest = {path: manifests.describe(leaf) | sums.get(path, {}) for path, leaf in leaves.items()}
    document = {"format": FORMAT, "manifest": manifest, "meta": dict(meta or {})}
    document["checksum"] = manifests.document_sum(document)
    if (size := len(json.dumps(document))) > LARGEST_META:
        raise ValueError(f"{manager.directory}: meta and manifest are {size} bytes; at most {LARGEST_META} are read")
    args = ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(document))
    several = jax.process_count() > 1
    if several:  # what can be known to fail fails here, where all hear of it
        wait(manager)
        _let_others_finish(manager)
        _check_writable(Path(manager.directory))
    with _save_errors(manager, CheckpointSaveBroken if several else CheckpointSaveError):
        manager.save(step, args=args, force=True)


def poll(manager: ocp.CheckpointManager) -> bool:
    """Whether the last save is on disk; raises `CheckpointSaveError` if it failed in the background. Does not wait.

    Collective, as `wait` is.
    """
    if anywhere(manager.is_saving_in_progress()):
        return False
    wait(manager)
    return True


def wait(manager: ocp.CheckpointManager) -> None:
    """Blocks until the last save is on disk; raises `CheckpointSaveError` if it failed."""

    def finish() -> None:
        with _save_errors(manager):
            manager.wait_until_finished()
            manager.check_for_errors()

    agree(finish, CheckpointSaveError)


def latest_step(directory: str | Path) -> int | None:
    """The newest complete step under `directory`, or None."""
    return max(all_steps(directory), default=None)


def read_meta(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """What the caller gave `save` as `meta`, of `step` (None: the newest)."""
    return read_document(*find_step(directory, step))["meta"]


def restore(directory: str | Path, target: PyTree, step: int | None = None, part: bool = False) -> tuple[PyTree, int]:
    """Reads `step` (None: the newest) into the structure of `target`. Returns (state, step).

    A leaf of `target` is an array or a `jax.ShapeDtypeStruct`. Where it has a sharding (a committed array's, or the
    struct's) the leaf is read straight onto it, whatever mesh it was saved from; else it becomes an uncommitted
    array. NumPy arrays and Python scalars come back as such. Values are bitwise those that were saved. Collective.
    A `part` of what was saved may be asked for, such as {"policy": ...}: nothing else is read.

    Raises:
        FileNotFoundError: no such directory, no checkpoint in it, or not that step.
        CheckpointError: leaves are missing, unexpected, or differ in shape or dtype (all are listed).
      DamagedCheckpoint: files are missing or unreadable, or an array is not the one that was saved.
    """
    leaves = manifests.flatten(target)
    kinds = CheckpointError, DamagedCheckpoint, FileNotFoundError
    step = of_first(agree(lambda: find_step(directory, step)[1], *kinds))

    def read() -> tuple[dict[str, Any], int]:
        path, found = find_step(directory, step)
        manifest: Manifest = read_document(path, found)["manifest"]
        asked = {name: entry for name, entry in manifest.items() if not part or name in leaves}
        wanted_manifest = {name: manifests.describe(leaf) for name, leaf in leaves.items()}
        if differences := manifests.compare(asked, wanted_manifest):
            raise CheckpointError(f"{path / str(found)} does not fit the state:\n  " + "\n  ".join(differences))
        wanted = {name: _restore_args(leaf) for name, leaf in leaves.items() if np.size(leaf)}
        return read_leaves(path, found, manifest, wanted), found

    arrays, number = agree(read, *kinds)
    back = [_as_target(leaf, arrays.get(name)) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), back), number


def preempted(step: int) -> str | None:
    """In a run of several processes: a reason once all of them are to stop after `step`, since one is to be evicted.

    JAX passes SIGTERM of any process on to all, and finds the step that they can agree on. To be asked at every step.
    """
    return "a notice of preemption" if ocp.utils.reached_preemption(step) else None


def read_manifest(directory: str | Path, step: int | None = None) -> Manifest:
    """{path: {"shape", "dtype", "crc32"}} of every leaf of `step` (None: the newest); reads no array.

    Equal for states that are bitwise equal.
    """
    return read_document(*find_step(directory, step))["manifest"]


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # A key's words are one more axis, which a NamedSharding leaves replicated.
    shape = jax.eval_shape(jax.random.key_data, leaf).shape if manifests.is_key(leaf) else leaf.shape
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _as_target(leaf: Any, value: Any) -> Any:
    """The stored value (None: it is empty) in the kind of the target's leaf."""
    if manifests.is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=manifests.key_impl(leaf))
    if isinstance(leaf, np.ndarray | np.generic):
        value = np.empty(leaf.shape, leaf.dtype) if value is None else value
        return value if isinstance(leaf, np.ndarray) else value[()]
    if not hasattr(leaf, "dtype"):
        return type(leaf)(value)
    if value is None:
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), _sharding(leaf))
    return jnp.asarray(value)


@contextlib.contextmanager
def _save_errors(
    manager: ocp.CheckpointManager, kind: type[CheckpointSaveError] = CheckpointSaveError
) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk, a vanished directory and the like, in Orbax's many kinds
        raise kind(f"{manager.directory}: a checkpoint could not be saved: {first_line(error)}") from error


_last_saved: list[Any] = []  # a weak reference to the manager that saved last


def _let_others_finish(manager: ocp.CheckpointManager) -> None:
    """With several processes: waits for the save of another run of this process, the member of a population.

    The meetings of two saves in the background would be mixed up. Whether it went well is for its own run to find.
    """
    for other in [reference() for reference in _last_saved]:
        if other is not None and other is not manager:
            with contextlib.suppress(Exception):
                other.wait_until_finished()
    _last_saved[:] = [weakref.ref(manager)]


def _check_writable(path: Path) -> None:
    """With several processes: whether all of them can write there, before one fails where the others wait for it."""

    def make() -> None:
        if jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)

    def try_it() -> None:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise CheckpointSaveError(f"{path}: cannot hold checkpoints: {error}") from error

    for action in (make, try_it) if jax.process_count() > 1 else ():
        agree(functools.partial(guarded, action), CheckpointSaveError)
