"""The exports of a run: policies as artifacts, and merged models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.files.artifacts import BEST, CRITIC, EMA, EXPORT, POLICY
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.errors import CheckpointError
from ppo_jax.runs.output import rundir
from ppo_jax.runs.setup import Result, Setup
from ppo_jax.train.state import RunState
from ppo_jax.types import Policy, PyTree


def export_policies(
    directory: Path,
    setup: Setup,
    state: RunState,
    evaluations: dict[int, dict[str, float]],
    best: Mapping[str, Any],
    notify: Callable[[str], None],
) -> Result:
    """Save the last policy, and the best one where that is another; return what the run returns."""
    updates = setup.loop.updates
    after = evaluations.get(updates, {})
    _save_policy(directory / EXPORT / POLICY, setup, state.policy, {"updates": updates, "evaluation": after})
    if state.policy.critic is not None:
        _save_policy(directory / EXPORT / CRITIC, setup, state.policy._replace(adapter=state.policy.critic), {})
    if state.ema is not None:
        _save_policy(directory / EXPORT / EMA, setup, state.ema, {"decay": setup.ppo.ema_decay})
    part = read_best(directory, best, updates, {"policy": state.policy}, notify)
    if part is not None:
        step = best["step"]
        facts = {"updates": step, "evaluation": evaluations.get(step, {}), "chosen_by": best.get("metric", "")}
        _save_policy(directory / EXPORT / BEST, setup, part["policy"], facts)
    return Result(state.policy, evaluations.get(0, {}), after)


def read_best(
    directory: Path, best: Mapping[str, Any], last: int, part: dict[str, PyTree], notify: Callable[[str], None]
) -> dict[str, PyTree] | None:
    """Read a `part` of the state that was evaluated best, from its checkpoint; None where that is the first or last.

    Where it cannot be read, which `notify` is told of, it is None too: the run is finished all the same.
    """
    step = best.get("step", last)
    if not 0 < step < last:
        return None
    try:
        return store.restore(directory / rundir.CHECKPOINTS, part, step, part=True)[0]
    except (CheckpointError, FileNotFoundError) as error:
        notify(f"the best policy, of update {step}, is not exported, since its checkpoint cannot be read: {error}")
        return None


def _save_policy(path: Path, setup: Setup, policy: Policy, facts: dict[str, Any]) -> None:
    artifacts.save(path, "policy", policy.adapter, policy.value_head, setup.model.base, facts, overwrite=True)


def save_role(
    path: Path,
    kind: artifacts.Kind,
    adapter: PyTree,
    head: PyTree,
    model: Model,
    meta: dict,
    layers: int | None = None,
) -> None:
    """Save an artifact of this model in place of what an interrupted run may have left. All processes call it."""
    artifacts.save(
        path,
        kind,
        adapter,
        head,
        model.base,
        meta,
        layers=layers,
        overwrite=True,
    )


def write_model(path: Path, model: Model, adapter: PyTree) -> None:
    """Write base and adapter, merged tensor by tensor, as a Hugging Face directory. All processes call it."""
    hf.save(path, model.config, model.params, model.tokenizer, adapter=adapter, overwrite=True)
    if model.generation and is_first():
        hf.write_generation(path, model.config, model.tokenizer, model.generation)
