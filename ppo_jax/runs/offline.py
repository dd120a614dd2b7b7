"""One run of a stage that trains on fixed data: measured, trained, measured, saved."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.models.files.artifacts import EXPORT, MODEL, POLICY
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.placement import create_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel import processes
from ppo_jax.runs.exports import save_role, write_model
from ppo_jax.runs.health import watched
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.output.writers import PhaseWriter, phase_writer
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class StageResult:
    """A policy that was trained on fixed data."""

    base: Model
    adapter: PyTree
    path: Path  # of the model: both merged, a Hugging Face directory
    before: dict[str, float]  # what the stage measures on the held-out data
    after: dict[str, float]

    @functools.cached_property
    def model(self) -> Model:
        """The model at `path`, merged in memory; made when it is first asked for, by all processes together."""
        fresh = lambda params, adapter: merge(params, adapter, self.base.config)  # noqa: E731
        params = create_on_mesh(fresh, self.base.params, self.adapter)
        fingerprint = processes.first_writes(lambda _: fingerprint_of(self.path))
        return self.base._replace(name=str(self.path), params=params, fingerprint=fingerprint or "")


class Phase(NamedTuple):
    """What a stage is called in the log, how long it is, and what of its measurements is written there."""

    name: str
    steps: int
    shown: tuple[str, ...]


def run_offline(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    phase: Phase,
    measure: Callable[[PyTree], dict[str, float]],
    train: Callable[[PyTree, PhaseWriter], PyTree],
    seed: int,
    screen: Screen,
) -> StageResult:
    """Measure a fresh adapter, train, measure again, and save: export/policy and, merged, export/model.

    On a mesh the adapter is born on its shards, every process takes part, and the first one writes.

    Args:
      measure: adapter -> what it is worth.
      train: (adapter, which it may donate; write) -> the trained adapter.
    """
    write = watched(phase_writer(directory, screen, phase.name, phase.steps), phase.name, screen)

    def measure_at(step: int, tuned: PyTree) -> dict[str, float]:
        values = measure(tuned)
        write(step, {f"heldout_{name}": values[name] for name in phase.shown})
        return values

    key = key_stream(seed, "adapter")
    tuned = create_on_mesh(lambda k, base: init_adapter(k, base, model.config, adapter), key, model.params)
    before = measure_at(0, tuned)
    tuned = train(tuned, write)
    after = measure_at(phase.steps, tuned)
    export = directory / EXPORT
    save_role(export / POLICY, "policy", tuned, {}, model, meta={"steps": phase.steps, "heldout": after})
    write_model(export / MODEL, model, tuned)
    return StageResult(model, tuned, export / MODEL, before, after)
