"""A slice at work: every trial is the run that it would be alone, in a directory like any other."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.parallel.mesh import MeshConfig
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.sweep.command import plan_sweep, show_plan
from ppo_jax.runs.sweep.plan import SweepConfig
from ppo_jax.runs.sweep.results import read_results
from ppo_jax.runs.sweep.routine import Routine
from ppo_jax.runs.sweep.task import Job, job_settings
from ppo_jax.train.loop import Interrupted
from tests.sweep_task import RANGES, Settings, make_task, sweep
from tests.train.test_population import compilations

TASK = make_task()
UPDATES = Settings().loop.updates


def records(path: Path, phase: str = "ppo") -> list[dict]:
    return [record for record in read_jsonl(path / rundir.METRICS) if record["phase"] == phase]


def check_whole(directory: Path, updates: int = UPDATES) -> None:
    """Every finished run has each update once and in order, its evaluations, its checkpoint and its export."""
    for row in read_results(directory).rows:
        assert row.state == "finished"
        for name in row.names:
            path = directory / "trials" / name
            assert [r["step"] for r in records(path)] == list(range(1, updates + 1)), name
            assert [r["step"] for r in records(path, "eval")] == [s for s in range(updates + 1) if s % 3 == 0]
            assert store.latest_step(path / rundir.CHECKPOINTS) == updates
            assert (path / EXPORT / "policy").is_dir() and (path / rundir.CONFIG).exists()
            assert rundir.read_facts(path)["sessions"][0]["commit"] and (path / "README.txt").exists()


class Swept:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with compilations() as self.compiled:
            sweep(directory, ranges=RANGES | {"seed": "0 1"}, task=TASK, trials=2)
        self.results = read_results(directory)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two settings with two seeds, two runs at a time."""
    return Swept(tmp_path_factory.mktemp("slice") / "sweep")


def test_every_trial_is_whole_and_the_study_knows_its_mean_and_spread(swept: Swept) -> None:
    check_whole(swept.directory)
    assert len(swept.results.rows) == 2 and swept.results.seeds == (0, 1)
    for row in swept.results.rows:
        ends = [records(swept.directory / "trials" / name, "eval")[-1]["reward"] for name in row.names]
        assert row.objectives[0] == pytest.approx(np.mean(ends))
        assert row.spread[0] == pytest.approx(np.std(ends, ddof=1))
        rewards = [[r["reward"] for r in records(swept.directory / "trials" / name)] for name in row.names]
        assert row.course == {step: pytest.approx(np.mean([r[step - 2 : step] for r in rewards])) for step in (2, 4)}
    assert (swept.directory / "trials.csv").read_text().count("\n") == 3


def test_one_program_serves_all_members(swept: Swept) -> None:
    """Four runs in two places: two of them took the place of another."""
    assert sum("iterate_members" in name for name in swept.compiled) == 1
    assert sum(name.startswith("evaluate") or "evaluate" in name for name in swept.compiled) == 1


def test_a_trial_is_the_run_alone(swept: Swept, tmp_path: Path) -> None:
    """Its records, its evaluations and its last state, up to rounding; and facts that let it go on anywhere."""
    row = swept.results.rows[1]
    path = swept.directory / "trials" / row.names[1]
    setup = TASK.setup(dataclasses.replace(Settings(), seed=1, hyper=Settings().hyper._replace(
        **{name.removeprefix("hyper."): value for name, value in row.values.items()})))  # fmt: skip
    alone = rundir.open_run(tmp_path / "alone")
    with progress("test", main_process=False) as screen:
        run_ppo(alone, setup, screen)
    timed = {"time", "seconds", "tokens_per_second"}
    for phase in ("ppo", "eval"):
        for mine, its in zip(records(path, phase), records(alone, phase), strict=True):
            assert mine.keys() == its.keys()
            for name in mine.keys() - timed - {"phase", "value_clip_fraction"}:
                assert mine[name] == pytest.approx(its[name], rel=5e-3, abs=5e-4, nan_ok=True), (name, mine["step"])
    assert (
        store.read_manifest(path / rundir.CHECKPOINTS).keys() == store.read_manifest(alone / rundir.CHECKPOINTS).keys()
    )

    longer = setup._replace(loop=dataclasses.replace(setup.loop, updates=8))
    with progress("test", main_process=False) as screen:
        run_ppo(rundir.open_run(path, "yes"), longer, screen, "yes")
    assert [r["step"] for r in records(path)] == list(range(1, 9))


def test_pruned_trials_are_saved_where_they_ended_and_their_places_are_filled(tmp_path: Path) -> None:
    base = dataclasses.replace(Settings(), loop=dataclasses.replace(Settings().loop, updates=12))
    with compilations() as compiled:
        sweep(tmp_path, base, task=TASK, trials=6, members=2, prune="halving", prune_factor=3, seed=1)
    assert sum("iterate_members" in name for name in compiled) <= 1
    rows = read_results(tmp_path).rows
    pruned = [row for row in rows if row.state == "pruned"]
    assert len(rows) == 6 and pruned and {row.state for row in rows} == {"finished", "pruned"}
    for row in pruned:
        path = tmp_path / "trials" / row.names[0]
        last = records(path)[-1]["step"]
        assert row.updates == last < 12 and last % 2 == 0 and row.why.startswith(f"pruned after update {last}")
        assert store.latest_step(path / rundir.CHECKPOINTS) == last


def test_a_member_that_explodes_ends_alone_and_its_place_is_filled(tmp_path: Path) -> None:
    base = dataclasses.replace(Settings(), loop=dataclasses.replace(Settings().loop, max_kl=0.8))
    sweep(tmp_path, base, {"hyper.learning_rate": "1e-3 300"}, TASK, search="grid", members=2)
    calm, wild = sorted(read_results(tmp_path).rows, key=lambda row: row.values["hyper.learning_rate"])
    assert calm.state == "finished" and wild.state == "stopped" and "beyond --loop.max-kl 0.8" in wild.why
    assert [r["step"] for r in records(tmp_path / "trials" / calm.names[0])] == list(range(1, UPDATES + 1))


@pytest.mark.long  # the plan of groups: test_ranges; places that are filled by other runs: above
def test_static_fields_are_groups_that_run_one_after_another(tmp_path: Path) -> None:
    ranges = {"rank": "1 2", "hyper.learning_rate": "1e-3 1e-2"}
    sweep(tmp_path, ranges=ranges, task=TASK, search="grid", members=2)
    check_whole(tmp_path)
    found = {(row.values["rank"], row.values["hyper.learning_rate"]) for row in read_results(tmp_path).rows}
    assert found == {(rank, rate) for rank in (1, 2) for rate in (1e-3, 1e-2)}


def test_a_sweep_that_is_stopped_goes_on_with_the_same_call(tmp_path: Path) -> None:
    base = dataclasses.replace(Settings(), pause=0.05)

    def stop() -> None:
        while not list(tmp_path.glob("trials/*/metrics.jsonl")) or not any(
            len(records(p.parent)) > 2 for p in tmp_path.glob("trials/*/metrics.jsonl")
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM; 2 runs are saved"):
        sweep(tmp_path, base, task=TASK, trials=3, grace=600.0, heartbeat=0.5)
    thread.join()
    before = {p.parent.name: records(p.parent) for p in tmp_path.glob("trials/*/metrics.jsonl")}
    assert {row.state for row in read_results(tmp_path).rows} == {"waits"}
    sweep(tmp_path, base, task=TASK, trials=3, grace=600.0, heartbeat=0.5)
    check_whole(tmp_path)
    for name, kept in before.items():  # nothing of it was done again
        assert records(tmp_path / "trials" / name)[: len(kept)] == kept


@pytest.mark.long
def test_members_on_a_mesh_of_eight(tmp_path: Path) -> None:
    base = dataclasses.replace(Settings(), mesh=MeshConfig(data=4, fsdp=2))
    sweep(tmp_path, base, task=TASK, trials=5, members=4)
    check_whole(tmp_path)


def test_an_objective_that_is_not_logged_is_found_after_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metric is called 'rewards'; there are: .*reward"):
        sweep(tmp_path, task=TASK, objective=("rewards",))
    assert {row.state for row in read_results(tmp_path).rows} <= {"waits", "trains"}


def test_the_plan_is_shown_without_loading_anything(tmp_path: Path) -> None:
    task = make_task()._replace(setup=lambda settings: pytest.fail("a dry run loads nothing"))
    plan = plan_sweep(task, Settings(), RANGES | {"rank": "1 2 4"}, SweepConfig(trials=6, members=4))
    words = "\n".join(show_plan(task, Settings(), plan, tmp_path))
    assert "6 trials by tpe: 6 runs of 6 updates" in words and "3 programs to compile" in words
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"ranges: rank: 0 1: rank=0 must be at least 1|rank=0"):
        plan_sweep(task, Settings(), {"rank": "0 1"}, SweepConfig())


def test_runs_one_after_another(tmp_path: Path) -> None:
    """Of a command that makes one run at a time; one that had come to its end is not repeated."""
    made: list[Path] = []

    def run(settings: Settings) -> None:
        made.append(settings.run_dir)
        settings.run_dir.mkdir(parents=True)
        reward = settings.hyper.learning_rate
        with (settings.run_dir / rundir.METRICS).open("w") as file:
            file.write(f'{{"step": 1, "phase": "sft", "time": 0, "heldout_loss": {reward}}}\n')

    task = TASK._replace(setup=None, run=run)
    sweep(
        tmp_path, ranges={"hyper.learning_rate": "0.3 0.1 0.2"}, task=task, search="grid", objective=("-heldout_loss",)
    )
    assert [row.objectives[0] for row in read_results(tmp_path).rows] == [0.3, 0.1, 0.2] and len(made) == 3


def test_a_routine_takes_turns() -> None:
    log: list = []

    def work(park):
        log.append("a")
        log.append(park(1))
        try:
            park(2)
        except KeyError:
            log.append("told")
        return "end"

    routine = Routine(work, "test")
    routine.start()
    assert routine.request == 1 and log == ["a"]
    routine.resume("b")
    assert routine.request == 2 and log == ["a", "b"] and not routine.ended
    routine.resume(error=KeyError())
    assert routine.ended and routine.result == "end" and log[-1] == "told"
    broken = Routine(lambda park: 1 / 0, "test")
    broken.start()
    assert broken.ended and isinstance(broken.error, ZeroDivisionError)


def test_the_settings_of_a_trial_are_those_of_the_command_alone(tmp_path: Path) -> None:
    plan = plan_sweep(TASK, Settings(), RANGES | {"seed": "4 5"}, SweepConfig())
    job = Job(3, 1, 0, {"hyper.learning_rate": 0.5, "hyper.kl_coef": 0.2}, 5)
    made = job_settings(job, plan, Settings(), tmp_path)
    assert made.run_dir == tmp_path / "trials" / "0001-seed5" and made.seed == 5
    assert made.hyper == Settings().hyper._replace(learning_rate=0.5, kl_coef=0.2)
    assert jax.process_count() == 1
