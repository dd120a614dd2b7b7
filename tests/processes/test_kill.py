"""SIGKILL at random moments, again and again: the run that is left is the quiet one, bit for bit.

Four epochs of two minibatches, an adaptive KL coefficient, running moments of the scores, an average of the weights,
20 prompts in batches of 8 that are shuffled anew in every third batch.
"""

from pathlib import Path

import pytest

from experiments import soak_report
from ppo_jax.cli.main import PREEMPTED
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.processes import forks, kill_loop

FEW, MANY = 2, 20  # in a save and anywhere; enough for each place to be hit in several ways
PLACES = {"reward", "update", "save", "anywhere", "evaluation"}


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.long)])
def kills(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kills: int) -> Path:
    folder, others = tmp_path_factory.mktemp("kill"), ["quiet", "again"] if kills == MANY else ["quiet"]
    with forks.ending([forks.start(kill_loop.kill, str(folder), kills, others, folder=folder)]) as [process]:
        assert process.wait(75.0 * kills) == 0, process.text
    return folder


def test_it_was_killed_in_every_place_and_went_on_from_checkpoints(folder: Path, kills: int):
    lives = read_jsonl(folder / "lives.jsonl")
    killed = [life for life in lives if life["status"] == -9]
    assert len(killed) == kills
    assert {life["place"] for life in killed} <= PLACES
    if kills == MANY:
        assert {life["place"] for life in killed} >= PLACES
        assert any(life["unfinished"] for life in killed if life["place"] == "save"), "one left half a checkpoint"
        assert PREEMPTED in {life["status"] for life in lives}
    assert len({life["before"] for life in lives}) > kills / 3  # most lives saved something


def test_the_killed_run_is_the_quiet_one(folder: Path):
    compared = soak_report.compare(folder / "killed", folder / "quiet")
    updates = store.latest_step(folder / "killed" / rundir.CHECKPOINTS)
    assert compared[f"state at update {updates} (CRC-32 of every array)"]
    manifest = store.read_manifest(folder / "killed" / rundir.CHECKPOINTS)
    assert {"kl_coef", "moments.count", "ema.adapter.lora.q.a", "key", "best"} <= manifest.keys()
    assert all("crc32" in entry for entry in manifest.values())
    steps = [r["step"] for r in read_jsonl(folder / "killed" / rundir.METRICS) if r["phase"] == "ppo"]
    assert steps == list(range(1, updates + 1))


def test_the_same_seed_gives_the_same_run_twice(folder: Path, kills: int):
    if kills == MANY:
        soak_report.compare(folder / "again", folder / "quiet")
