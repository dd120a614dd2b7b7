"""Two real processes: a checkpoint that one cannot read or save is none for both, and neither waits for ever."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_jax.runs.checkpoints import resuming, store
from ppo_jax.runs.output import rundir
from tests.processes import checkpoints, forks, world
from tests.processes.world import Check, World
from tests.runs.checkpoints.test_resuming import files_of


@pytest.fixture
def damages(two: World) -> tuple[Path, list[dict[str, Any]]]:
    return two.folder / "damages", two.found("damages")


@pytest.mark.parametrize("name", checkpoints.DAMAGE)
def test_both_go_on_from_the_newest_that_is_whole_as_one_alone_would(damages: Any, name: str) -> None:
    folder, found = damages
    said: list[str] = []
    alone = resuming.restore(folder / f"{name} alone", checkpoints.values(0), checkpoints.FACTS, said.append)
    assert alone is not None and alone.step == (6 if name == "nothing" else 4)
    for kind, expected in checkpoints.values(alone.step).items():
        np.testing.assert_array_equal(alone.state[kind], expected)
    for record in found:
        assert (record[name]["step"], record[name]["whole"], record[name]["meta"]) == (alone.step, True, alone.meta)
    if name == "nothing":
        assert found[0][name]["said"] == said == []
        return
    place, first = folder / name, found[0][name]["said"]
    assert first[0].startswith(f"damaged checkpoint: {place / rundir.CHECKPOINTS / '6'}: ")
    assert first[1:] == [
        f"the damaged checkpoint of update 6 was moved to {place / rundir.DAMAGED / '6'}; going on from update 4"
    ]
    assert files_of(place / rundir.DAMAGED / "6") == files_of(folder / f"{name} alone" / rundir.DAMAGED / "6")
    assert not (folder / f"{name}-private" / rundir.DAMAGED).exists()


def test_a_sum_that_one_process_has_to_compare_counts_for_both(damages: Any) -> None:
    _, found = damages
    for record in found:
        assert "not the bytes that were saved: w (process 1)" in record["another value"]["said"][0]


def test_split_otherwise_than_it_was_saved_it_is_compared_all_the_same(damages: Any) -> None:
    folder, found = damages
    for record in found:
        assert record["split otherwise"]["step"] == 4 and record["split otherwise"]["whole"]
        later = record["split otherwise, damaged"]
        assert (later["step"], later["whole"]) == (2, True)
        assert "4: not the bytes that were saved: w (process" in later["said"][0]
    assert store.all_steps(folder / "another value" / rundir.CHECKPOINTS) == [2]


def test_what_one_process_cannot_read_now_is_not_taken_for_damaged(damages: Any) -> None:
    folder, found = damages
    for record in found:
        text = record["unreadable for one"]["error"]
        assert record["unreadable for one"]["kind"] == "CheckpointError"
        assert "6: cannot be read now: [Errno 5] Input/output error (process 1)" in text
    assert store.all_steps(folder / "saved" / rundir.CHECKPOINTS) == [2, 4, 6]
    assert not (folder / "saved" / rundir.DAMAGED).exists()


def test_a_save_that_fails_in_one_fails_in_both_and_training_goes_on(two: World) -> None:
    found = two.found("failures")
    for failing in (0, 1):
        for limit in (100, 20_000):
            for record in found:
                run = record[f"{failing}-{limit}"]
                context = json.dumps(run, indent=1)
                assert f"process {failing}" in run["said"][0] and "File too large" in run["said"][0], context
                assert "the last good one is of update 1. Training goes on" in run["said"][0], context
                assert "tried again at update 3" in run["said"][0] and "tried again at update 5" in run["said"][1]
                assert run["good"][:5] == [1] * 5 and run["good"][5:] == [6, 20], context
                assert run["left"].startswith("Stopped: stopped; its state is not saved: "), context
                assert "--resume goes on from update 1" in run["left"], context
                assert run["steps"] == [1, 6, 20] and run["whole"], context
            assert found[0][f"{failing}-{limit}"]["said"] == found[1][f"{failing}-{limit}"]["said"]


def test_one_that_fails_where_the_other_waits_for_it_ends_both(tmp_path: Path) -> None:
    check = Check("broken", checkpoints.broken, [str(tmp_path)])
    with forks.ending(world.start(tmp_path, [check], heartbeat=10)) as started:
        first, second = (process.wait() for process in started)
        assert first == 1 and second != 0, forks.logs(started)
        assert "a checkpoint could not be saved: [Errno 28] No space left" in started[0].text
    assert store.all_steps(tmp_path / "broken") == [1]
    state, _ = store.restore(tmp_path / "broken", checkpoints.values(0))
    np.testing.assert_array_equal(state["w"], checkpoints.values(1)["w"])
