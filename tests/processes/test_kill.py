"""SIGKILL at random moments, twenty times and more: the run that is left is the quiet one, bit for bit.

Four epochs of two minibatches, an adaptive KL coefficient, running moments of the scores, an average of the weights,
20 prompts in batches of 8 that are shuffled anew in every third batch.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from experiments import soak
from ppo_jax.cli.main import PREEMPTED
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir

KILLS = 20
LIMIT = 1500.0  # seconds after which the lives count as hanging


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "tests.kill_loop", str(folder), str(KILLS)]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "lives.jsonl").write_text(done.stdout)
    return folder


def test_it_was_killed_in_every_place_and_went_on_from_checkpoints(folder: Path):
    lives = [json.loads(line) for line in (folder / "lives.jsonl").read_text().splitlines()]
    killed = [life for life in lives if life["status"] == -9]
    assert len(killed) == KILLS
    assert Counter(life["place"] for life in killed).keys() >= {"reward", "update", "save", "anywhere", "evaluation"}
    assert any(life["unfinished"] for life in killed if life["place"] == "save"), "one left half a checkpoint"
    assert PREEMPTED in {life["status"] for life in lives}
    assert len({life["before"] for life in lives}) > KILLS / 3  # most lives saved something


def test_the_killed_run_is_the_quiet_one(folder: Path):
    compared = soak.compare(folder / "killed", folder / "quiet")
    updates = store.latest_step(folder / "killed" / rundir.CHECKPOINTS)
    assert compared[f"state at update {updates} (CRC-32 of every array)"]
    manifest = store.read_manifest(folder / "killed" / rundir.CHECKPOINTS)
    assert {"kl_coef", "moments.count", "ema.adapter.lora.q.a", "key", "best"} <= manifest.keys()
    assert all("crc32" in entry for entry in manifest.values())
    steps = [r["step"] for r in read_jsonl(folder / "killed" / rundir.METRICS) if r["phase"] == "ppo"]
    assert steps == list(range(1, updates + 1))


def test_the_same_seed_gives_the_same_run_twice(folder: Path):
    soak.compare(folder / "again", folder / "quiet")
