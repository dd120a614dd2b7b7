"""Several processes, one program (JAX's multi-controller runtime): who feeds, scores and reads what.

Every process runs the same code on the same data and keys; arrays are global. These functions are what the host side
needs beyond that, and with one process they do nothing. All of them but `is_first` and `own_rows` are collective:
every process has to call them, in the same order.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.parallel.launch import is_runtime_error
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.parallel.sharding import row_shardings

Tree = TypeVar("Tree")
PIECE = 2**24  # bytes of an array that are brought to the host at a time
_WORDS = 4096  # bytes of a text that processes tell each other


def is_first() -> bool:
    """Tell whether this process writes metrics, logs, samples and reports. Checkpoints are written by all."""
    return jax.process_index() == 0


def own_rows(rows: int, index: int | None = None) -> slice:
    """Find this process's share of `rows` rows (or that of process `index`); every row has one owner."""
    count, index = jax.process_count(), jax.process_index() if index is None else index
    return slice(rows * index // count, rows * (index + 1) // count)


def feed(batch: Tree, mesh: Mesh | None = None) -> Tree:
    """Make global arrays of a host's batch, rows over ("data", "fsdp"); a process hands over its devices' rows only.

    Args:
      batch: numpy arrays [rows, ...], the same function of the step in every process. Where `mesh.data * mesh.fsdp`
        does not divide the rows, every device holds them all.
      mesh: by default that of `jax.set_mesh`; without one the arrays go to the default device.
    """
    mesh = mesh or current_mesh()
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        parts = sharding.addressable_devices_indices_map(x.shape).values()
        spans = {index[0].indices(len(x))[:2] for index in parts if index is not None}
        local = np.concatenate([x[start:stop] for start, stop in sorted(spans)])
        return jax.make_array_from_process_local_data(sharding, local, x.shape)

    return jax.tree.map(put, batch, row_shardings(batch, mesh))


def fetch(tree: Tree) -> Tree:
    """Fetch numpy arrays of whole global arrays, in every process."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def pieces(array: Any, most: int = PIECE) -> Iterator[np.ndarray | None]:
    """Yield a whole array (global, or numpy), cut along its first axis, piece after piece; nothing of it is kept.

    Process 0 is given the pieces, the others None for each. A piece has at most `most` bytes, or is one row: one layer
    of a stacked array. So neither a host nor a device holds more than the piece beside what it held.
    """
    if array.size == 0:
        return
    rows = array.shape[0] if array.ndim else 1
    size = min(rows, max(1, most * rows // array.nbytes))
    for start in range(0, rows, size):
        yield _piece(array, start, min(size, rows - start))  # not bound to a name, which would keep it for too long


def _piece(array: Any, start: int, size: int) -> np.ndarray | None:
    if not isinstance(array, jax.Array) or array.ndim == 0:
        part = array[start : start + size] if array.ndim else array
        return np.asarray(part) if is_first() else None
    # A new array always: what numpy is given of a jax array stays with that as long as it lives.
    to = None if array.is_fully_addressable else NamedSharding(array.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    part = jax.block_until_ready(_cutter(size, to)(array, start))
    return np.asarray(part) if is_first() else None


@functools.lru_cache(maxsize=128)
def _cutter(size: int, to: NamedSharding | None) -> Callable[[jax.Array, int], jax.Array]:
    """Make the cut of rows [start, start + size), which all devices of `to` are given; None: as they lie."""

    def cut(array: jax.Array, start: Any) -> jax.Array:
        # Rows picked by number: of an axis that the mesh cuts, each device adds what it has, and nothing else travels
        # (a slice would gather the axis). As bits, since a sum of numbers makes 0 of -0.
        bits = (
            jnp.dtype(f"uint{8 * array.dtype.itemsize}") if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype
        )
        rows = jnp.take(jax.lax.bitcast_convert_type(array, bits), start + jnp.arange(size), axis=0, mode="clip")
        return jax.lax.bitcast_convert_type(rows, array.dtype)

    return jax.jit(cut, out_shardings=to)


def first_writes(
    write: Callable[[Iterator[np.ndarray | None]], str | None], source: Iterable[np.ndarray | None] = ()
) -> str | None:
    """Call `write(source)` in process 0 alone; all are given its result, at most 4 kB of text ("" is None).

    To fetch what is written is collective, so the others go through `source` too; and so does process 0 to the end
    where writing fails, so that nobody waits for it.

    Raises:
      Exception: in process 0, what `write` raised.
      OSError: in the others, its message.
    """
    rest = iter(source)
    if jax.process_count() == 1:
        return write(rest)
    said: str | None = None
    failure: Exception | None = None
    if is_first():
        try:
            said = write(rest)
        except Exception as error:
            if is_runtime_error(error):  # of a program that all run: they fail too, or end since this one does
                raise
            failure = error  # whatever it is, the others have to hear of it
    for _ in rest:
        pass
    words = np.zeros(_WORDS, np.uint8)
    told = (f"-{type(failure).__name__}: {failure}" if failure else f"+{said or ''}").encode()[:_WORDS]
    words[: len(told)] = np.frombuffer(told, np.uint8)
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(words))).rstrip(b"\0").decode(errors="replace")
    if failure is not None:
        raise failure
    if heard.startswith("-"):
        raise OSError(f"process 0 could not write: {heard[1:]}")
    return heard[1:] or None


def gather_rows(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], slice]:
    """Gather the token rows of all processes, in their order, and tell which of them are this one's."""
    if jax.process_count() == 1:
        return [list(row) for row in rows], slice(0, len(rows))
    own = np.array([len(rows), max(map(len, rows), default=0)], np.int32)
    sizes = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, 2)
    packed = np.zeros((int(sizes[:, 0].max()), 1 + int(sizes[:, 1].max())), np.int32)  # length, tokens
    for slots, row in zip(packed[: len(rows)], rows, strict=True):
        slots[0], slots[1 : 1 + len(row)] = len(row), row
    every = np.asarray(multihost_utils.process_allgather(packed)).reshape(len(sizes), *packed.shape)
    shares = zip(every, sizes[:, 0], strict=True)
    joined = [row[1 : 1 + row[0]].tolist() for share, count in shares for row in share[:count]]
    first = int(sizes[: jax.process_index(), 0].sum())
    return joined, slice(first, first + len(rows))
