"""SFT, reward model and PPO as one pipeline: each stage does its work, and leaves what the next one and others load."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import pipeline
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts
from ppo_jax.models.pretrained import load_model
from ppo_jax.runs.output import rundir

SHORTER = ["--reward.epochs", "6", "--loop.updates", "12", "--loop.eval-every", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "pipeline"
    assert pipeline.main(["--run-dir", str(path), *SHORTER]) == path / "ppo" / rundir.REPORT
    return path


def phase(directory: Path, name: str) -> list[dict]:
    return [record for record in read_jsonl(directory / rundir.METRICS) if record["phase"] == name]


def test_sft_learns_the_language(run: Path) -> None:
    """Chance is 25 words. The best possible is the language's own entropy: log 3 + 2 log 12 over 5 tokens."""
    losses = [r["heldout_loss"] for r in phase(run / "sft", "sft") if "heldout_loss" in r]
    best = (np.log(3) + 2 * np.log(12)) / 5
    assert losses[0] > np.log(25) and best - 0.1 < losses[1] < best + 0.15


def test_the_reward_model_learns_the_preference(run: Path) -> None:
    found = artifacts.load(run / "reward" / "export" / "reward", "reward")
    assert found.meta["accuracy"] > 0.85
    model = load_model(run / "sft" / "export" / "model")
    artifacts.check_base(found, model.fingerprint, model.config)


def test_ppo_makes_sentences_better_and_keeps_them_sentences(run: Path) -> None:
    """A policy that only drops the bad words has two good ones of two, at a KL of log 4 = 1.39 nats."""
    first, *_, last = phase(run / "ppo", "eval")
    assert abs(first["judge"]) < 0.5 and abs(first["kl"]) < 1e-3
    assert last["judge"] > 1.2 and last["kl"] < 4
    assert last["reward"] > first["reward"] + 0.5
    samples = [json.loads(line) for line in (run / "ppo" / rundir.SAMPLES).read_text().splitlines()]
    finals = [s["response"] for s in samples if s["step"] == last["step"]]
    assert np.mean([len(text.split()) == 4 and text.split()[2] == "and" for text in finals]) > 0.8


def test_the_fine_tuned_model_is_one_for_transformers(run: Path) -> None:
    path = run / "sft" / "export" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        ids = torch.tensor([tokenizer("the film is", add_special_tokens=False)["input_ids"]])
        logits = theirs(ids).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) in ("very", "really", "quite")


def test_a_second_run_must_be_asked_to_overwrite(run: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        pipeline.main(["--run-dir", str(run)])


def test_the_policy_is_kept(run: Path) -> None:
    found = artifacts.load(run / "ppo" / "export" / "policy", "policy")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.adapter, found.head)))
    assert float(abs(found.head["value"]["kernel"]).max()) > 0  # it started at zero
