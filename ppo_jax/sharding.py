"""The mesh, and ONE table of logical axes that says how every array lies on it.

    array dimension --(PARAMETERS, ACTIVATIONS)--> logical axis --(RULES)--> axes of the mesh

The table drives initialisation (`create`), loading (`models.weights`), sharding (`shardings`), restoring
(`checkpoint.restore` onto those shardings) and the constraints inside the programs (`constrain*`). XLA's partitioner
does the rest. An axis of size 1 never appears in a spec, so one device is the same code with empty specs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ppo_jax.models.config import ModelConfig
from ppo_jax.types import PyTree

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor")

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
    "rank": (),
    "slots": (),
    "width": (),
}

# Name of a parameter -> logical axes of its dimensions (layout: `models.config.ModelConfig`).
PARAMETERS: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "unembedding": ("vocab", "embed"),
    "final_norm": ("norm",),
    "attention_norm": ("layers", "norm"),
    "mlp_norm": ("layers", "norm"),
    "q": ("layers", "embed", "heads"),
    "k": ("layers", "embed", "kv_heads"),
    "v": ("layers", "embed", "kv_heads"),
    "o": ("layers", "heads", "embed"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "q_bias": ("layers", "heads"),
    "k_bias": ("layers", "kv_heads"),
    "v_bias": ("layers", "kv_heads"),
    "o_bias": ("layers", "norm"),
    "gate_bias": ("layers", "mlp"),
    "up_bias": ("layers", "mlp"),
    "down_bias": ("layers", "norm"),
}

# What the programs hold besides parameters -> logical axes.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "residual": ("batch", "slots", "width"),  # [B, S, D]
    "heads": ("batch", "slots", "heads", "width"),  # [B, S, N, H]
    "kv_heads": ("batch", "slots", "kv_heads", "width"),  # [B, C, K, H]
    "mlp": ("batch", "slots", "mlp"),  # [B, S, F]
    "logits": ("batch", "vocab"),  # [B, V]
    "table": ("vocab", "width"),  # [V, D], where tokens are looked up or scored
    "cache": ("layers", "batch", "slots", "kv_heads", "width"),  # [L, B, C, K, H]
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices work on what; the product is the number of devices."""

    data: int = 1
    """Copies of the model, each on its own rows. The axis that crosses slow networks."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into, gathered layer by layer; rows are split over it too."""
    tensor: int = 1
    """Parts that heads, MLP and vocabulary are cut into; wants the fastest links."""

    def __post_init__(self) -> None:
        for name, size in zip(AXES, self.shape, strict=True):
            if size < 1:
                raise ValueError(f"mesh.{name}={size} must be at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(data, fsdp, tensor)."""
        return self.data, self.fsdp, self.tensor

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self.shape)


# -- meshes ----------------------------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with axes ("data", "fsdp", "tensor"), laid out along the machine's links.

    On several slices (TPU pods joined by a data-centre network) `data`, or else `fsdp`, spans the slices, and the other
    axes stay inside one.

    Args:
      devices: by default all of them, of all processes; the configuration of one device takes the first. Devices of
        `jax.experimental.topologies` serve as well.

    Raises:
      ValueError: the product of the axes is not the number of devices, or neither axis divides by the slices.
    """
    if devices is None:
        devices = jax.devices()
        if config.size == 1 and jax.process_count() == 1:
            devices = devices[:1]
    if config.size != len(devices):
        product = " x ".join(f"{name}={size}" for name, size in zip(AXES, config.shape, strict=True))
        rest = config.fsdp * config.tensor
        fix = f"; --mesh.data {len(devices) // rest} would use all" if len(devices) % rest == 0 else ""
        raise ValueError(f"mesh {product} needs {config.size} devices, but there are {len(devices)}{fix}")
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        return jax.make_mesh(config.shape, AXES, types, devices=devices)
    inner, outer = _hybrid_shape(config, slices)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, devices), AXES, axis_types=types)


def _hybrid_shape(config: MeshConfig, slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape within a slice, shape over slices)."""
    for axis in (0, 1):
        if config.shape[axis] % slices == 0:
            inner = [size // slices if i == axis else size for i, size in enumerate(config.shape)]
            return tuple(inner), tuple(slices if i == axis else 1 for i in range(len(AXES)))
    raise ValueError(
        f"the devices are {slices} slices, but neither mesh.data={config.data} nor mesh.fsdp={config.fsdp} is a "
        f"multiple of {slices}: mesh.tensor cannot span slices"
    )


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError when an axis of the mesh does not divide what it cuts; the message names both."""
    cuts = {"fsdp": ("hidden_size",), "tensor": ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size")}
    for axis, fields in cuts.items():
        for field in fields:
            parts, size = getattr(mesh, axis), getattr(config, field)
            if size % parts:
                fits = [n for n in range(1, parts) if all(getattr(config, f) % n == 0 for f in fields)]
                raise ValueError(
                    f"--mesh.{axis} {parts} does not divide {field}={size} of the model; use {fits[-1]}, and give the "
                    f"other devices to --mesh.{'data' if axis == 'fsdp' else 'fsdp'}"
                )


def check_rows(rows: int, mesh: MeshConfig, what: str) -> None:
    """Raises ValueError unless `rows` (described by `what`) divide over the axes that cut the batch."""
    parts = mesh.data * mesh.fsdp
    if rows % parts:
        raise ValueError(f"{what} has {rows} rows, which mesh.data x mesh.fsdp = {parts} does not divide")


# -- specs and shardings ---------------------------------------------------------------------------------------------


def spec(axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """The spec of an array of `shape` whose dimensions have these logical axes.

    A dimension that its axes do not divide is left whole (`check_model` has refused models where that would matter).
    """
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        cut = tuple(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)
        if size % math.prod(mesh.shape[axis] for axis in cut):
            cut = ()
        entries.append(cut if len(cut) > 1 else (cut[0] if cut else None))
    while entries and entries[-1] is None:  # P("x", None) and P("x") mean the same and are not equal
        entries.pop()
    return PartitionSpec(*entries)


def leaf_spec(path: tuple, leaf: Any, mesh: AnyMesh) -> PartitionSpec:
    """The spec of one leaf of a tree of parameters, by the names on its path.

    The last name decides, so that an optimizer's state, an average of parameters or a gradient lies like the parameter
    it belongs to. LoRA's a and b take the linear map's input and output axis. What the table does not know (heads,
    counters, keys, factored moments) is held whole by every device: it is small.
    """
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    axes: tuple[str, ...] | None = PARAMETERS.get(names[-1]) if names else None
    if len(names) >= 3 and names[-3] == "lora" and names[-1] in ("a", "b"):
        layers, inputs, outputs = PARAMETERS[names[-2]]
        axes = (layers, inputs, "rank") if names[-1] == "a" else (layers, "rank", outputs)
    if axes is None or len(axes) != len(leaf.shape):
        return PartitionSpec()
    return spec(axes, leaf.shape, mesh)


def shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """A NamedSharding per leaf of any tree around parameters: base, adapter, Policy, TrainState, Frozen, gradients.

    The leaves are arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(path, leaf, mesh)),
        tree,
    )


def parameter_sharding(key: str, shape: Sequence[int], mesh: AnyMesh) -> NamedSharding:
    """Of the base's parameter `key` ("embedding", "layers.q")."""
    return NamedSharding(mesh, spec(PARAMETERS[key.rpartition(".")[2]], shape, mesh))


def row_shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """A NamedSharding per leaf of a batch: the first dimension over ("data", "fsdp")."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(("batch",), x.shape[:1], mesh)), tree)


def cache_shardings(cache: PyTree, mesh: AnyMesh) -> PyTree:
    """A NamedSharding per leaf of a `models.cache.Cache`: rows over ("data", "fsdp"), key/value heads over "tensor"."""
    axes = {5: ACTIVATIONS["cache"], 2: ("batch", "slots"), 0: ()}
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(axes[x.ndim], x.shape, mesh)), cache)


def abstract(tree: PyTree, of: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s of `tree` with the shardings `of`: arguments for `jit(...).lower` without any array."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, of)


# -- arrays ----------------------------------------------------------------------------------------------------------


def create(make: Callable[..., Tree], mesh: Mesh, *args: Any) -> Tree:
    """`make(*args)` under jit, every output born on its shards: nothing exists whole anywhere."""
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh))(*args)


def build(shape: Sequence[int], to: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """An array of which this process holds, and reads, the shards of its own devices, one after the other.

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
    """Host arrays that are equal in every process -> global arrays; each device receives its shard only."""

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


def _mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: Any, name: str) -> Any:
    """`x` laid out as ACTIVATIONS[name] says; `x` itself without a mesh."""
    mesh = _mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(ACTIVATIONS[name], x.shape, mesh))


def constrain_rows(tree: Tree) -> Tree:
    """A batch with its rows over ("data", "fsdp"); the same tree without a mesh."""
    mesh = _mesh()
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(("batch",), x.shape[:1], mesh)), tree)


def gathered(tree: Tree) -> Tree:
    """Parameters cut over "tensor" alone: what "fsdp" has spread, every device gets; the same tree without a mesh."""
    mesh = _mesh()
    if mesh is None or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def whole(path: tuple, x: Any) -> Any:
        cut = (axis if axis != "fsdp" else None for axis in leaf_spec(path, x, mesh))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*cut))

    return jax.tree_util.tree_map_with_path(whole, tree)


def constrain_params(tree: Tree) -> Tree:
    """Parameters, gradients or a whole state laid out as the table says; the same tree without a mesh.

    Put around what a step returns it keeps shardings from drifting: output and input shardings are the same.
    """
    mesh = _mesh()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, leaf_spec(path, x, mesh)), tree
    )
