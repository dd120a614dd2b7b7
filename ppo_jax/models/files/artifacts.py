"""What training leaves behind and another run loads: an adapter with its head, and the base that they belong to.

An artifact is a directory of two files:

    arrays.safetensors   the leaves under their paths: `adapter/lora/q/a`, `head/value/kernel`
    artifact.json        format, kind, the base's name and fingerprint, the model's shape, LoRA scales, free facts

The base's weights are not in it. A head alone makes sense with its adapter, and both only on the base that they were
trained on: `check_base` tells.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from ppo_jax.data.disk import RepeatedKey, is_out_of_memory, parse_json, replaced_directory, sha256_of, strict
from ppo_jax.data.documents import ArtifactMeta, find_mistake
from ppo_jax.models.adapters import LINEARS, Lora
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import tensor_file
from ppo_jax.models.files.facts import complete_facts, model_facts
from ppo_jax.models.files.hub import LARGEST_JSON
from ppo_jax.models.heads import RewardHead, ValueHead
from ppo_jax.models.layout import tensors
from ppo_jax.models.placement import leaf_spec
from ppo_jax.parallel import processes, sharding
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.types import PyTree

EXPORT = "export"  # the folder of a run directory that holds these
MODEL, POLICY, REWARD = "model", "policy", "reward"  # folders in it
BEST, CRITIC, EMA = "best", "critic", "ema"
FORMAT = 1
ARRAYS, DESCRIPTION = "arrays.safetensors", "artifact.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
Kind = Literal["policy", "reward"]


class Base(NamedTuple):
    """The model that a role is trained on."""

    name: str | Path  # what the user called it; only for messages
    fingerprint: str  # sha256 of its weights (`files.fingerprint`)
    config: ModelConfig  # of all its layers


class Artifact(NamedTuple):
    """A role that was trained."""

    kind: Kind
    adapter: PyTree  # models.adapters
    head: PyTree  # parameters of a ValueHead (policy; {} where there is none) or of a RewardHead (reward)
    meta: dict[str, Any]  # what the trainer wanted to say: accuracy, step, ...
    base: str  # name or path of the base, as the trainer's user gave it
    fingerprint: str  # sha256 of the base's weights, see `fingerprint`
    model: dict[str, Any]  # shape facts of the base, see `model_facts`
    layers: int  # how many layers of the base the role reads; its adapter touches the last ones of these
    path: str  # where it was read, for messages

    def trunk(self, config: ModelConfig) -> ModelConfig:
        """The description of the base, cut to the layers that this role reads."""
        return dataclasses.replace(config, num_layers=self.layers)


def save(
    path: str | Path,
    kind: Kind,
    adapter: PyTree,
    head: PyTree,
    base: Base,
    meta: dict[str, Any] | None = None,
    *,
    layers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an artifact directory, whole or not at all: it is made beside `path` and renamed.

    Of several processes, all of which have to call it, the first one writes. The arrays may be spread over them; the
    host holds one piece of one of them at a time (`processes.pieces`).

    Args:
      adapter: any adapter of float32 and bfloat16 arrays, kept bitwise.
      head: of a ValueHead or a RewardHead; {} for a policy without values.
      base: what adapter and head belong to.
      meta: any JSON value (NaN becomes null).
      layers: how many layers of the base the role reads, for a reward model on a cut trunk; None: all.
      overwrite: replace an artifact that is there already; anything else is never replaced.

    Raises:
      ValueError: the trees do not fit the base, or hold another dtype.
      FileExistsError: `path` is there already.
      OSError: it cannot be written, also in the processes that do not write.
    """
    path, layers = Path(path), base.config.num_layers if layers is None else layers
    if wrong := problems(kind, adapter, head, base.config, layers):
        raise ValueError(f"{path} is not written: {'; '.join(wrong)}")
    entries = [tensor_file.entry(name, leaf) for name, leaf in flatten(adapter, head).items()]
    for entry in entries:
        if str(entry.dtype) not in DTYPES.values():
            raise ValueError(f"{path} is not written: {entry.name} is {entry.dtype}; supported: float32, bfloat16")
    entries = tensor_file.in_order(entries)
    description = {
        "format": FORMAT,
        "kind": kind,
        "base": {"name": os.fspath(base.name), "sha256": base.fingerprint},
        "model": model_facts(base.config),
        "layers": layers,
        "lora_scales": {name: float(lora.scale) for name, lora in adapter.get("lora", {}).items()},
        "meta": strict(meta or {}),
    }

    write = functools.partial(_write, path, entries, description, overwrite)
    processes.first_writes(write, tensor_file.pieces(entries))
    return path


def _write(
    path: Path,
    entries: Sequence[tensor_file.Entry],
    description: dict[str, Any],
    overwrite: bool,
    pieces: tensor_file.Pieces,
) -> None:
    """Puts the directory in its place."""
    if path.exists() and not (overwrite and (path / DESCRIPTION).is_file()):
        advice = " or pass overwrite=True" if (path / DESCRIPTION).is_file() else ""
        raise FileExistsError(f"{path} already exists; choose another directory{advice}")
    with replaced_directory(path) as partial:
        tensor_file.write(partial / ARRAYS, entries, pieces)
        description = description | {"arrays_sha256": sha256_of(partial / ARRAYS)}
        text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")


def load(path: str | Path, kind: Kind | None = None) -> Artifact:
    """Reads an artifact, one array at a time; onto the mesh of `jax.set_mesh`, where there is one, shard by shard.

    Args:
      kind: what it has to be; None: any.

    Raises:
      FileNotFoundError: there is none at `path`, or one of its files is missing.
      ValueError: a file is damaged, of another format, or the artifact is of another kind; file and field are named.
    """
    path = Path(path).expanduser()
    file, arrays_file = path / DESCRIPTION, path / ARRAYS
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; give one that training wrote, with {DESCRIPTION} in it")
    for needed in (file, arrays_file):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing, so {path} is not a trained adapter")
    try:
        description = _read_description(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    stored = description["kind"]
    if kind is not None and stored != kind:
        raise ValueError(f"{path} is a {stored} (field kind of {DESCRIPTION}), but a {kind} is needed here")
    if sha256_of(arrays_file) != description["arrays_sha256"]:
        raise ValueError(f"{arrays_file} is damaged: its sha256 is not arrays_sha256 of {DESCRIPTION}; copy it again")
    try:
        adapter, head = _unflatten(_read_arrays(arrays_file), description["lora_scales"])
    except ValueError as error:
        raise ValueError(f"{arrays_file}: {error}") from error
    base = description["base"]
    return Artifact(
        kind=stored,
        adapter=adapter,
        head=head,
        meta=description["meta"],
        base=base["name"],
        fingerprint=base["sha256"],
        model=description["model"],
        layers=description["layers"],
        path=str(path),
    )


def check_base(artifact: Artifact, base_fingerprint: str, config: ModelConfig) -> None:
    """Raises ValueError unless the artifact was trained on this very base: same shapes, same weights."""
    ours, theirs = model_facts(config), complete_facts(artifact.model)
    different = [
        f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    remedy = "use that base, or train on this one"
    if different:
        raise ValueError(
            f"{artifact.path} was trained on another model, {artifact.base}: {'; '.join(different)}; {remedy}"
        )
    if wrong := problems(artifact.kind, artifact.adapter, artifact.head, config, artifact.layers):
        raise ValueError(f"{artifact.path}/{ARRAYS}: {'; '.join(wrong)}")
    if artifact.fingerprint != base_fingerprint:
        raise ValueError(
            f"{artifact.path} was trained on other weights: those of {artifact.base} (sha256 "
            f"{artifact.fingerprint[:12]}...), while this model's are {base_fingerprint[:12]}...; {remedy}"
        )


def problems(kind: Kind, adapter: PyTree, head: PyTree, config: ModelConfig, layers: int) -> list[str]:
    """How adapter and head differ from what a role on `layers` layers of this base can have; [] when they fit."""
    known = {tensor.key: tensor for tensor in tensors(config)}
    wrong, depths = [], set()
    if layers != config.num_layers and not (kind == "reward" and 1 <= layers <= config.num_layers):
        wrong.append(f"a {kind} that reads {layers} layers, the model has {config.num_layers}")
    for name, leaf in flatten(adapter, {}).items():
        parts = name.split("/")[1:]
        key = f"layers.{parts[1]}" if parts[0] == "lora" else ".".join(parts)
        if key not in known:
            wrong.append(f"{name}: the model has no {key}")
            continue
        shape, actual = known[key].shape(config), tuple(np.shape(leaf))
        if parts[0] == "lora" and parts[2] == "magnitude":
            shape = (shape[0], *shape[2:])
        if known[key].stacked and len(actual) == len(shape):
            depths.add(actual[0])
            shape = (actual[0], *shape[1:])  # it may replace, or add to, the last layers only
        if parts[0] == "lora" and parts[2] != "magnitude":
            # The rank is free, but the same on both sides.
            rank = np.shape(adapter["lora"][parts[1]].a)[-1]
            shape = (*shape[:2], rank) if parts[2] == "a" else (shape[0], rank, *shape[2:])
        if actual != shape:
            wrong.append(f"{name} has shape {actual}, the model needs {shape}")
    if len(depths) > 1 or max(depths, default=0) > layers:
        wrong.append(f"the adapter's arrays are stacked over {sorted(depths)} layers of {layers}")
    module = ValueHead() if kind == "policy" else RewardHead()
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, config.hidden_size)))["params"]
    shapes, actual_shapes = ({n: tuple(np.shape(x)) for n, x in flatten({}, t).items()} for t in (expected, head))
    if actual_shapes != shapes and (kind == "reward" or head):
        wrong.append(f"a {kind}'s head needs {shapes}, got {actual_shapes}")
    return wrong


def flatten(adapter: PyTree, head: PyTree) -> dict[str, Any]:
    """{path: leaf}: `adapter/lora/q/a`, `adapter/layers/down`, `head/reward/kernel`."""
    tree = {"adapter": adapter, "head": head}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _read_description(file: Path) -> dict[str, Any]:
    """artifact.json, its fields checked. Errors name the field; the caller adds the file."""
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{size} bytes; at most {LARGEST_JSON} are read")
    try:
        raw = parse_json(file.read_bytes())
    except RepeatedKey:
        raise
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"not a JSON object but {type(raw).__name__}")
    if raw.get("format") != FORMAT:
        raise ValueError(f"format is {raw.get('format')!r}; this version reads {FORMAT}")
    if raw.get("kind") not in get_args(Kind):
        raise ValueError(f"kind is {raw.get('kind')!r}; allowed: {', '.join(get_args(Kind))}")
    for field in ("base", "model", "lora_scales", "meta"):
        if not isinstance(raw.get(field), dict):
            raise ValueError(f"{field} is not an object")
    for field, value in (
        ("base.name", raw["base"].get("name")),
        ("base.sha256", raw["base"].get("sha256")),
        ("arrays_sha256", raw.get("arrays_sha256")),
    ):
        if not isinstance(value, str):
            raise ValueError(f"{field} is not text")
    if isinstance(raw.get("layers"), bool) or not isinstance(raw.get("layers"), int):
        raise ValueError("layers is not an integer")
    for name, scale in raw["lora_scales"].items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e38:
            raise ValueError(f"lora_scales.{name} is {scale!r}, not a finite number")
    if wrong := find_mistake(ArtifactMeta, raw["meta"]):
        raise ValueError(f"meta.{wrong}")
    return raw


def _read_arrays(file: Path) -> dict[str, jax.Array]:
    mesh = current_mesh()
    try:
        with safe_open(file, framework="numpy") as handle:
            return {name: _read_array(handle, name, mesh) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"not a readable safetensors file ({error})") from error


def _read_array(handle: Any, name: str, mesh: Mesh | None) -> jax.Array:
    """On a mesh a process reads the slices that its devices need, and the host holds one of them at a time."""
    stored = handle.get_slice(name)
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}; supported: {', '.join(DTYPES)}")
    if mesh is None:
        return jnp.asarray(handle.get_tensor(name))
    leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPES[dtype]))
    to = NamedSharding(mesh, leaf_spec(tuple(map(jax.tree_util.DictKey, name.split("/"))), leaf, mesh))
    return sharding.build(shape, to, lambda part: stored[part] if part else handle.get_tensor(name))


def _unflatten(arrays: dict[str, jax.Array], scales: dict[str, float]) -> tuple[PyTree, PyTree]:
    """The trees that `flatten` took apart."""
    trees: dict[str, Any] = {"adapter": {}, "head": {}}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        if not parents or parents[0] not in trees:
            raise ValueError(f"{name} belongs neither to the adapter nor to the head")
        node: Any = trees
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} lies below another array")
        if isinstance(node.get(leaf), dict):
            raise ValueError(f"{name} is both an array and a group of arrays")
        node[leaf] = array
    lora = trees["adapter"].get("lora", {})
    if not isinstance(lora, dict) or lora.keys() != scales.keys() or not lora.keys() <= set(LINEARS):
        names = sorted(lora) if isinstance(lora, dict) else "an array"
        raise ValueError(f"adapter/lora has {names}, lora_scales of {DESCRIPTION} has {sorted(scales)}")
    for name, pair in lora.items():
        magnitude = pair.pop("magnitude", None) if isinstance(pair, dict) else None
        if not isinstance(pair, dict) or pair.keys() != {"a", "b"} or any(np.ndim(x) != 3 for x in pair.values()):
            raise ValueError(f"adapter/lora/{name} is not a pair of stacked matrices a and b")
        if magnitude is not None and np.ndim(magnitude) != 2:
            raise ValueError(f"adapter/lora/{name}/magnitude is not a stack of vectors")
        lora[name] = Lora(a=pair["a"], b=pair["b"], scale=float(scales[name]), magnitude=magnitude)
    return trees["adapter"], trees["head"]
