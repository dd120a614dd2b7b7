"""Members of a population: runs under `vmap` over one base, on one device or spread over the mesh's data axis.

Two things that `vmap` does to a program cost more than they must. A loop whose condition differs between members makes
its whole carry, and every index in it, one per member; a branch whose condition differs makes one copy of all that it
reads, the frozen base included. `any_row` and `branch` keep both conditions common to all members.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from ppo_jax.parallel.mesh import AnyMesh, current_mesh
from ppo_jax.parallel.sharding import RULES, abstract_mesh
from ppo_jax.types import PyTree

Tree = TypeVar("Tree")
DATA = "data"  # the axis that members are spread over


@jax.custom_batching.custom_vmap
def any_row(flags: Bool[Array, " B"]) -> Bool[Array, ""]:
    """Whether any flag is set, of all members that run together: a loop ends when it has ended for the last of them."""
    found = jnp.any(flags)
    mesh = abstract_mesh()
    if mesh is not None and mesh.manual_axes and any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        # Devices that share a member talk to each other inside the loop: all groups of them go round equally often.
        return jax.lax.pmax(found.astype(jnp.int32), mesh.manual_axes) > 0
    return found


@any_row.def_vmap
def _any_row_of_members(size: int, batched: list[bool], flags: Bool[Array, "K B"]) -> tuple[Bool[Array, ""], bool]:
    return any_row(flags.reshape(-1)), False


def branch(condition: Bool[Array, ""], on_true: Callable[..., Tree], on_false: Callable[..., Tree], *args: Any) -> Tree:
    """lax.cond(condition, on_true, on_false, *args); under `vmap` both are computed unless all members take `on_true`.

    An argument that no member has for itself (the base) stays one. The functions must not close over traced arrays.
    """

    @jax.custom_batching.custom_vmap
    def choose(condition: Bool[Array, ""], *args: Any) -> Tree:
        return jax.lax.cond(condition, on_true, on_false, *args)

    @choose.def_vmap
    def _(size: int, batched: list[Any], conditions: Bool[Array, "*K"], *args: Any) -> tuple[Tree, Any]:
        axes = [jax.tree.map(lambda flag: 0 if flag else None, part) for part in batched[1:]]
        true, false = (jax.vmap(one, axes, axis_size=size) for one in (on_true, on_false))

        def alike(chosen: Bool[Array, " K"], *args: Any) -> Tree:
            return true(*args)

        def each(chosen: Bool[Array, " K"], *args: Any) -> Tree:
            return select_members(chosen, true(*args), false(*args))

        chosen = jnp.broadcast_to(conditions, (size,))
        found = branch(jnp.all(chosen), alike, each, chosen, *args)
        return found, jax.tree.map(lambda _: True, found)

    return choose(condition, *args)


def select_members(chosen: Bool[Array, " K"], left: Tree, right: Tree) -> Tree:
    """`left` of the members that are chosen, `right` of the others; what is not looked at may be NaN."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, left, right)


def spread(count: int, mesh: AnyMesh | None) -> bool:
    """Whether the data axis holds members: each of its devices the same number. Else it holds rows of each member."""
    return mesh is not None and mesh.shape.get(DATA, 1) > 1 and count % mesh.shape[DATA] == 0


def over_members(step: Callable[..., Tree], count: int, shared: tuple[int, ...] = ()) -> Callable[..., Tree]:
    """`step` for `count` members at once: every argument and result gets a leading axis, but those numbered `shared`.

    Where the members are spread over the data axis, nothing travels along it: each device (or group of devices that
    share fsdp and tensor axes) works on its own members, and its loops end when those have ended.
    """

    def together(*args: Any) -> Tree:
        axes = [None if i in shared else 0 for i in range(len(args))]
        mapped = jax.vmap(step, axes)
        mesh = abstract_mesh()
        if not spread(count, mesh):
            return mapped(*args)
        specs = tuple(PartitionSpec() if i in shared else PartitionSpec(DATA) for i in range(len(args)))
        return jax.shard_map(mapped, in_specs=specs, out_specs=PartitionSpec(DATA), axis_names={DATA}, check_vma=False)(
            *args
        )

    return together


def member_shardings(of_one: PyTree, count: int) -> PyTree:
    """The shardings of `count` members stacked on axis 0, from those of one member."""

    def stacked(one: NamedSharding) -> NamedSharding:
        first = DATA if spread(count, one.mesh) else None
        return NamedSharding(one.mesh, PartitionSpec(first, *one.spec))

    return jax.tree.map(stacked, of_one)


def batch_sharding(count: int, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How the batches of `count` members lie, each of `shape`: see `feed_members`."""
    own = spread(count, mesh)
    cut = tuple(axis for axis in RULES["batch"] if mesh.shape[axis] > 1 and not (own and axis == DATA))
    if not shape or shape[0] % math.prod(mesh.shape[axis] for axis in cut):
        cut = ()
    return NamedSharding(mesh, PartitionSpec(DATA if own else None, cut or None))


def feed_members(batch: Tree) -> Tree:
    """Host arrays [K, B, ...], equal in every process -> global arrays on the current mesh.

    Members lie on the data axis where they are spread over it, and the rows of each on fsdp; else the rows are on both.
    """
    mesh = current_mesh()
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def put(x: Any) -> jax.Array:
        to = batch_sharding(x.shape[0], x.shape[1:], mesh)
        return jax.make_array_from_callback(x.shape, to, lambda index: x[index])

    return jax.tree.map(put, batch)
