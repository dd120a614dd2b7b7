"""The facts of a run, in JSON values: for its checkpoints, its report, and the card of its export."""

import dataclasses
import json
import platform
import zlib
from collections.abc import Sequence
from importlib import metadata as packages
from typing import Any

import jax
import numpy as np

from ppo_jax.data.disk import strict
from ppo_jax.models.adapters import Lora
from ppo_jax.runs.checkpoints.checksums import array_sum
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Setup
from ppo_jax.types import Policy, PyTree


def environment() -> dict[str, Any]:
    """Collect versions and machine, for the report and for checkpoints."""
    names = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: packages.version(name) for name in names},
        "machine": f"{jax.device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}",
    }


def run_facts(setup: Setup, policy: Policy) -> dict[str, Any]:
    """Collect, as JSON values, what a checkpoint has to agree with before the run goes on from it.

    What the arrays of a state do not tell is named here: the scales of LoRAs, the compute dtype.
    """
    sides = {"on the device": setup.reward.device, "on the host": setup.reward.host}
    where = " and ".join(side for side, function in sides.items() if function is not None)
    around = environment()
    found = {
        "base": {"name": setup.model.name, "fingerprint": setup.model.fingerprint},
        "reward": {"where": where, "name": setup.reward.name, "arrays": _digest(setup.reward.params)},
        "lora_scales": _scales({"policy": policy, "reward": setup.reward.params}),
        "compute": {name: getattr(setup.model.config, name) for name in ("dtype", "remat", "attention")},
        "prompts": _rows_digest(setup.prompts.rows),
        "prompt_texts": _text_digest(setup.prompts),
        "held_out": _rows_digest(setup.held_out.rows),
        "held_out_texts": _text_digest(setup.held_out),
        "pretrain": _rows_digest(setup.pretrain),
        "seed": setup.seed,
        "batch_size": setup.loop.batch_size,
        "ppo": dataclasses.asdict(setup.ppo),
        "hyper": setup.hyper._asdict(),
        "loop": {name: value for name, value in dataclasses.asdict(setup.loop).items() if name != "batch_size"},
        "versions": around["versions"],
        "machine": {"devices": around["machine"], "processes": jax.process_count(), "mesh": _mesh()},
    }
    return strict(found)


def _mesh() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    return "none" if mesh.empty else str(dict(mesh.shape))


def _digest(tree: PyTree) -> str:
    """Hash the bytes of a tree's arrays, in their order."""
    sums = [array_sum(leaf) for leaf in jax.tree.leaves(tree)]
    return f"{len(sums)} arrays, {array_sum(np.array(sums, np.uint32)):08x}"


def _rows_digest(rows: Sequence[Sequence[int]]) -> str:
    return _digest([np.asarray(row, np.int32) for row in rows])


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
