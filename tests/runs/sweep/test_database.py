"""A study in a real PostgreSQL: slices at the same time, and a server that is killed while a sweep runs."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_jax.runs.sweep.command import delete_sweep
from ppo_jax.runs.sweep.results import forget_study, read_results
from tests.postgres import Server, needs_postgres, postgres
from tests.runs.sweep.test_slice import check_whole, records
from tests.runs.sweep.test_study import GAMMA, RANK, Range, World, plan_of
from tests.sweep_task import Settings, make_task, sweep

pytestmark = needs_postgres


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres() as found:
        yield found


def test_slices_ask_at_the_same_time(server: Server, tmp_path: Path) -> None:
    points = Range("hyper.gamma", "", (0.5, 0.6, 0.7, 0.8)), RANK
    plan = plan_of(*points, search="grid", storage=server.url, heartbeat=0.5, grace=20.0)
    world, found, studies = World(tmp_path), [], []

    def work() -> None:  # they make the tables, and the study, at the same moment
        study = world.slice(plan)
        studies.append(study)
        while (claim := study.next()) is not None:
            found.append((claim.values["policy.rank"], claim.values["hyper.gamma"]))
            study.finish(claim.trial, [1.0], {})

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for study in studies:
        study.close()
    assert len(studies) == 3 and sorted(found) == [(r, g) for r in (4, 8) for g in (0.5, 0.6, 0.7, 0.8)]


@pytest.mark.long
def test_a_server_that_is_killed_and_comes_back(server: Server, tmp_path: Path, capsys) -> None:
    """Training goes on meanwhile, nobody is taken for dead, and every result is told once it is back."""
    base = dataclasses.replace(Settings(), pause=0.1, loop=dataclasses.replace(Settings().loop, updates=12))
    during: list[int] = []

    def done() -> int:
        return sum(len(records(path.parent)) for path in tmp_path.glob("trials/*/metrics.jsonl"))

    def outage() -> None:
        while done() < 4:
            time.sleep(0.05)
        server.kill()
        first = done()
        time.sleep(2.0)
        during.append(done() - first)
        server.start()

    thread = threading.Thread(target=outage)
    thread.start()
    sweep(tmp_path, base, task=make_task(), trials=3, storage=server.url, study="outage", grace=30.0, heartbeat=0.3)
    thread.join()
    said = capsys.readouterr().out
    assert during[0] > 4, "training waited for the database"
    assert "cannot be reached" in said and "reached again" in said
    results = read_results(tmp_path)
    assert [(row.state, row.attempts) for row in results.rows] == [("finished", 1)] * 3
    check_whole(tmp_path, 12)

    delete_sweep(tmp_path, lambda: forget_study(tmp_path))  # `--overwrite`: the study in the database goes too
    assert not list(tmp_path.iterdir())
    again = World(tmp_path).slice(plan_of(GAMMA, trials=1, storage=server.url, study="outage"))
    assert not again.study.get_trials()
    again.close()


def test_a_database_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        ConnectionError, match=r"sweep\.storage=postgresql\+psycopg://someone:\*\*\*@127\.0\.0\.1:1/x cannot"
    ):
        sweep(tmp_path, storage="postgresql+psycopg://someone:secret@127.0.0.1:1/x", task=make_task())
