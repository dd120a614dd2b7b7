"""facts: who started a run and when; what the report is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from ppo_jax.rewards.base import Reward
from ppo_jax.runs.facts import command_line, commit_of_code, record_start, reported_facts
from ppo_jax.runs.output import rundir
from tests.runs.test_ppo import SETUP

CONSOLE, OPTIONS = "/v/bin/ppo-jax", ["ppo", "--x", "a b"]


@pytest.mark.parametrize(
    ("original", "argv", "said"),
    [
        (["/v/bin/python", CONSOLE, *OPTIONS], [CONSOLE, *OPTIONS], "ppo-jax ppo --x 'a b'"),
        (["/v/python3", "-m", "experiments.sentiment"], ["/r/sentiment.py"], "python3 -m experiments.sentiment"),
        (["", "x"], [""], "'' x"),
        ([], [""], ""),
    ],
)
def test_the_command_is_what_a_shell_takes(
    monkeypatch: pytest.MonkeyPatch, original: list[str], argv: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == said


def test_the_commit_is_that_of_the_clone() -> None:
    here = Path(__file__).parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert commit_of_code() is None  # an archive, or no git
    else:
        assert (commit_of_code() or "").removesuffix(" + changes") == head.stdout.strip()


def test_every_start_is_kept_and_nothing_else_is_lost(tmp_path: Path) -> None:
    record_start(tmp_path)
    rundir.add_facts(tmp_path, held_out=4)
    record_start(tmp_path)
    found = rundir.read_facts(tmp_path)
    assert len(found["sessions"]) == 2 and found["held_out"] == 4
    assert found["sessions"][0].keys() == {"command", "started", "commit", "versions", "machine"}
    assert (tmp_path / rundir.README).exists()


def test_a_directory_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record_start(tmp_path / "file" / "run")


def test_what_a_reward_model_knows_is_told_to_the_report() -> None:
    host = SETUP.reward.host
    told = reported_facts(SETUP)
    assert (told["base"], told["prompts"], told["held_out"]) == (SETUP.model.name, len(SETUP.prompts.rows), 6)
    assert told["judges"] == {"words": "words"} and {told[f"reward_{n}"] for n in ("accuracy", "mean", "std")} == {None}
    trained = {"accuracy": 0.8, "heldout": {"score_mean": 0.1, "score_std": 2.0}, "reward": {"normalise": True}}
    told = reported_facts(SETUP._replace(reward=Reward(host=host, metadata=trained)))
    assert [told[f"reward_{name}"] for name in ("accuracy", "mean", "std")] == [0.8, 0.1, 2.0]
    only = Reward(host=host, metadata={"reward": {"normalise": True}})
    told = reported_facts(SETUP._replace(reward=only, judges={"j": host}, labels={"j": "The judge"}))
    assert (told["reward_mean"], told["reward_std"], told["judges"]) == (0.0, 1.0, {"j": "The judge"})
