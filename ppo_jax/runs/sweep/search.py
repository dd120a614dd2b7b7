"""What Optuna is asked for: samplers, pruners, distributions, storages. Everything here needs the extra `sweep`."""

import contextlib
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, PartialFixedSampler, RandomSampler, TPESampler

from ppo_jax.runs.sweep.plan import Plan, SweepConfig
from ppo_jax.runs.sweep.ranges import Range

optuna.logging.set_verbosity(optuna.logging.ERROR)

JOURNAL = "study.journal"
RUN, SLICE, FINAL, WHY = "run", "slice", "final", "why"  # attributes of a trial, see `study`


def distribution(one: Range) -> BaseDistribution:
    """The range as Optuna knows it; values that it does not know (lists) go by their text."""
    if one.values:
        return CategoricalDistribution([plain(value) for value in one.values])
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


def plain(value: Any) -> Any:
    """A value of a field as a study holds it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def rank_of(number: int, trials: Sequence[optuna.trial.FrozenTrial]) -> int:
    """How many settings were begun before trial `number`; what takes up an earlier trial is none of its own."""
    return sum(trial.number < number and RUN not in trial.user_attrs for trial in trials)


class PlannedSampler(BaseSampler):
    """Asks the search that is planned, within the group that the trial's rank gives it (all that is fixed is fixed).

    A new sampler for each trial, seeded by the sweep's seed and the trial's number: what is drawn depends on the study,
    not on the slice that asks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.inner: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        rank = rank_of(trial.user_attrs.get(RUN, trial.number), study.get_trials(deepcopy=False))
        rank = min(rank, self.plan.trials - 1)  # one too many is dropped as soon as it is seen
        points, space = self.plan.points, self.plan.space
        fixed = points[rank] if points else space.groups[self.plan.group_of(rank)]
        seed = int(np.random.SeedSequence([self.plan.config.seed, trial.number]).generate_state(1)[0])
        inner = _search(self.plan.config, seed, len(space.traced))
        with no_warnings():
            self.inner = PartialFixedSampler({path: plain(value) for path, value in fixed.items()}, inner)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Around what Optuna calls experimental; the version is pinned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _search(config: SweepConfig, seed: int, traced: int) -> BaseSampler:
    if config.search in ("random", "grid"):
        return RandomSampler(seed)
    if config.search == "cmaes" and traced > 1:  # in one dimension there is nothing to adapt
        return CmaEsSampler(seed=seed)
    return TPESampler(seed=seed, constant_liar=True)


def make_pruner(config: SweepConfig, updates: int, chunk: int) -> optuna.pruners.BasePruner:
    """Successive halving or Hyperband over updates."""
    least = config.prune_after or chunk
    if config.prune == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=config.prune_factor)
    if config.prune == "hyperband":
        return optuna.pruners.HyperbandPruner(least, updates, config.prune_factor)
    return optuna.pruners.NopPruner()


def open_storage(url: str, directory: Path) -> optuna.storages.BaseStorage:
    """The database at `url`, or the journal in the sweep's directory.

    Raises ConnectionError where the database cannot be reached, ValueError where its driver is not installed.
    """
    if not url:
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        return JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    for attempt in range(5):  # several slices may make the tables at the same moment
        try:
            # Connections are tried before they are used: the database may have been restarted.
            return optuna.storages.get_storage(
                optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "pool_size": 2})
                if not url.startswith("sqlite")
                else url
            )
        except (ImportError, ModuleNotFoundError) as error:
            raise ValueError(f"sweep.storage={hide_password(url)}: {error}") from error
        except Exception as error:  # of whatever driver it is
            if attempt == 4:
                raise ConnectionError(f"sweep.storage={hide_password(url)} cannot be reached: {error}") from error
            time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError


def hide_password(url: str) -> str:
    """The URL without the password that it may hold."""
    with contextlib.suppress(Exception):
        from sqlalchemy.engine import make_url

        return make_url(url).render_as_string(hide_password=True)
    return url.split("@")[-1]
