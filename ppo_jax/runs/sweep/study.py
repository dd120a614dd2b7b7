"""One study that many slices share: who runs what, and what became of it. On each slice process 0 alone is here.

A setting is a *run*, known by the number of the trial that began it. Where a slice dies, its trials are failed, and new
ones take them up: the *attempts* of a run. Optuna gives two things that are atomic, the order of trial numbers and the
step from one state to the next, and everything rests on them:

    a setting counts if fewer than the planned number began before it     so none is one too many
    an attempt counts if every earlier one of its run has failed          so none is made twice
    a run has ended if an attempt was completed or pruned, or is FINAL     so none is lost

Attributes of a trial: RUN (of attempts after the first), SLICE (who has it), WHY (it was stopped), FINAL (it is not to
be taken up again). What cannot be told while the storage is away is told later, in order.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from ppo_jax.runs.sweep import search
from ppo_jax.runs.sweep.heartbeat import Heartbeat, name_slice
from ppo_jax.runs.sweep.plan import Plan, directions
from ppo_jax.runs.sweep.search import FINAL, RUN, SLICE, WHY

T = TypeVar("T")
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
ABOUT = "sweep"  # attribute of the study: what is searched


class Claim(NamedTuple):
    """A setting that this slice is to run."""

    trial: int  # its attempt
    run: int
    group: int
    values: dict[str, Any]  # of every field that is searched


class Study:
    """The slice's view of the study. Every method may be called while the storage is away.

    notify: is told when it goes away and comes back.
    """

    def __init__(self, directory: Path, plan: Plan, name: str, updates: int, notify: Callable[[str], None]) -> None:
        self.plan, self.notify = plan, notify
        self.slice = name_slice()
        self.chunk = plan.config.chunk or max(1, updates // 10)
        self.distributions = {one.path: search.distribution(one) for one in plan.space.ranges}
        self.storage = search.open_storage(plan.config.storage, directory)
        self.study = optuna.create_study(
            study_name=plan.config.study or name,
            storage=self.storage,
            sampler=search.PlannedSampler(plan),
            pruner=search.make_pruner(plan.config, updates, self.chunk),
            directions=directions(plan.config.objective),
            load_if_exists=True,
        )
        self._claim_study(name)
        self.held: dict[int, optuna.Trial] = {}
        self.untold: collections.deque[Callable[[], object]] = collections.deque()
        self.away = False
        self.pulse = Heartbeat(self.study, self.slice, plan.config.heartbeat, plan.config.grace)

    def _claim_study(self, name: str) -> None:
        """Says what the study searches, or raises ValueError where it searches something else."""
        own: dict[str, Any] = {one.path: one.text for one in self.plan.space.ranges}
        own |= {"seeds": list(self.plan.space.seeds), "objective": list(self.plan.config.objective)}
        before = self.study.user_attrs.get(ABOUT)
        if before is None:
            self.study.set_user_attr(ABOUT, json.dumps(own))
            with search.no_warnings():
                self.study.set_metric_names([name.removeprefix("-") for name in self.plan.config.objective])
            return
        if json.loads(before) != own:
            raise ValueError(
                f"the study {self.study.study_name!r} searches something else ({before}): give the same ranges and "
                "objective, another --sweep.study, or another --run-dir"
            )

    # -- the storage may be away ---------------------------------------------------------------------------------------

    def contact(self, action: Callable[[], T], default: T) -> T:
        """`action()`, after what had been left untold; `default` where the storage cannot be reached."""
        try:
            while self.untold:
                self.untold[0]()
                self.untold.popleft()
            result = action()
        except UNREACHABLE as error:
            if not self.away:
                first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                self.notify(f"the study cannot be reached: {first}. Training goes on; results are told later")
            self.away = True
            return default
        if self.away:
            self.notify("the study is reached again, and everything has been told")
        self.away = False
        return result

    def tell_later(self, action: Callable[[], object]) -> None:
        """Has something told as soon as the storage can be reached."""
        self.untold.append(action)
        self.contact(lambda: None, None)

    # -- who runs what -------------------------------------------------------------------------------------------------

    def next(self) -> Claim | None:
        """The next setting for this slice: one that was left by another, or a new one; None where there is none now."""
        return self.contact(self._next, None)

    def _next(self) -> Claim | None:
        self._take_up()
        while True:
            trials = self._trials()
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not waiting and search.rank_of(len(trials), trials) >= self.plan.trials:
                return None
            trial = self.study.ask(self.distributions)
            trial.set_user_attr(SLICE, self.slice)
            trials = self._trials()
            run = trial.user_attrs.get(RUN, trial.number)
            rank = search.rank_of(run, trials)
            if rank >= self.plan.trials:
                trial.set_user_attr(FINAL, "one more than planned")
            elif all(other.state == TrialState.FAIL for other in attempts(run, trials) if other.number < trial.number):
                self.held[trial.number] = trial
                return Claim(trial.number, run, self.plan.group_of(rank), self._values(trial.params))
            self.study.tell(trial, state=TrialState.FAIL)

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The fields' own values in place of how the study holds them."""
        named = {one.path: {search.plain(value): value for value in one.values} for one in self.plan.space.ranges}
        return {path: named[path].get(value, value) for path, value in params.items()}

    def _take_up(self) -> None:
        """Fails the attempts of slices that are dead, and has every run that is open and has none taken up again."""
        trials = self._trials()
        for trial in trials:
            others = trial.state == TrialState.RUNNING and trial.number not in self.held
            if others and self.pulse.is_dead(trial.user_attrs.get(SLICE), trial.number):
                self._fail(trial.number)
        trials = self._trials()
        for run in runs(trials):
            tries = attempts(run.number, trials)
            if any(one.state != TrialState.FAIL or FINAL in one.user_attrs for one in tries):
                continue
            if search.rank_of(run.number, trials) >= self.plan.trials:
                continue
            self._add_attempt(run, tries)

    def _fail(self, number: int, **why: str) -> None:
        """Ends an attempt, unless another slice was faster."""
        try:
            for name, text in why.items():
                self.storage.set_trial_user_attr(self._id(number), name, text)
            self.study.tell(number, state=TrialState.FAIL)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            pass

    def _add_attempt(self, run: FrozenTrial, tries: Sequence[FrozenTrial]) -> None:
        last = max(tries, key=lambda one: len(one.params))
        given_up = len(tries) >= self.plan.config.attempts
        attributes = {RUN: run.number} | ({FINAL: f"given up after {len(tries)} attempts"} if given_up else {})
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL if given_up else TrialState.WAITING,
                params=last.params,
                distributions=last.distributions,
                user_attrs=attributes,
                intermediate_values={} if given_up else max((one.intermediate_values for one in tries), key=len),
            )
        )

    # -- what becomes of it --------------------------------------------------------------------------------------------

    def report(self, number: int, step: int, value: float) -> str:
        """Tells what a trial has reached: "go on", "prune", or "lost" where another slice has taken it up."""
        return self.contact(lambda: self._report(number, step, value), "go on")

    def _report(self, number: int, step: int, value: float) -> str:
        trial = self.held[number]
        if len(self.plan.config.objective) > 1:  # Optuna keeps and prunes by a single number only
            return "lost" if self._frozen(number).state.is_finished() else "go on"
        try:
            if step not in self._frozen(number).intermediate_values:
                trial.report(value, step)
        except optuna.exceptions.UpdateFinishedTrialError:
            return "lost"
        return "prune" if trial.should_prune() else "go on"

    def finish(self, number: int, values: Sequence[float], facts: Mapping[str, Any]) -> None:
        """Tells the objectives of a trial that has done all its updates, with what else is known of it."""

        def tell() -> None:
            if self._frozen(number).state.is_finished():
                return
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # ended elsewhere
                for name, fact in facts.items():
                    self.storage.set_trial_user_attr(self._id(number), name, fact)
                self.study.tell(number, list(values))

        self.held.pop(number, None)
        self.tell_later(tell)

    def stop(self, number: int, why: str, facts: Mapping[str, Any]) -> None:
        """Tells that a trial has ended before its last update: pruned, not finite, too far from the reference."""

        def tell() -> None:
            if self._frozen(number).state.is_finished():
                return
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                for name, fact in {WHY: why, **facts}.items():
                    self.storage.set_trial_user_attr(self._id(number), name, fact)
                self.study.tell(number, state=TrialState.PRUNED)

        self.held.pop(number, None)
        self.tell_later(tell)

    def release(self, number: int) -> None:
        """Gives a trial back: another slice may take it up at once, from its checkpoint."""

        def tell() -> None:
            self._fail(number)
            self._take_up()

        self.held.pop(number, None)
        self.tell_later(tell)

    def all_ended(self) -> bool:
        """Whether nothing is left to do, here or elsewhere, and all that this slice knows has been told."""
        return self.contact(self._all_ended, False) and not self.untold

    def _all_ended(self) -> bool:
        return not open_runs(self._trials(), self.plan.trials)

    def close(self) -> None:
        """Ends the signs of life."""
        self.pulse.stop()

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)


def _unreachable() -> tuple[type[Exception], ...]:
    kinds: list[type[Exception]] = [optuna.exceptions.StorageInternalError, OSError]
    try:
        from sqlalchemy.exc import DBAPIError

        kinds.append(DBAPIError)
    except ImportError:
        pass
    return tuple(kinds)


UNREACHABLE = _unreachable()


def runs(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The first attempts."""
    return [trial for trial in trials if RUN not in trial.user_attrs]


def attempts(run: int, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The attempts of a run, oldest first."""
    return [trial for trial in trials if trial.user_attrs.get(RUN, trial.number) == run]


def open_runs(trials: Sequence[FrozenTrial], planned: int) -> list[int]:
    """Runs that have not ended; of those that have not begun, the numbers that they may get."""
    begun = runs(trials)[:planned]
    left = [
        run.number
        for run in begun
        if not any(one.state in ENDED or FINAL in one.user_attrs for one in attempts(run.number, trials))
    ]
    return left + list(range(len(trials), len(trials) + planned - len(begun)))
