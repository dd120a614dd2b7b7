"""The plan of a sweep: which settings are tried, in which groups, how many programs that is, and how long it takes."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ppo_jax.runs.sweep.ranges import SEED, Range, describe, set_fields


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Search ranges of settings in a study of many runs."""

    search: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    """The search takes values from a Parzen estimator (tpe), at random, from CMA-ES, or every point of a grid."""
    trials: int = 20
    """The search makes this many trials; a grid takes all of its points."""
    objective: tuple[str, ...] = ("reward",)
    """A good run has these metrics high at its last evaluation, those after a minus low; several give a frontier."""
    members: int = 8
    """One program holds this many runs at once (of ppo; the other stages make one run after another)."""
    prune: Literal["off", "halving", "hyperband"] = "off"
    """Asynchronous halving stops bad trials early (Li et al. 2020); hyperband runs several of it (Li et al. 2018)."""
    prune_metric: str = ""
    """Pruning goes by this metric of updates or evaluations, after a minus by its low values; empty: the objective."""
    prune_after: int = 0
    """Every trial may do this many updates; 0 means one chunk."""
    prune_factor: int = 3
    """One of so many trials goes on at each rung."""
    chunk: int = 0
    """A report of each trial goes to the study after so many updates; 0 means a tenth of the run."""
    storage: str = ""
    """The study is in the database at this URL (postgresql+psycopg://USER@HOST/NAME); empty means a file in run_dir."""
    study: str = ""
    """The study has this name in the database; empty means the name of run_dir."""
    seed: int = 0
    """This number seeds what the search draws."""
    heartbeat: float = 10.0
    """A slice gives a sign of life every so many seconds."""
    grace: float = 60.0
    """After so many seconds without one, a slice's trials are taken up by others, from their checkpoints."""
    attempts: int = 50
    """A trial is given up once it has been taken up so often."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("search", ("tpe", "random", "grid", "cmaes")),
            ("prune", ("off", "halving", "hyperband")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        least = dict(trials=1, members=1, prune_after=0, prune_factor=2, chunk=0, seed=0, attempts=1)
        for name, allowed_least in least.items():
            if getattr(self, name) < allowed_least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {allowed_least}")
        if not self.objective or len(set(self.objective)) != len(self.objective):
            raise ValueError(f"objective={self.objective!r} must name at least one metric, and none twice")
        if not 0 < self.heartbeat < self.grace:
            raise ValueError(f"heartbeat={self.heartbeat} must be positive and less than grace={self.grace}")
        if self.prune != "off" and len(self.objective) > 1:
            raise ValueError(f"prune={self.prune} needs one objective; there are {len(self.objective)}")
        if self.search == "cmaes" and len(self.objective) > 1:
            raise ValueError("search=cmaes knows one objective; choose tpe or random for several")
        if self.prune == "off" and (self.prune_metric or self.prune_after):
            raise ValueError("prune_metric and prune_after have no effect: prune is off")


class Space(NamedTuple):
    """What is searched: fields in which members may differ, fields that need a program of their own, and the seeds."""

    ranges: tuple[Range, ...]  # all but the seed's
    seeds: tuple[int, ...]
    groups: tuple[dict[str, Any], ...]  # every combination of what is not traced

    @property
    def traced(self) -> tuple[Range, ...]:
        return tuple(one for one in self.ranges if one.traced)

    @property
    def fixed(self) -> tuple[Range, ...]:
        """The fields that differ between groups only."""
        return tuple(one for one in self.ranges if not one.traced)


def make_space(ranges: Mapping[str, Range], seed: int, search: str) -> Space:
    """The space of some ranges; `seed` is used where none is given.

    Raises ValueError where a static field, or a grid, has a range without an end.
    """
    searched = tuple(one for path, one in ranges.items() if path != SEED)
    if not searched:
        raise ValueError("ranges: give at least one field besides the seed, as hyper.kl-coef: log 0.005..0.2")
    searched = tuple(_listed(one, search) for one in searched)
    fixed = [one for one in searched if not one.traced]
    groups = [dict(zip((one.path for one in fixed), values, strict=True))
              for values in itertools.product(*(one.values for one in fixed))]  # fmt: skip
    seeds = tuple(ranges[SEED].values) if SEED in ranges else (seed,)
    return Space(searched, seeds, tuple(groups))


def _listed(one: Range, search: str) -> Range:
    """The range with its values, where each has to be known."""
    if one.values or (one.traced and search != "grid"):
        return one
    if one.whole and not one.log and one.high - one.low < 1000:
        return one._replace(values=tuple(range(int(one.low), int(one.high) + 1)))
    why = "a grid visits every value" if one.traced else "every value of it is a program of its own"
    raise ValueError(f"ranges: {one.path}: {one.text}: {why}: name them, or add step SIZE or in COUNT")


def grid(space: Space) -> list[dict[str, Any]]:
    """All points, group after group, so that a program is left only once."""
    points = [dict(zip((one.path for one in space.traced), values, strict=True))
              for values in itertools.product(*(one.values for one in space.traced))]  # fmt: skip
    return [group | point for group in space.groups for point in points]


class Plan(NamedTuple):
    """What will be done; `shares[g]` trials in group g, one group after another."""

    space: Space
    config: SweepConfig
    points: tuple[dict[str, Any], ...]  # of a grid; else ()
    shares: tuple[int, ...]
    places: int  # runs that train at once

    @property
    def trials(self) -> int:
        return sum(self.shares)

    @property
    def runs(self) -> int:
        """With all seeds."""
        return self.trials * len(self.space.seeds)

    def group_of(self, rank: int) -> int:
        """The group of the trial that is `rank`-th to begin."""
        return next(i for i, end in enumerate(itertools.accumulate(self.shares)) if rank < end)


def make_plan(space: Space, config: SweepConfig, population: bool) -> Plan:
    """Trials are shared out evenly over the groups; a grid has its points."""
    points = tuple(grid(space)) if config.search == "grid" else ()
    trials, groups = len(points) or config.trials, len(space.groups)
    if trials < groups:
        raise ValueError(
            f"sweep.trials={trials} for {groups} groups of settings that need a program each: give at least {groups}, "
            "or fewer values for " + ", ".join(one.path for one in space.fixed)
        )
    if config.search == "cmaes" and any(one.values for one in space.traced):
        listed = ", ".join(one.path for one in space.traced if one.values)
        raise ValueError(f"sweep.search=cmaes moves in numbers: give {listed} as LOW..HIGH, or choose tpe")
    shares = [trials // groups + (i < trials % groups) for i in range(groups)]
    places = min(config.members, max(shares) * len(space.seeds)) if population else 1
    return Plan(space, config, points, tuple(shares), places)


def check_space(base: Any, space: Space, check: Callable[[Any], None]) -> None:
    """Raises ValueError, with the field named, where some settings of the space could not be run.

    Every group is checked, and in each the ends (or all values) of every other range.
    """
    for group in space.groups:
        where = f"ranges: {describe(group)}" if group else "ranges"
        _checked(check, set_fields(base, group, where), where)
        for one in space.traced:
            for value in one.values or (one.low, one.high):
                where = f"ranges: {describe(group | {one.path: value})}"
                _checked(check, set_fields(base, group | {one.path: value}, where), where)


def _checked(check: Callable[[Any], None], settings: Any, where: str) -> None:
    try:
        check(settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def describe_plan(plan: Plan, updates: int, seconds: float | None = None) -> list[str]:
    """The plan in words; `seconds` are those of one update of a whole population, once they are known."""
    space, config = plan.space, plan.config
    seeds = len(space.seeds)
    each = f", each with {seeds} seeds ({', '.join(map(str, space.seeds))})" if seeds > 1 else ""
    lines = [f"{plan.trials} trials by {config.search}{each}: {plan.runs} runs of {updates} updates"]
    lines += [
        f"  {one.path}: {one.text}{'' if one.traced else '   (a program for each value)'}" for one in space.ranges
    ]
    lines += [f"objective: {', '.join(map(in_words, config.objective))}"]
    if config.prune != "off":
        lines += [f"pruned by {config.prune} on {in_words(config.prune_metric or config.objective[0])}"]
    for number, (group, share) in enumerate(zip(space.groups, plan.shares, strict=True)):
        at_once = min(plan.places, share * seeds)
        what = describe(group) if group else "all"
        lines.append(f"group {number + 1} of {len(space.groups)} ({what}): {share} trials, {at_once} members at once")
    programs = "1 program" if len(space.groups) == 1 else f"{len(space.groups)} programs"
    if seconds is None:
        return [*lines, f"{programs} to compile; the minutes are known after the first updates"]
    left = sum(math.ceil(share * seeds / plan.places) for share in plan.shares) * updates * seconds / 60
    return [*lines, f"{programs} to compile; about {left:.0f} minutes on one slice, without pruning"]


def in_words(objective: str) -> str:
    """`reward, high` or `kl, low`."""
    return f"{objective[1:]}, low" if objective.startswith("-") else f"{objective}, high"


def directions(objective: Sequence[str]) -> list[Literal["minimize", "maximize"]]:
    """As Optuna calls them."""
    return ["minimize" if name.startswith("-") else "maximize" for name in objective]
