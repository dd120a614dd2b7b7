"""The sentiment experiment with another reward than the one that it trains."""

import json
import sys
from pathlib import Path

import pytest

from experiments import sentiment, smoke
from ppo_jax.data.jsonl import read_jsonl


def test_any_reward_can_be_put_in_place_of_the_trained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Good words less bad ones, in a file; no reward model is trained but the judge."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "words.py").write_text(
        f"GOOD, BAD = {smoke.GOOD!r}, {smoke.BAD!r}\n"
        "def positive(prompt, response, metadata):\n"
        "    return sum((w in GOOD) - (w in BAD) for w in response.split()) / 4\n"
    )
    run = tmp_path / "run"
    args = f"--preset smoke --run-dir {run} --loop.updates 1 --loop.warmup 0 --scoring.function.per-sample"
    sentiment.main([*args.split(), "--scorer", str(tmp_path / "words.py:positive")])
    exported = {path.name for path in (run / "export").iterdir()}
    assert "judge" in exported and "reward" not in exported
    for sample in read_jsonl(run / "samples.jsonl"):
        words = sample["response"].split()
        assert sample["scores"]["reward"] == sum((w in smoke.GOOD) - (w in smoke.BAD) for w in words) / 4
    summary = json.loads((run / "summary.json").read_text())
    assert "words.py:positive" in summary["task"] and summary["reward_accuracy"] is None


def test_a_mistake_in_the_reward_begins_no_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nix.py is not a file"):
        sentiment.main(["--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--scorer", "nix.py:f"])
    assert not (tmp_path / "run").exists()
