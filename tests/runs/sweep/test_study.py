"""Who runs what: nothing is lost, nothing is made twice, whatever dies and whenever. Real Optuna, a real journal."""

import math
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from ppo_jax.runs.sweep import search
from ppo_jax.runs.sweep.plan import Plan, Space, SweepConfig, make_plan
from ppo_jax.runs.sweep.ranges import Range
from ppo_jax.runs.sweep.results import read_results, results_of, table, write_about, write_tables
from ppo_jax.runs.sweep.study import Study, attempts, open_runs

GAMMA = Range("hyper.gamma", "0.5..1", (), 0.5, 1.0)
KL = Range("hyper.kl_coef", "log 0.01..1", (), 0.01, 1.0, log=True)
RANK = Range("policy.rank", "4 8", (4, 8))
QUICK = dict(heartbeat=0.05, grace=0.4)


def plan_of(*ranges: Range, **config) -> Plan:
    config = QUICK | config
    groups = ({"policy.rank": 4}, {"policy.rank": 8}) if RANK in ranges else ({},)
    return make_plan(Space(ranges, config.pop("seeds", (0,)), groups), SweepConfig(**config), True)


class World:
    """Slices on one study."""

    def __init__(self, path: Path) -> None:
        self.path, self.studies, self.said = path, list[Study](), list[str]()

    def slice(self, plan: Plan, updates: int = 10) -> Study:
        self.studies.append(Study(self.path, plan, "sweep", updates, self.said.append))
        return self.studies[-1]


@pytest.fixture
def world(tmp_path: Path):
    found = World(tmp_path)
    yield found
    for study in found.studies:
        study.close()


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.study.get_trials()]


def die(study: Study) -> None:
    """As a process dies: no more signs of life, nothing is told."""
    study.close()


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.02)


def test_as_many_settings_as_planned_in_their_groups(world: World) -> None:
    study = world.slice(plan_of(GAMMA, RANK, trials=5))
    claims = [study.next() for _ in range(6)]
    assert claims[5] is None
    assert [claim.group for claim in claims[:5]] == [0, 0, 0, 1, 1]
    assert [claim.values["policy.rank"] for claim in claims[:5]] == [4, 4, 4, 8, 8]
    assert all(0.5 <= claim.values["hyper.gamma"] <= 1 for claim in claims[:5])
    assert len({claim.values["hyper.gamma"] for claim in claims[:5]}) == 5
    assert not study.all_ended()
    for number, claim in enumerate(claims[:5]):
        study.finish(claim.trial, [float(number)], {"spread": [0.0], "updates": 10})
    assert study.all_ended() and study.study.best_trial.value == 4.0


def test_what_is_drawn_depends_on_the_study_and_its_seed_not_on_the_slice(tmp_path: Path) -> None:
    drawn = []
    for folder, seed, slices in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        (tmp_path / folder).mkdir()
        world = World(tmp_path / folder)
        studies = [world.slice(plan_of(GAMMA, KL, trials=4, seed=seed, search="random")) for _ in range(slices)]
        drawn.append([studies[i % slices].next().values for i in range(4)])
        for study in studies:
            study.close()
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_grid_visits_every_point_once_though_slices_ask_at_the_same_time(world: World) -> None:
    points = Range("hyper.gamma", "", (0.5, 0.6, 0.7)), RANK
    plan = plan_of(*points, search="grid")
    found: list = []

    def work(study: Study) -> None:
        while (claim := study.next()) is not None:
            found.append(claim)
            study.finish(claim.trial, [1.0], {})

    threads = [threading.Thread(target=work, args=(world.slice(plan),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((c.values["policy.rank"], c.values["hyper.gamma"]) for c in found) == [
        (rank, gamma) for rank in (4, 8) for gamma in (0.5, 0.6, 0.7)
    ]
    trials = world.studies[0].study.get_trials()
    assert Counter(t.state for t in trials)[TrialState.COMPLETE] == 6 == len(results_of(world.studies[0].study).rows)


def test_a_slice_that_dies_is_taken_up_once_with_its_values_and_reports(world: World) -> None:
    plan = plan_of(GAMMA, trials=2)
    dead, alive, third = world.slice(plan), world.slice(plan), world.slice(plan)
    left, kept = dead.next(), alive.next()
    assert dead.report(left.trial, 3, 0.25) == "go on"
    die(dead)
    assert alive.next() is None  # it is not known to be dead yet
    claims: list = []
    until(lambda: claims.append(alive.next() or third.next()) or claims[-1] is not None)
    again = claims[-1]
    assert (again.run, again.values) == (left.run, left.values) and again.trial != left.trial
    assert alive.next() is None and third.next() is None
    owner = alive if again.trial in alive.held else third
    assert owner.study.get_trials()[again.trial].intermediate_values == {3: 0.25}
    assert owner.report(again.trial, 3, 99.0) == "go on"  # told before: not told twice
    owner.finish(again.trial, [1.0], {})
    alive.finish(kept.trial, [2.0], {})
    assert third.all_ended()
    rows = results_of(alive.study).rows
    assert [(row.run, row.state, row.attempts, row.objectives) for row in rows] == [
        (left.run, "finished", 2, (1.0,)),
        (kept.run, "finished", 1, (2.0,)),
    ]
    # The dead one was only slow: it finds that the run is no longer its own, and what it tells changes nothing.
    assert dead.report(left.trial, 6, 0.5) == "lost"
    dead.finish(left.trial, [77.0], {})
    assert [row.objectives for row in results_of(alive.study).rows] == [(1.0,), (2.0,)]


def test_a_slice_that_dies_between_taking_a_trial_and_saying_so(world: World) -> None:
    plan = plan_of(GAMMA, RANK, trials=2)
    study = world.slice(plan)
    study.study.ask()  # no values, no slice: killed in the middle
    claims: list = []
    until(lambda: claims.append(study.next()) or sum(c is not None for c in claims) == 2)
    runs = {c.run: c for c in claims if c}
    assert set(runs) == {0, 1} and [runs[i].group for i in (0, 1)] == [0, 1]
    assert all(set(claim.values) == {"hyper.gamma", "policy.rank"} for claim in runs.values())


def test_a_slice_that_dies_while_it_takes_up_another(world: World) -> None:
    """Between failing an attempt and adding the next one: any slice adds it, and only one of those counts."""
    plan = plan_of(GAMMA, trials=1)
    first, second, third = (world.slice(plan) for _ in range(3))
    claim = first.next()
    die(first)
    first.study.tell(claim.trial, state=TrialState.FAIL)
    run, tries = first.study.get_trials()[0], attempts(0, first.study.get_trials())
    second._add_attempt(run, tries)
    third._add_attempt(run, tries)  # both had seen that there was none
    found = [study.next() for study in (third, second)]
    assert [c and c.run for c in found] == [0, None]
    assert second.next() is None and third.next() is None
    third.finish(found[0].trial, [3.0], {})
    assert second.all_ended() and [row.attempts for row in results_of(second.study).rows] == [3]


def test_one_setting_too_many_does_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(GAMMA, trials=1)
    one, other = world.slice(plan), world.slice(plan)
    assert one.next() is not None
    rank, first = search.rank_of, iter([True])

    def rank_seen(number, trials):
        """The first time it is asked, it has not seen the other's trial yet."""
        return 0 if next(first, False) else rank(number, trials)

    monkeypatch.setattr(search, "rank_of", rank_seen)
    assert other.next() is None
    assert [t.user_attrs.get("final") for t in one.study.get_trials()] == [None, "one more than planned"]
    assert len(results_of(one.study).rows) == 1


def test_a_run_that_is_given_back_is_taken_up_at_once(world: World) -> None:
    plan = plan_of(GAMMA, trials=1, grace=50.0)
    one, other = world.slice(plan), world.slice(plan)
    claim = one.next()
    one.release(claim.trial)
    again = other.next()
    assert (again.run, again.values) == (claim.run, claim.values)


def test_a_run_that_kills_every_slice_is_given_up(world: World) -> None:
    study = world.slice(plan_of(GAMMA, trials=2, attempts=3))
    for _ in range(3):
        study.release(study.next().trial)
    (other,) = [study.next()]
    assert other.run != 0 and study.next() is None
    study.finish(other.trial, [0.0], {})
    assert study.all_ended()
    row = results_of(study.study).rows[0]
    assert (row.state, row.why) == ("given up", "given up after 3 attempts")


def test_a_trial_that_explodes_counts_as_bad_and_is_not_repeated(world: World) -> None:
    study = world.slice(plan_of(GAMMA, trials=1))
    claim = study.next()
    study.stop(claim.trial, "update 3: the KL is 1e9", {"updates": 3})
    assert study.all_ended() and states(study) == ["PRUNED"]
    (row,) = results_of(study.study).rows
    assert (row.state, row.why, row.updates) == ("stopped", "update 3: the KL is 1e9", 3)


def test_halving_prunes_the_worse_of_trials_between_chunks(world: World) -> None:
    study = world.slice(plan_of(GAMMA, trials=9, prune="halving", prune_factor=3, chunk=2), updates=20)
    claims = [study.next() for _ in range(9)]
    verdicts = {}
    for step in (2, 4, 6):
        for claim in reversed(claims):  # the best first, as a slice reports
            if verdicts.get(claim.trial) != "prune":
                verdicts[claim.trial] = study.report(claim.trial, step, float(claim.trial))
    kept = {trial for trial, verdict in verdicts.items() if verdict == "go on"}
    assert 8 in kept and 0 not in kept and 1 <= len(kept) <= 4


def test_two_objectives_give_a_frontier(world: World) -> None:
    study = world.slice(plan_of(GAMMA, trials=3, objective=("reward", "-kl")))
    for values in ([1.0, 5.0], [2.0, 9.0], [0.5, 7.0]):
        claim = study.next()
        assert study.report(claim.trial, 1, 0.0) == "go on"
        study.finish(claim.trial, values, {})
    assert [tuple(trial.values) for trial in study.study.best_trials] == [(1.0, 5.0), (2.0, 9.0)]


@pytest.mark.parametrize("kind", ["tpe", "random", "cmaes"])
def test_every_search_stays_in_the_ranges(world: World, kind: str) -> None:
    study = world.slice(plan_of(GAMMA, KL, trials=15, search=kind))
    while (claim := study.next()) is not None:
        assert 0.5 <= claim.values["hyper.gamma"] <= 1 and 0.01 <= claim.values["hyper.kl_coef"] <= 1
        study.finish(claim.trial, [-(math.log(claim.values["hyper.kl_coef"]) ** 2)], {})
    assert study.all_ended()


def test_another_sweep_on_the_same_study_is_refused(world: World) -> None:
    world.slice(plan_of(GAMMA, trials=2))
    with pytest.raises(ValueError, match="searches something else .*hyper.gamma.*another --run-dir"):
        world.slice(plan_of(KL, trials=2))


def test_what_cannot_be_told_is_told_later_in_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    study = world.slice(plan_of(GAMMA, trials=2, heartbeat=5.0, grace=50.0))
    one, other = study.next(), study.next()

    def broken(*args, **kwargs):
        raise optuna.exceptions.StorageInternalError("connection refused")

    with monkeypatch.context() as patch:
        for name in ("get_trial", "get_all_trials", "set_trial_user_attr", "get_trial_id_from_study_id_trial_number"):
            patch.setattr(study.storage, name, broken)
        study.finish(one.trial, [1.0], {})
        assert study.report(other.trial, 3, 1.0) == "go on" and study.next() is None and not study.all_ended()
        study.stop(other.trial, "not finite", {})
        assert len(study.untold) == 2 and len(world.said) == 1 and "connection refused" in world.said[0]
    assert study.all_ended() and not study.untold and "reached again" in world.said[-1]
    assert states(study) == ["COMPLETE", "PRUNED"]


def test_a_slice_is_not_dead_because_this_one_could_not_look(world: World) -> None:
    plan = plan_of(GAMMA, trials=1, heartbeat=5.0, grace=6.0)
    one, other = world.slice(plan), world.slice(plan)
    claim = one.next()
    pulse = other.pulse
    for _ in range(3):
        pulse._beat()
    name = "slice " + one.slice
    pulse.still[name], pulse.seen = 0.0, time.monotonic() - 3600  # an hour in which the database was away
    pulse._beat()
    assert pulse.still[name] <= 10.0  # two heartbeats of it count at most
    pulse.still[name] = 0.0
    one.pulse._beat()
    pulse._beat()
    assert pulse.still[name] == 0.0 and not pulse.is_dead(one.slice, claim.trial)
    pulse.still[name] = 6.1
    assert pulse.is_dead(one.slice, claim.trial)


def test_tables_hold_every_setting(world: World, tmp_path: Path) -> None:
    study = world.slice(plan_of(GAMMA, RANK, trials=3, seeds=(0, 1)))
    claims = [study.next() for _ in range(3)]
    study.finish(claims[0].trial, [1.5], {"spread": [0.1], "updates": 10})
    study.stop(claims[1].trial, "pruned after update 4", {"updates": 4})
    write_about(tmp_path, "", "sweep", "ppo-jax ppo")
    results = read_results(tmp_path)
    lines = table(results)
    assert [line["state"] for line in lines] == ["finished", "pruned", "trains"]
    assert lines[0]["reward"] == 1.5 and lines[0]["reward_std"] == 0.1 and lines[1]["reward"] is None
    assert lines[0]["directories"] == "trials/0000-seed0 trials/0000-seed1"
    write_tables(tmp_path, results)
    import pandas

    text, binary = pandas.read_csv(tmp_path / "trials.csv"), pandas.read_parquet(tmp_path / "trials.parquet")
    assert list(text.columns) == list(binary.columns) and text["policy.rank"].tolist() == [4, 4, 8]
    assert binary["reward"].tolist()[0] == 1.5 and open_runs(study.study.get_trials(), 3) == [2]
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        read_results(tmp_path / "nothing")
