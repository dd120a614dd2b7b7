"""One run of a stage that trains on fixed data: restored, measured, trained, saved; and what a policy leaves."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from ppo_jax.models.adapters import init_adapter, merge
from ppo_jax.models.files.artifacts import BEST, EXPORT, MODEL, POLICY
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.placement import create_on_mesh, place_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel import processes
from ppo_jax.rewards.failures import GivenUp
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.exports import read_best, save_role, write_model
from ppo_jax.runs.facts import offline_facts
from ppo_jax.runs.health import watch_run
from ppo_jax.runs.hooks import open_hooks
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.stage import Stage, start_or_resume
from ppo_jax.train.loop import Interrupted, train
from ppo_jax.train.offline import OfflineState, ParamStep, init_offline_state, make_update
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree

HELD_OUT = "heldout_"  # how the names of measurements begin in the records of a stage

Batch = TypeVar("Batch")
PassOn = Callable[[Iterable[Any]], Iterator[Any]]  # lets batches through until the run is to stop (`until_stopped`)


class Work(NamedTuple):
    """What a stage adds to the others."""

    phase: str  # what it is called in the log
    steps: int  # of the optimizer; 0: what `begin` does is all
    params: PyTree  # to be trained, fresh
    bind_step: Callable[[optax.GradientTransformation], ParamStep]
    batches: Callable[[int], Any]  # number of a step -> its rows on the host
    measure: Callable[[int, PyTree, PassOn], Mapping[str, float]]  # (steps done, params): what they are worth
    begin: Callable[[PyTree], PyTree] = lambda params: params  # before the first measurement, unless the run is resumed
    # What is made of the trained parameters, and what more is measured of that.
    complete: Callable[[PyTree], tuple[Any, Mapping[str, float]]] = lambda params: (None, {})


class Trained(NamedTuple):
    """What training leaves."""

    params: PyTree
    evaluations: dict[int, dict[str, float]]  # step -> what was measured
    best: dict[str, Any]  # of these the best, see `runs.stage.Start`
    completed: Any  # what `Work.complete` made of them


def train_offline(
    directory: Path, setup: OfflineSetup, work: Work, screen: Screen, resume: bool | Resume = "no"
) -> Trained:
    """Train in an opened run directory (`rundir.open_run`); unless `resume` is "no", from its last checkpoint.

    Raises as `runs.ppo.run_ppo`.
    """
    loop, optimizer = setup.loop.of(max(work.steps, 1)), make_optimizer()

    # -- restore -------------------------------------------------------------------------------------------------------
    state = create_on_mesh(lambda params: init_offline_state(params, optimizer), work.params)
    facts = offline_facts(setup, work.phase, work.params)
    where = (work.phase, HELD_OUT)
    stage = Stage(directory, work.phase, loop, facts, setup.config, screen, resume, where, f"--{work.phase}.steps")
    start = start_or_resume(stage, state)
    state = start.state
    if start.last is None:
        state = dataclasses.replace(state, params=work.begin(state.params))

    # -- open ----------------------------------------------------------------------------------------------------------
    with open_hooks(stage, start) as hooks:
        step = make_update(work.bind_step(optimizer), work.batches, setup.loop.rate(setup.options.learning_rate, loop))

        def measure(done: int, state: OfflineState) -> Mapping[str, float] | None:
            try:
                values = work.measure(done, state.params, functools.partial(until_stopped, stopping=hooks.stopping))
            except GivenUp:
                return None
            record(done, values)
            return values

        def record(done: int, values: Mapping[str, float]) -> None:
            if new := {name: value for name, value in values.items() if name not in hooks.evaluations.get(done, {})}:
                hooks.evaluations.setdefault(done, {}).update(new)
                hooks.record(done, work.phase, {f"{HELD_OUT}{name}": value for name, value in new.items()})

        hooks.measure, hooks.watch = measure, watch_run(directory, {"base": setup.model.name}, screen)
        if work.steps:
            hooks.puts_off = True
            # -- evaluate what was left --------------------------------------------------------------------------------
            state = hooks.evaluate_left(state)

            # -- train -------------------------------------------------------------------------------------------------
            state = train(state, step, loop, hooks)

            # -- save --------------------------------------------------------------------------------------------------
            hooks.finish(state)
        elif measure(0, state) is None:
            raise Interrupted(f"stopped by {hooks.stop(0)} before anything was trained")

    # -- complete ------------------------------------------------------------------------------------------------------
    completed, values = work.complete(state.params)
    record(work.steps, values)
    hooks.say_lost()
    return Trained(state.params, hooks.evaluations, hooks.best.record, completed)


def until_stopped(batches: Iterable[Batch], stopping: Callable[[], bool]) -> Iterator[Batch]:
    """Yield the batches; raise `GivenUp` where the run is to stop."""
    for batch in batches:
        if stopping():
            raise GivenUp
        yield batch


# -- a policy ----------------------------------------------------------------------------------------------------------


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
        """Merge the model at `path` in memory; it is made when it is first asked for, by all processes together."""
        fresh = lambda params, adapter: merge(params, adapter, self.base.config)  # noqa: E731
        params = create_on_mesh(fresh, self.base.params, self.adapter)
        fingerprint = processes.first_writes(lambda _: fingerprint_of(self.path))
        config = dataclasses.replace(self.base.config, quantise="none")
        return self.base._replace(name=str(self.path), config=config, params=params, fingerprint=fingerprint or "")


def init_policy(setup: OfflineSetup) -> PyTree:
    """Take the adapter that a policy starts from, or make a fresh one; on a mesh that is born on its shards."""
    if setup.start is not None:
        return place_on_mesh(jax.tree.map(jnp.copy, setup.start))
    model, key = setup.model, key_stream(setup.seed, "adapter")
    return create_on_mesh(lambda k, base: init_adapter(k, base, model.config, setup.adapter), key, model.params)


def export_policy(directory: Path, setup: OfflineSetup, steps: int, trained: Trained, screen: Screen) -> StageResult:
    """Save export/policy, export/best where another step was measured best, and, merged, export/model.

    On a mesh every process takes part, and the first one writes.
    """
    export, measured = directory / EXPORT, {step: _numbers(values) for step, values in trained.evaluations.items()}
    after = measured.get(steps, {})
    save_role(export / POLICY, "policy", trained.params, {}, setup.model, {"steps": steps, "heldout": after})
    best = read_best(directory, trained.best, steps, {"params": trained.params}, screen.message)
    if best is not None:
        step = trained.best["step"]
        facts = {"steps": step, "heldout": measured.get(step, {}), "chosen_by": trained.best["metric"]}
        save_role(export / BEST, "policy", best["params"], {}, setup.model, facts)
    write_model(export / MODEL, setup.model, trained.params)
    return StageResult(setup.model, trained.params, export / MODEL, measured.get(0, {}), after)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Turn what was read of metrics.jsonl into numbers: null is NaN there, an infinity is text."""
    return {name: float("nan") if value is None else float(value) for name, value in values.items()}
