"""Ranges as people write them, and every mistake in one: found before anything compiles, with the field named."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from ppo_jax.runs.sweep.plan import SweepConfig, check_space, describe_plan, make_plan, make_space
from ppo_jax.runs.sweep.ranges import Range, read_ranges, set_fields
from ppo_jax.train.options import PPOConfig, check_hyper
from ppo_jax.types import Hyper


@dataclasses.dataclass(frozen=True)
class Policy:
    rank: int = 8
    kind: Literal["lora", "full"] = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = "m"
    seed: int = 0
    run_dir: Path = Path("runs/x")
    policy: Policy = Policy()
    ppo: PPOConfig = PPOConfig()
    hyper: Hyper = Hyper()
    resume: str = "no"
    batch: int = 64


BASE = Settings()


def read(**given: str) -> dict[str, Range]:
    return read_ranges(Settings, {name.replace("__", "."): text for name, text in given.items()}, BASE)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hyper.kl-coef", "log 0.005..0.2", dict(low=0.005, high=0.2, log=True, values=())),
        ("hyper.kl_coef", "0.1..0.5", dict(low=0.1, high=0.5, log=False, values=())),
        ("hyper.clip-low", "0.1 0.2 0.3", dict(values=(0.1, 0.2, 0.3))),
        ("hyper.clip-low", "0.1, 0.2,0.3", dict(values=(0.1, 0.2, 0.3))),
        ("hyper.lam", "0.9..1.0 step 0.05", dict(values=(0.9, 0.95, 1.0))),
        ("hyper.learning-rate", "log 1e-4..1e-2 in 3", dict(values=(1e-4, 1e-3, 1e-2))),
        ("hyper.lam", "0.5..1 in 3", dict(values=(0.5, 0.75, 1.0))),
        ("policy.rank", "4 8 16", dict(values=(4, 8, 16))),
        ("policy.rank", "2..5", dict(low=2, high=5, whole=True)),
        ("policy.rank", "log 1..64 in 4", dict(values=(1, 4, 16, 64))),
        ("policy.kind", "lora full", dict(values=("lora", "full"))),
        ("ppo.whiten-advantages", "true false", dict(values=(True, False))),
        ("seed", "0..4", dict(values=(0, 1, 2, 3, 4))),
        ("seed", "7 3", dict(values=(7, 3))),
    ],
)
def test_a_range_is_read(name: str, text: str, expected: dict[str, Any]) -> None:
    (found,) = read_ranges(Settings, {name: text}, BASE).values()
    assert found.path == name.replace("-", "_") and found.text == text
    assert {key: getattr(found, key) for key in expected} == {
        key: pytest.approx(value) if key == "values" and isinstance(value[0:1] and value[0], float) else value
        for key, value in expected.items()
    }


def test_scalars_of_hyper_are_members_of_one_program_and_nothing_else_is() -> None:
    found = read(hyper__gamma="0.9 1.0", policy__rank="4 8", batch="32 64")
    assert {path: one.traced for path, one in found.items()} == {
        "hyper.gamma": True, "policy.rank": False, "batch": False}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "hyper.kl-coeff",
            "0.1 0.2",
            r"hyper\.kl_coeff: unknown field; did you mean hyper\.kl_coef\? There are: hyper\.lear",
        ),
        (
            "hyperr.kl-coef",
            "0.1 0.2",
            r"hyperr\.kl_coef: unknown field; did you mean hyper\.kl_coef\? There are: model",
        ),
        ("hyper", "0.1 0.2", r"ranges: hyper: this is a group of fields; name one of learning_rate"),
        ("hyper.gamma.x", "0.1 0.2", r"ranges: hyper\.gamma\.x: unknown field; hyper\.gamma is one value"),
        ("run-dir", "a b", r"ranges: run_dir belongs to the sweep itself"),
        ("hyper.kl-coef", "", r"ranges: hyper\.kl_coef: '' is no range"),
        ("hyper.kl-coef", "0.1 .. 0.2 .. 0.3", r"hyper\.kl_coef: .* is no range\. Write values"),
        ("hyper.kl-coef", "log 0.1 0.2", r"hyper\.kl_coef: 'log 0\.1 0\.2' is no range"),
        ("hyper.kl-coef", "0.2..0.1", r"hyper\.kl_coef: 0\.2\.\.0\.1: the lower end comes first"),
        ("hyper.kl-coef", "0.2..0.2", r"the lower end comes first, and the two differ"),
        ("hyper.kl-coef", "log 0..0.2", r"a logarithmic range starts above 0"),
        ("hyper.kl-coef", "0..1 step 0", r"step is a positive number"),
        ("hyper.kl-coef", "0..1 step 1e-9", r"at most 10000 of which lie in the range"),
        ("hyper.kl-coef", "log 0.1..1 step 0.1", r"without log"),
        ("hyper.kl-coef", "0..1 in 1", r"in COUNT wants a whole number from 2"),
        ("hyper.kl-coef", "0..1 in 2.5", r"in COUNT wants a whole number from 2"),
        ("hyper.kl-coef", "0.1 x", r"ranges: hyper\.kl_coef"),
        ("hyper.kl-coef", "0.1 0.1", r"hyper\.kl_coef: 0\.1 0\.1: a value is given twice"),
        ("policy.rank", "4 8.5", r"policy\.rank"),
        ("policy.rank", "0 4", r"rank=0 must be at least 1"),
        ("policy.rank", "0..4", r"rank=0 must be at least 1"),
        ("policy.rank", "1.5..4", r"policy\.rank: 1\.5\.\.4: the field is a whole number"),
        ("policy.kind", "lora qlora", r"policy\.kind"),
        ("policy.kind", "0..4", r"policy\.kind: 0\.\.4: only numbers have a range"),
        ("seed", "0.5 1", r"seed"),
        ("seed", "log 1..8", r"ranges: seed: log 1\.\.8: name the seeds, as 0\.\.4 or 0 1 2"),
    ],
)
def test_a_mistake_in_a_range_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_ranges(Settings, {name: text}, BASE)


def test_a_field_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"hyper\.kl_coef is given twice"):
        read_ranges(Settings, {"hyper.kl-coef": "0.1 0.2", "hyper.kl_coef": "0.3 0.4"}, BASE)


def test_fields_are_set_and_nothing_else_changes() -> None:
    made = set_fields(BASE, {"hyper.kl_coef": 0.3, "policy.rank": 2, "ppo.kl.control": "adaptive"})
    assert made.hyper == BASE.hyper._replace(kl_coef=0.3)
    assert made.policy == Policy(rank=2) and made.ppo.kl.control == "adaptive"
    assert dataclasses.replace(made, hyper=BASE.hyper, policy=BASE.policy, ppo=BASE.ppo) == BASE


# -- the plan ----------------------------------------------------------------------------------------------------------


def space(search: str = "tpe", **given: str):
    return make_space(read(**given), 5, search)


def test_static_fields_make_groups_and_the_seed_repeats() -> None:
    found = space(hyper__gamma="0.9..1", policy__rank="2..4", batch="32 64", seed="0..2")
    assert [one.path for one in found.traced] == ["hyper.gamma"] and found.seeds == (0, 1, 2)
    assert len(found.groups) == 6 and {"policy.rank": 3, "batch": 64} in found.groups
    plan = make_plan(found, SweepConfig(trials=20, members=8), population=True)
    assert plan.shares == (4, 4, 3, 3, 3, 3) and plan.runs == 60
    assert [plan.group_of(rank) for rank in (0, 3, 4, 19)] == [0, 0, 1, 5]
    words = "\n".join(describe_plan(plan, 40))
    for part in ("20 trials by tpe, each with 3 seeds (0, 1, 2): 60 runs of 40 updates", "6 programs to compile",
                 "policy.rank: 2..4   (a program for each value)", "4 trials, 8 members at once"):  # fmt: skip
        assert part in words
    # 12 + 12 + 9 * 4 runs in places of 8: 2 + 2 + 4 * 2 rounds of 40 updates
    assert "about 40 minutes" in describe_plan(plan, 40, seconds=5.0)[-1]


def test_without_a_seed_range_the_settings_own_counts() -> None:
    assert space(hyper__gamma="0.9 1").seeds == (5,)


def test_a_grid_has_every_point_group_after_group() -> None:
    found = space("grid", hyper__gamma="0.9 1", policy__rank="2 4", hyper__lam="0.5..1 in 3")
    plan = make_plan(found, SweepConfig(search="grid", trials=1), population=True)
    assert plan.trials == 12 and plan.shares == (6, 6) and len(set(map(repr, plan.points))) == 12
    assert [plan.points[i]["policy.rank"] for i in range(12)] == [plan.space.groups[plan.group_of(i)]["policy.rank"]
                                                                 for i in range(12)]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ({}, SweepConfig(), "give at least one field besides the seed"),
        ({"seed": "0..2"}, SweepConfig(), "give at least one field besides the seed"),
        (
            dict(hyper__gamma="0.9..1"),
            SweepConfig(search="grid"),
            r"hyper\.gamma: 0\.9\.\.1: a grid visits every value",
        ),
        (
            dict(policy__rank="2 4", batch="8 16"),
            SweepConfig(trials=3),
            "sweep.trials=3 for 4 groups .* policy.rank, batch",
        ),
        (
            dict(hyper__gamma="0.9 1", hyper__lam="0.5..1"),
            SweepConfig(search="cmaes"),
            r"cmaes moves in numbers.*hyper\.gamma",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(given, config, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(make_space(read(**given), 0, config.search), config, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(trials=0), "trials=0 must be at least 1"),
        (dict(members=0), "members=0"),
        (dict(objective=()), "must name at least one metric"),
        (dict(objective=("kl", "kl")), "none twice"),
        (dict(heartbeat=60.0), "less than grace"),
        (dict(prune="halving", objective=("reward", "-kl")), "prune=halving needs one objective"),
        (dict(search="cmaes", objective=("reward", "-kl")), "cmaes knows one objective"),
        (dict(prune_metric="kl"), "prune is off"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(**fields)


def test_every_group_and_every_end_is_checked_and_named() -> None:
    def check(settings: Settings) -> None:
        settings.ppo.check_batch(settings.batch)
        check_hyper(settings.hyper)

    check_space(BASE, space(hyper__gamma="0.9..1", batch="32 64"), check)
    with pytest.raises(ValueError, match=r"ranges: gamma 1\.5: hyper\.gamma=1\.5 must be in \[0, 1\]"):
        check_space(BASE, space(hyper__gamma="0.9..1.5"), check)
    with pytest.raises(ValueError, match=r"ranges: batch 30: batch_size=30 .* do.* not divide"):
        check_space(BASE, space(hyper__gamma="0.9..1", batch="30 64"), check)
