"""The mesh of devices: its axes, its size and the one that is in use."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AnyMesh = Mesh | AbstractMesh


AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices work on what; the product is the number of devices."""

    data: int = 1
    """The model is copied this many times, each copy on its own rows. This axis may cross slow networks."""
    fsdp: int = 1
    """Parameters and optimizer state are cut into this many parts, gathered layer by layer; rows are split too."""
    tensor: int = 1
    """Heads, MLP and vocabulary are cut into this many parts, which want the fastest links."""

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


def use_mesh(config: MeshConfig) -> contextlib.AbstractContextManager[object]:
    """Run everything inside the block on the mesh. One device alone needs none."""
    if config.size == 1 and jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(config))


def current_mesh() -> Mesh | None:
    """Find the mesh of `jax.set_mesh`, if any."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh with axes ("data", "fsdp", "tensor"), laid out along the machine's links.

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
    """Compute (shape within a slice, shape over slices)."""
    for axis in (0, 1):
        if config.shape[axis] % slices == 0:
            inner = [size // slices if i == axis else size for i, size in enumerate(config.shape)]
            return tuple(inner), tuple(slices if i == axis else 1 for i in range(len(AXES)))
    raise ValueError(
        f"the devices are {slices} slices, but neither mesh.data={config.data} nor mesh.fsdp={config.fsdp} is a "
        f"multiple of {slices}: mesh.tensor cannot span slices"
    )


def check_rows(rows: int, mesh: MeshConfig, what: str) -> None:
    """Raise ValueError unless `rows` (described by `what`) divide over the axes that cut the batch."""
    parts = mesh.data * mesh.fsdp
    if rows % parts:
        raise ValueError(f"{what} has {rows} rows, which mesh.data x mesh.fsdp = {parts} does not divide")


def round_up_to_devices(rows: int) -> int:
    """Round `rows` up on a mesh to a multiple of the devices that cut the batch."""
    mesh = current_mesh()
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // parts) * parts
