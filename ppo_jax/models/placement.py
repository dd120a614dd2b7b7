"""Where each array of a model, and of what is trained on it, lies on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import TENSORS, Tensor
from ppo_jax.parallel.mesh import AnyMesh, current_mesh
from ppo_jax.parallel.sharding import Tree, abstract_mesh, place, spec
from ppo_jax.types import PyTree

AXES_BY_NAME = {tensor.name: tensor.axes for tensor in TENSORS}


def place_on_mesh(tree: Tree) -> Tree:
    """Parameters or a whole state laid out on the current mesh by the table; as it is where there is no mesh."""
    mesh = current_mesh()
    return tree if mesh is None else place(tree, shardings(tree, mesh))


def create_on_mesh(make: Callable[..., Tree], *args: Any) -> Tree:
    """`make(*args)`; on the current mesh under jit, so that every array is born on its shards (`sharding.create`)."""
    mesh = current_mesh()
    return make(*args) if mesh is None else create(make, mesh, *args)


def leaf_spec(path: tuple, leaf: Any, mesh: AnyMesh) -> PartitionSpec:
    """The spec of one leaf of a tree of parameters, by the names on its path.

    The last name decides, so that an optimizer's state, an average of parameters or a gradient lies like the parameter
    it belongs to. LoRA's a and b take the linear map's input and output axis, DoRA's magnitude the output axis, and a
    quantised map's codes and scales its own. What the table does not know (heads, counters, keys, factored moments) is
    held whole by every device: it is small.
    """
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    if len(names) >= 2 and names[-1] in ("codes", "scales"):
        names = names[:-1]
    axes = AXES_BY_NAME.get(names[-1], ()) if names else ()
    if len(names) >= 3 and names[-3] == "lora" and names[-1] in ("a", "b", "magnitude"):
        linear = AXES_BY_NAME.get(names[-2], ())
        last = {"a": (*linear[:-1], "rank"), "b": (*linear[:1], "rank", *linear[2:])}
        axes = last.get(names[-1], (*linear[:1], *linear[2:]))
    if len(axes) != len(leaf.shape):
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


def parameter_sharding(tensor: Tensor, config: ModelConfig, mesh: AnyMesh) -> NamedSharding:
    """The sharding of one array of the base."""
    return NamedSharding(mesh, spec(tensor.axes, tensor.shape(config), mesh))


def create(make: Callable[..., Tree], mesh: Mesh, *args: Any) -> Tree:
    """`make(*args)` under jit, every output born on its shards: nothing exists whole anywhere."""
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh))(*args)


def gathered(tree: Tree) -> Tree:
    """Parameters cut over "tensor" alone: what "fsdp" has spread, every device gets; the same tree without a mesh."""
    mesh = abstract_mesh()
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
    mesh = abstract_mesh()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, leaf_spec(path, x, mesh)), tree
    )
