"""ONE table that says on which axes of the mesh each logical axis of an array lies.

    dimension of an array --(models.layout, ACTIVATIONS)--> logical axis --(RULES)--> axes of the mesh

It knows nothing of models: `models.layout` names the logical axes of their parameters, and `models.placement` applies
the rules to these when they are made, loaded and restored. The constraints inside the programs (`constrain*`) keep
activations where the rules say, and XLA's partitioner does the rest. An axis of size 1 never appears in a spec, so one
device is the same code with empty specs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ppo_jax.parallel.mesh import AnyMesh
from ppo_jax.types import PyTree

Tree = TypeVar("Tree")


# Logical axis -> axes of the mesh, the first one outermost.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of prompts, rollouts, minibatches, the cache
    "embed": ("fsdp",),  # the residual width, in parameters only: ZeRO-3 (Rajbhandari et al. 2020)
    "vocab": ("tensor",),
    "heads": ("tensor",),  # query heads; Shoeybi et al. 2019, section 3
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),  # stacked, and scanned one by one
    "norm": (),
    "q_norm": (),
    "k_norm": (),
    "positions": (),
    "rank": (),
    "slots": (),
    "width": (),
}


# What the programs hold besides parameters -> logical axes.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "residual": ("batch", "slots", "width"),  # [B, S, D]
    "heads": ("batch", "slots", "heads", "width"),  # [B, S, N, H]
    "kv_heads": ("batch", "slots", "kv_heads", "width"),  # [B, C, K, H]
    "mlp": ("batch", "slots", "mlp"),  # [B, S, F]
    "logits": ("batch", "vocab"),  # [B, V]
    "table": ("vocab", "width"),  # [V, D], where tokens are looked up or scored
    "cache": ("layers", "batch", "kv_heads", "slots", "width"),  # [L, B, K, C, H]
}


# -- specs and shardings ---------------------------------------------------------------------------------------------


def spec(axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """Choose the spec of an array of `shape` whose dimensions have these logical axes.

    A dimension that its axes do not divide is left whole (`check_model` has refused models where that would matter).
    An axis along which each device works for itself (`members.over_members`) is not named.
    """
    own = mesh.manual_axes
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        cut = tuple(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1 and axis not in own)
        if size % math.prod(mesh.shape[axis] for axis in cut):
            cut = ()
        entries.append(cut if len(cut) > 1 else (cut[0] if cut else None))
    while entries and entries[-1] is None:  # P("x", None) and P("x") mean the same and are not equal
        entries.pop()
    return PartitionSpec(*entries)


def row_shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """Make a NamedSharding per leaf of a batch: the first dimension over ("data", "fsdp")."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(("batch",), x.shape[:1], mesh)), tree)


def abstract(tree: PyTree, of: PyTree) -> PyTree:
    """Give `tree` the shardings `of` as `jax.ShapeDtypeStruct`s: arguments for `jit(...).lower` without any array."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, of)


# -- arrays ----------------------------------------------------------------------------------------------------------


def build(shape: Sequence[int], to: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Build an array of which this process holds, and reads, the shards of its own devices, one after the other.

    `read(index)` gives one shard, every slice with a start and a stop; a shard that several devices share is read once.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in to.addressable_devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, devices in holders.items():
        host = np.asarray(read(tuple(slice(*bound) for bound in bounds)), order="C")  # a scalar stays one
        for device in devices:
            there = jax.device_put(host, device)
            if device.platform == "cpu":  # there it may share the numpy buffer; once more from a jax array does not
                there = jax.device_put(there, device, may_alias=False)
            shards.append(jax.block_until_ready(there))  # waited for, so that the host's part goes before the next
        del host
    return jax.make_array_from_single_device_arrays(tuple(shape), to, shards)


def place(tree: Tree, to: PyTree) -> Tree:
    """Place host arrays that are equal in every process as global arrays; each device receives its shard only."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(x)))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, to)


# -- inside the programs ---------------------------------------------------------------------------------------------


def abstract_mesh() -> AbstractMesh | None:
    """Find the mesh of `jax.set_mesh`, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: Any, name: str) -> Any:
    """Lay `x` out as ACTIVATIONS[name] says; `x` itself without a mesh."""
    mesh = abstract_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(ACTIVATIONS[name], x.shape, mesh))


def constrain_rows(tree: Tree) -> Tree:
    """Lay the rows of a batch over ("data", "fsdp"); the same tree without a mesh."""
    mesh = abstract_mesh()
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(("batch",), x.shape[:1], mesh)), tree)
