"""Going on with a run: the newest checkpoint that is whole, the facts that must be the same, and where damage goes."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ppo_jax.data.disk import make_directory, sync
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.parallel.agreement import agree, of_first
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.errors import CheckpointError, DamagedCheckpoint
from ppo_jax.runs.output import rundir
from ppo_jax.train.dpo import DPOConfig
from ppo_jax.train.options import PPOConfig
from ppo_jax.types import PyTree

Resume = Literal["no", "yes", "auto"]  # auto: go on with a run if there is one, else start one

# Facts (dotted prefixes) that may change between the two parts of a run. All others must be the same: with another
# base, reward, seed or batch the second part would not be the run that the first one was.
MAY_CHANGE = (
    "hyper.",
    "loop.",
    "versions.",
    "machine.",
    "base.name",
    "held_out",
    "ppo.accumulate",
    "ppo.length_buckets",
    "ppo.logprob_chunk",
    "ppo.prompt_buckets",
    "ppo.sampling.gather_weights",
    "ppo.sampling.slots",
    "sft.accumulate",
    "sft.logprob_chunk",
    "dpo.accumulate",
    "dpo.logprob_chunk",
    "compute.remat",
    "compute.attention",
)


class IncompatibleRun(ValueError):
    """The checkpoint belongs to a run with other facts; all of them are listed."""


class Restored(NamedTuple):
    state: PyTree
    step: int
    meta: dict[str, Any]  # what was saved beside the state


def restore(
    directory: Path, target: PyTree, facts: Mapping[str, Any], notify: Callable[[str], None]
) -> Restored | None:
    """The newest whole checkpoint of a run directory, in the structure of `target`; None where there is none.

    `facts` (nested, of JSON values) are compared with those of the checkpoint under "facts". Damaged checkpoints are
    named through `notify` and, once an older one could be read, moved into the folder `damaged/`: none is deleted.

    Collective. A checkpoint that is damaged for one of several processes is so for all: they take the newest that is
    whole for each, and the first of them moves the others.

    Raises:
      IncompatibleRun: facts differ that may not.
      CheckpointError: the state has another shape; or there are checkpoints, and all of them are damaged.
      OSError: a damaged checkpoint cannot be moved.
    """
    checkpoints = directory / rundir.CHECKPOINTS
    damaged: list[tuple[int, str]] = []
    for step in reversed(of_first(store.all_steps(checkpoints))):

        def read_facts(step: int = step) -> dict[str, Any]:
            meta = store.read_meta(checkpoints, step)
            _check(checkpoints / str(step), meta.get("facts", {}), facts, notify)
            return meta

        try:
            kinds = IncompatibleRun, CheckpointError, DamagedCheckpoint, FileNotFoundError
            meta = agree(read_facts, *kinds)
            state, _ = store.restore(checkpoints, target, step)
        except DamagedCheckpoint as error:
            notify(f"damaged checkpoint: {error}")
            damaged.append((step, str(error)))
            continue
        for number, _ in damaged:
            kept = agree(functools.partial(_first_sets_aside, directory, number))
            if kept is not None:
                notify(f"the damaged checkpoint of update {number} was moved to {kept}; going on from update {step}")
        return Restored(state, step, meta)
    if damaged:
        raise CheckpointError(
            f"{checkpoints}: no checkpoint can be read:\n  " + "\n  ".join(text for _, text in damaged) + "\n"
            "Bring one back from a copy, or start anew with --overwrite or in another run directory"
        )
    return None


def _first_sets_aside(directory: Path, step: int) -> Path | None:
    """None in every process but the first, whose directory is the run's."""
    return set_aside(directory, step) if jax.process_index() == 0 else None


def set_aside(directory: Path, step: int) -> Path:
    """Moves a checkpoint out of the way, under a name that is free."""
    folder = directory / rundir.DAMAGED
    make_directory(folder)
    names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
    target = next(folder / name for name in names if not (folder / name).exists())
    checkpoints = directory / rundir.CHECKPOINTS
    (checkpoints / str(step)).rename(target)
    for place in (folder, checkpoints):
        sync(place)
    return target


def drop_later_records(directory: Path, step: int, phases: Sequence[str] = ("ppo", "eval")) -> None:
    """Drops what a run wrote after `step`, and the samples of an evaluation at `step` that has no record yet."""
    rundir.truncate_run(directory, step, phases)
    records = read_jsonl(directory / rundir.METRICS)
    if not any(record.get("phase") == "eval" and record.get("step") == step for record in records):
        rundir.drop_evaluations(directory, step - 1)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(lines of facts that must not differ and do, lines of those that may), by dotted name."""
    old, new = _flat(saved), _flat(now)
    defaults = _flat({"ppo": dataclasses.asdict(PPOConfig()), "dpo": dataclasses.asdict(DPOConfig())})
    serious: list[str] = []
    harmless: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old and name in defaults and new[name] == defaults[name]:
            continue  # a choice that the code of the checkpoint did not have yet, made as it did
        if old.get(name) != new.get(name):
            line = f"{name}: {_shown(old, name)} in the checkpoint, {_shown(new, name)} now{_without_effect(name, new)}"
            (harmless if name.startswith(MAY_CHANGE) else serious).append(line)
    return serious, harmless


def _without_effect(name: str, now: Mapping[str, Any]) -> str:
    """Say so of a change that changes nothing any more."""
    if name == "hyper.kl_coef" and now.get("ppo.kl.control") == "adaptive":
        return " (no effect: the coefficient adapts, and goes on from the checkpoint's)"
    return ""


def _check(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    serious, harmless = differences(saved, now)
    if serious:
        raise IncompatibleRun(
            f"{path} is of another run:\n  " + "\n  ".join(serious) + "\n"
            "Give the same again, or choose another run directory; a trained policy can be taken from export/"
        )
    if harmless:
        notify("resumed with changes:\n  " + "\n  ".join(harmless))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return str(flat[name]) if name in flat else "nothing"
