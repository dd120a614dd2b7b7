"""SIGKILL at every place of every stage: what is left in the end is what a run leaves that nobody disturbed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import kills

SHORT = {"sft": ["save", "files", "export"]}  # what the other tests of resuming do not do


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with kills.world() as folder:
        yield folder


@pytest.mark.parametrize("stage", [*SHORT, *(pytest.param(stage, marks=pytest.mark.long) for stage in kills.STAGES)])
def test_a_stage_that_is_killed_goes_on_to_the_same_end(
    folder: Path, stage: str, request: pytest.FixtureRequest
) -> None:
    long = request.node.get_closest_marker("long") is not None
    places = kills.choose_places([], stage, random.Random(0)) if long else SHORT[stage]
    done = kills.run_round(folder, stage, places, kills.run_quiet(folder, stage), random.Random(1))
    assert done["differs"] is None
    assert sum(done["killed"].values()) >= (len(places) + 1) // 2


def test_a_place_is_told_by_what_is_being_run() -> None:
    import sys

    from ppo_jax.data import disk

    seen = []

    class Looking:
        def __fspath__(self) -> str:
            seen.append(kills.find_place(sys._getframe()))
            return "/"

    disk.strict(Looking())
    assert seen == ["files"] and kills.find_place(sys._getframe()) is None
