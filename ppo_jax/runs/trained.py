"""A trained policy, found in a run directory: in a checkpoint, or in what the run left in export/."""

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig, Lora
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import BEST, EXPORT, POLICY
from ppo_jax.models.placement import shardings
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.parallel import sharding
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.errors import CheckpointError, DamagedCheckpoint
from ppo_jax.runs.output import config, rundir, writers
from ppo_jax.types import PyTree

_LARGEST_TEXT = 10**8  # bytes of a config.yaml: YAML itself is limited by `config`


class _Place(NamedTuple):
    """Where a stage keeps its policy."""

    prefix: str  # of the leaves of a checkpoint that are its adapter
    options: str  # the part of config.yaml that describes the adapter
    evaluations: tuple[str, str]  # see `runs.stage.Stage`


_PPO = _Place("policy.adapter.", "policy", ("eval", ""))
_PLACES = {None: _PPO} | {name: _Place("params.", "adapter", (name, "heldout_")) for name in ("sft", "dpo")}


class Trained(NamedTuple):
    """A policy and the base that it was trained on."""

    model: Model
    adapter: PyTree
    head: PyTree  # value head; {} where there is none
    step: int | None  # update (or step of another stage) that it is from; None: not known
    source: str  # where in the run it was found: "export/policy", "checkpoints/40"
    base: str  # what the run called its base
    evaluation: dict[str, float]  # the last one at or before `step`; {}: none
    settings: dict[str, Any]  # the run's config.yaml; {}: there is none


def find(
    run: str | Path,
    step: int | None = None,
    model: str | None = None,
    options: ModelOptions | None = None,
    template: Path | None = None,
) -> Trained:
    """Find the newest policy of a run, or that of update `step`, with its base.

    A run directory's export/policy counts unless a newer checkpoint is whole; `run` may also be an artifact itself.

    Args:
      model: the base, where the run's own name for it is no longer right.
      options: how the base is run (`runs.load_model`).
      template: this file's chat template serves; None: that of the file that the run names, else the base's own.

    Raises:
      FileNotFoundError: there is no such run, no policy in it, no such step, or the base is gone.
      ValueError: a file is damaged, or the base is another one than the run's.
    """
    where = Path(run).expanduser()
    found, chosen = _stored(where, step), template or _named_template(where)
    if found is None:
        return _from_checkpoint(where, step, model, lambda name: load_model(name, options, chosen))
    try:
        base = load_model(model or found.base, options, chosen)
    except FileNotFoundError as error:
        if model:
            raise
        raise FileNotFoundError(f"{error} (the base that {found.path} names; give --model if it has moved)") from error
    artifacts.check_base(found, base.fingerprint, base.config)
    folder = where if (where / artifacts.DESCRIPTION).is_file() else where / EXPORT
    source = Path(found.path).name if folder == where else f"{EXPORT}/{Path(found.path).name}"
    evaluation = found.meta.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    known = settings(where)
    return Trained(base, found.adapter, found.head, _updates(found), source, found.base, evaluation, known)


def _named_template(run: Path) -> Path | None:
    """Find the chat template that a run was given."""
    name = settings(run).get("chat_template")
    if not isinstance(name, str):
        return None
    if not Path(name).expanduser().is_file():
        raise FileNotFoundError(f"{run / rundir.CONFIG} names the chat template {name}, which is gone; put it back")
    return Path(name).expanduser()


def settings(run: Path) -> dict[str, Any]:
    """Read the content of a run's config.yaml; {} where there is none."""
    file = run / rundir.CONFIG
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _LARGEST_TEXT:
            raise ValueError(f"{file.stat().st_size} bytes")
        return config.read_mapping(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text: {error}") from error


def _stored(where: Path, step: int | None) -> artifacts.Artifact | None:
    """Find the artifact that serves; None: a checkpoint does."""
    if (where / artifacts.DESCRIPTION).is_file():
        if step is not None:
            raise ValueError(f"{where} is a single adapter, not a run: --step {step} has nothing to choose from")
        return artifacts.load(where, "policy")
    if not where.is_dir():
        raise FileNotFoundError(f"{where}: no such run directory")
    steps = store.all_steps(where / rundir.CHECKPOINTS) if (where / rundir.CHECKPOINTS).is_dir() else []
    folders = [where / EXPORT / name for name in (POLICY, BEST)]
    present = [folder for folder in folders if folder.is_dir()]
    if not present and not steps:
        hint = "; it is a model, so give it as --model" if (where / "config.json").is_file() else ""
        raise FileNotFoundError(
            f"{where} holds no trained policy: no {EXPORT}/{POLICY}, no {rundir.CHECKPOINTS}/, and "
            f"{artifacts.DESCRIPTION} is missing{hint}"
        )
    for folder in present if step is not None else present[:1]:
        found = artifacts.load(folder, "policy")
        done = _updates(found)
        if step is None and not (steps and done is not None and steps[-1] > done):
            return found
        if step is not None and step == done:
            return found
    if step is not None and step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{where} holds no policy of --step {step}; its checkpoints: {have}")
    return None


def _updates(found: artifacts.Artifact) -> int | None:
    done = found.meta.get("updates", found.meta.get("steps"))
    return done if isinstance(done, int) and not isinstance(done, bool) else None


def _from_checkpoint(where: Path, step: int | None, model: str | None, load_base: Callable[..., Model]) -> Trained:
    """Read the policy of one checkpoint, or of the newest that is whole."""
    folder = where / rundir.CHECKPOINTS
    load = functools.lru_cache(maxsize=1)(load_base)  # once for all checkpoints of a base
    if step is not None:
        return _read(where, step, model, load)
    damaged = []
    for number in reversed(store.all_steps(folder)):
        try:
            return _read(where, number, model, load)
        except DamagedCheckpoint as error:
            warnings.warn(f"damaged checkpoint: {error}", stacklevel=2)
            damaged.append(str(error))
    raise CheckpointError(f"{folder}: no checkpoint can be read:\n  " + "\n  ".join(damaged))


def _read(where: Path, step: int, model: str | None, load: Callable[[str], Model]) -> Trained:
    folder = where / rundir.CHECKPOINTS
    at, meta = folder / str(step), store.read_meta(folder, step)
    named = meta.get("facts", {}).get("base", {})
    known = config.read_mapping(meta["config"], f"{at}: config") if meta.get("config") else settings(where)
    name = model or named.get("name")
    if not name:
        raise ValueError(f"{at} does not name its base; give it with --model")
    stage = meta.get("facts", {}).get("stage")
    if stage not in _PLACES:
        raise ValueError(f"{at} is of `ppo-jax {stage}`, which trains no policy")
    place, base = _PLACES[stage], load(name)
    if "fingerprint" in named and named["fingerprint"] != base.fingerprint:
        raise ValueError(
            f"{at} was trained on other weights: those of {named.get('name')} (sha256 {named['fingerprint'][:12]}...), "
            f"while this model's are {base.fingerprint[:12]}...; give that base with --model"
        )
    manifest = store.read_manifest(folder, step)
    paths = [path for path in manifest if path.startswith(place.prefix)]
    # Compared with the base before anything is allocated.
    dtypes = {path: manifest[path]["dtype"] for path in paths}
    shapes = {
        path.removeprefix(place.prefix): jax.ShapeDtypeStruct(
            manifest[path]["shape"], jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
        )
        for path, dtype in dtypes.items()
    }
    scales = AdapterConfig()
    if any(".lora." in path for path in paths):
        if not isinstance(known.get(place.options), dict):
            raise ValueError(f"{at}: {place.options}.alpha, the scale of its LoRA, is not in {where / rundir.CONFIG}")
        try:
            scales = config.from_plain(AdapterConfig, known[place.options])
        except config.FieldError as error:
            raise ValueError(f"{where / rundir.CONFIG}: {place.options}.{error}") from error
    try:
        tree = build_adapter(shapes, scales.alpha, _lora_scales(meta))
    except CheckpointError as error:
        raise CheckpointError(f"{at}: {error}") from error
    if problems := artifacts.problems("policy", tree, {}, base.config, base.config.num_layers):
        raise CheckpointError(f"{at} does not fit its base {name}: {'; '.join(problems)}")
    adapter = _restored(folder, place.prefix, tree, step)
    return Trained(
        base,
        adapter,
        {},
        step,
        f"{rundir.CHECKPOINTS}/{step}",
        named.get("name", name),
        _evaluation(where, step, place),
        known,
    )


def _restored(folder: Path, prefix: str, shapes: PyTree, step: int) -> PyTree:
    """Read the adapter straight onto the current mesh, or onto the default device."""
    mesh = current_mesh()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    layout = jax.tree.map(lambda x: device, shapes) if mesh is None else shardings(shapes, mesh)
    names, target = prefix.split(".")[:-1], sharding.abstract(shapes, layout)
    for name in reversed(names):
        target = {name: target}
    found, _ = store.restore(folder, target, step, part=True)
    return functools.reduce(lambda tree, name: tree[name], names, found)


def _lora_scales(meta: Mapping[str, Any]) -> dict[str, float]:
    """Read {map: scale} of the policy's LoRA, as the run itself had them: those of somebody's adapter may differ."""
    known = meta.get("facts", {}).get("lora_scales", {})
    prefixes = ("policy.adapter.lora.", "policy.lora.")
    return {name.rpartition(".")[2]: scale for name, scale in known.items() if name.startswith(prefixes)}


def build_adapter(leaves: Mapping[str, Any], alpha: float, scales: Mapping[str, float] | None = None) -> PyTree:
    """Build the adapter whose leaves have these paths; LoRA's scale is that in `scales`, else alpha / rank."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{path} of the adapter lies below another array")
        if name in node:
            raise CheckpointError(f"{path} of the adapter is both an array and a group of arrays")
        node[name] = leaf
    pairs = tree.get("lora", {})
    if not isinstance(pairs, dict):
        raise CheckpointError("lora of the adapter is an array, not a group of pairs")
    for name, pair in pairs.items():
        magnitude = pair.pop("magnitude", None) if isinstance(pair, dict) else None
        if not isinstance(pair, dict) or pair.keys() != {"a", "b"} or isinstance(pair["a"], dict):
            raise CheckpointError(f"lora.{name} of the adapter is not a pair of arrays a and b")
        if isinstance(magnitude, dict):
            raise CheckpointError(f"lora.{name}.magnitude of the adapter is a group of arrays, not one")
        if len(rank := pair["a"].shape) != 3 or not rank[-1]:
            raise CheckpointError(f"lora.{name}.a of the adapter has shape {rank}, not that of a stack of matrices")
        scale = (scales or {}).get(name, alpha / rank[-1])
        pairs[name] = Lora(a=pair["a"], b=pair["b"], scale=scale, magnitude=magnitude)
    return tree


def _evaluation(where: Path, step: int, place: _Place) -> dict[str, float]:
    """Find the last evaluation at or before `step`."""
    phase, prefix = place.evaluations
    found: dict[str, Any] = {}
    for record in read_jsonl(where / rundir.METRICS):
        at, names = record.get("step"), [name for name in record if name.startswith(prefix)]
        if record.get("phase") == phase and isinstance(at, int) and at <= step and set(names) - set(writers.RESERVED):
            found = {name.removeprefix(prefix): record[name] for name in names}
    return {name: value for name, value in found.items() if name not in writers.RESERVED}
