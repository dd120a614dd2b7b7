"""The facts of a run, in JSON values: for its checkpoints, its report, and the card of its export."""

import dataclasses
import json
import platform
import zlib
from collections.abc import Iterator, Sequence
from importlib import metadata as packages
from typing import Any

import jax
import numpy as np

from ppo_jax.data.disk import strict
from ppo_jax.models.adapters import Lora
from ppo_jax.models.pretrained import Model
from ppo_jax.runs.checkpoints.checksums import array_sum
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import OfflineSetup, Setup
from ppo_jax.types import Policy, PyTree

# Scalars of a stage that trains on fixed data: they may change on the way, as PPO's may.
HYPER = ("learning_rate", "max_grad_norm", "beta", "label_smoothing")


def environment() -> dict[str, Any]:
    """Collect versions and machine, for the report and for checkpoints."""
    names = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: packages.version(name) for name in names},
        "machine": f"{jax.device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}",
    }


def shared_facts(model: Model, loras: PyTree, seed: int) -> dict[str, Any]:
    """Collect what is named of every stage: its base, how that is run, the scales of LoRAs, the machine."""
    around = environment()
    return {
        "base": {"name": model.name, "fingerprint": model.fingerprint},
        "lora_scales": _scales(loras),
        "compute": {name: getattr(model.config, name) for name in ("dtype", "remat", "attention")},
        "seed": seed,
        "versions": around["versions"],
        "machine": {"devices": around["machine"], "processes": jax.process_count(), "mesh": _mesh()},
    }


def run_facts(setup: Setup, policy: Policy) -> dict[str, Any]:
    """Collect, as JSON values, what a checkpoint has to agree with before the run goes on from it.

    What the arrays of a state do not tell is named here: the scales of LoRAs, the compute dtype.
    """
    sides = {"on the device": setup.reward.device, "on the host": setup.reward.host}
    where = " and ".join(side for side, function in sides.items() if function is not None)
    # What was not there before counts as its default, so that older runs go on.
    kept = {} if setup.reward.special_tokens == "drop" else {"special_tokens": setup.reward.special_tokens}
    found = shared_facts(setup.model, {"policy": policy, "reward": setup.reward.params}, setup.seed) | {
        "reward": {"where": where, "name": setup.reward.name, "arrays": _digest(setup.reward.params)} | kept,
        "prompts": _rows_digest(setup.prompts.rows),
        "prompt_texts": _text_digest(setup.prompts),
        "held_out": _rows_digest(setup.held_out.rows),
        "held_out_texts": _text_digest(setup.held_out),
        "pretrain": _rows_digest(setup.pretrain),
        "batch_size": setup.loop.batch_size,
        "ppo": dataclasses.asdict(setup.ppo),
        "hyper": setup.hyper._asdict(),
        "loop": {name: value for name, value in dataclasses.asdict(setup.loop).items() if name != "batch_size"},
    }
    return strict(found | _mixture(setup))


def offline_facts(setup: OfflineSetup, stage: str, params: PyTree) -> dict[str, Any]:
    """Collect the same of a stage that trains on fixed data.

    Args:
      params: what is trained, as it is at the start.
    """
    options = dataclasses.asdict(setup.options)
    take = lambda names: {name: options.pop(name) for name in names if name in options}  # noqa: E731
    hyper, length, size = take(HYPER), take(("epochs", "steps")), options.pop("batch_size")
    found = shared_facts(setup.model, {"policy": params}, setup.seed) | {
        "stage": stage,
        "train": _data_digest(setup.train),
        "held_out": _data_digest(setup.held_out),
        "reference": _rows_digest(setup.reference),
        "batch_size": size,
        stage: options,
        "hyper": hyper,
        "loop": dataclasses.asdict(setup.loop) | length,
    }
    return strict(found | _mixture(setup))


def _mixture(setup: Setup | OfflineSetup) -> dict[str, Any]:
    """Name how files are mixed, where they are."""
    return {} if setup.mix is None else {"mix": {"weights": list(setup.mix.weights), "rows": _data_digest(setup.mix)}}


def _mesh() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    return "none" if mesh.empty else str(dict(mesh.shape))


def _digest(tree: PyTree) -> str:
    """Hash the bytes of a tree's arrays, in their order."""
    sums = [array_sum(leaf) for leaf in jax.tree.leaves(tree)]
    return f"{len(sums)} arrays, {array_sum(np.array(sums, np.uint32)):08x}"


def _rows_digest(rows: Sequence[Sequence[int]]) -> str:
    return _digest([np.asarray(row, np.int32) for row in rows])


def _data_digest(data: Any) -> str:
    """Hash encoded data: token rows, in lists and records of any depth, and the numbers beside them."""

    def leaves(value: Any) -> Iterator[np.ndarray]:
        if isinstance(value, list | tuple) and any(isinstance(item, list | tuple | np.ndarray) for item in value):
            for item in value:
                yield from leaves(item)
        else:
            yield np.asarray(value)

    return _digest(list(leaves(data)))


def _text_digest(prompts: PromptSet) -> str:
    """Hash what a reward on the host is given: texts and metadata."""
    total = 0
    for row in zip(prompts.texts, prompts.metadata, strict=True):
        total = zlib.crc32(json.dumps(row, sort_keys=True, default=str).encode(), total)
    return f"{len(prompts.texts)} texts, {total:08x}"


def _scales(tree: PyTree) -> dict[str, float]:
    """Collect {path: alpha / rank} of the LoRAs in a tree."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Lora))
    loras = [(path, node) for path, node in nodes if isinstance(node, Lora)]
    return {jax.tree_util.keystr(path, simple=True, separator="."): float(lora.scale) for path, lora in loras}
