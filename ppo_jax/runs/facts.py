"""The facts of a run, in JSON values: for its checkpoints, its report, and the card of its export."""

import contextlib
import dataclasses
import json
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.data.disk import strict
from ppo_jax.models.adapters import Lora
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.addresses import hide_addresses
from ppo_jax.runs.checkpoints.checksums import array_sum
from ppo_jax.runs.output import rundir
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


def record_start(directory: Path) -> None:
    """Adds this process to `sessions` of run.json (command, commit, time, machine), and leaves a README.txt.

    A disk that takes neither is no reason to end the run: what matters is tried again later, and says so.
    """
    session: dict[str, Any] = {
        "command": command_line(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    session |= {"commit": commit_of_code()} | environment()
    with contextlib.suppress(OSError):
        rundir.add_facts(directory, sessions=[*rundir.read_facts(directory).get("sessions", []), session])
        rundir.write_readme(directory)


def command_line() -> str:
    """The command that started this process, as a shell takes it, without the URLs of rewards that may hold a key."""
    words = sys.orig_argv
    script = Path(sys.argv[0]).name
    if script == "ppo-jax":  # the console command is a file that Python was given
        words = [script, *sys.argv[1:]]
    words = [hide_addresses(word) for word in words]
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else ""


def commit_of_code() -> str | None:
    """The commit of the clone that ppo_jax is imported from, with "+ changes" where files differ; None without one."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]  # or it lies in a clone of something else
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, timeout=10, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
        return head.stdout.strip() + (" + changes" if changed else "")
    return None


def reported_facts(setup: Setup) -> dict[str, Any]:
    """What the report is told of a PPO run beside its configuration; in run.json from its start."""
    reward, training = setup.reward.metadata, setup.reward.metadata.get("reward", {})
    held_out = reward.get("heldout", {})
    normalised = bool(training.get("normalise"))
    return {
        "base": setup.model.name,
        "prompts": len(setup.prompts.rows),
        "held_out": len(setup.held_out.rows),
        "measured_on": f"{setup.measured_on} prompts",
        "judges": {name: setup.labels.get(name, name) for name in setup.judges},
        "reward_accuracy": reward.get("accuracy"),
        "reward_mean": held_out.get("score_mean", 0.0 if normalised else None),
        "reward_std": held_out.get("score_std", 1.0 if normalised else None),
    }


def shared_facts(model: Model, loras: PyTree, seed: int) -> dict[str, Any]:
    """Collect what is named of every stage: its base, how that is run, the scales of LoRAs, the machine."""
    around, kind = environment(), model.config.quantise
    quantised = {} if kind == "none" else {"quantise": kind}  # what was not there before counts as its default
    return {
        "base": {"name": model.name, "fingerprint": model.fingerprint},
        "lora_scales": _scales(loras),
        "compute": {name: getattr(model.config, name) for name in ("dtype", "remat", "attention")} | quantised,
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
    return strict(found | _mixture(setup) | ({"start": _digest(setup.adapter)} if setup.start else {}))


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
    return strict(found | _mixture(setup) | ({} if setup.start is None else {"start": _digest(setup.start)}))


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
