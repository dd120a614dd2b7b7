"""`ppo-jax reward` on ratings and choices, `export-reward`, and what is refused before the run directory is touched."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers

from ppo_jax.cli import main as cli
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import hf
from ppo_jax.rewards.loading import load_scorer
from ppo_jax.runs.output import rundir
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

ANSWERS = ["good day", "bad day", "bad"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and files of every form; "good day" is preferred to the rest."""
    path = tmp_path_factory.mktemp("reward")
    hf.save(path / "model", SMALL, random_params(SMALL), make_tokenizer())
    rng = np.random.default_rng(0)
    records: dict[str, list[dict]] = {"choices": [], "ratings": [], "reference": [], "flat": []}
    words = ["".join(word) for length in (1, 2, 3) for word in itertools.product("abcd", repeat=length)]
    for prompt in rng.choice(words, 40, replace=False).tolist():  # all different, so that a fifth can be held out
        order = rng.permutation(3)
        best = int(np.argmin(order))
        records["choices"].append({"prompt": prompt, "responses": [ANSWERS[i] for i in order], "best": best})
        which = int(rng.integers(3))
        records["ratings"].append({"prompt": prompt, "response": ANSWERS[which], "rating": -which})
        records["flat"].append({"prompt": prompt, "response": ANSWERS[which], "rating": 3})
        records["reference"].append({"prompt": prompt, "response": ANSWERS[which]})
    for name, lines in records.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_choices_to_a_model_that_transformers_scores(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Trained, normalised on reference texts, reported, exported, and scored by somebody else."""
    monkeypatch.chdir(world)
    train = "reward --model model --choices choices.jsonl --reference reference.jsonl --run-dir rm"
    assert cli.main([*train.split(), "--reward.lora-layers", "0", "--reward.batch-size", "6"]) == 0
    said = capsys.readouterr().out
    for part in ("score gap", "accuracy", "calibration error", "held-out scores: mean", "16 held-out pairs"):
        assert part in said
    (values,) = [r for r in read_jsonl(world / "rm" / rundir.METRICS) if "heldout_accuracy" in r]
    assert values["heldout_accuracy"] == values["heldout_best_accuracy"] == 1

    scorer = load_scorer("rm")
    reference = [json.loads(line) for line in (world / "reference.jsonl").read_text().splitlines()]
    prompts, responses = ([line[side] for line in reference] for side in ("prompt", "response"))
    scores = scorer.score(prompts, responses)
    np.testing.assert_allclose([scores.mean(), scores.std(ddof=1)], [0, 1], atol=1e-4)

    assert cli.main(["export-reward", "--reward", "rm", "--output", "merged"]) == 0
    assert cli.main(["export-reward", "--reward", "rm", "--output", "merged"]) == cli.MISTAKE  # it is there
    model = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    batch = tokenizer([p + r for p, r in zip(prompts, responses, strict=True)], padding=True, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    np.testing.assert_allclose(logits.detach().numpy() + model.config.ppo_jax_bias, scores, atol=1e-5)


def test_ratings_train_a_full_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    options = "--reward.kind full --reward.batch-size 8 --reward.learning-rate 1e-3 --reward.epochs 2"
    assert cli.main(f"reward --model model --ratings ratings.jsonl --run-dir full {options}".split()) == 0
    measured = [r for r in read_jsonl(world / "full" / rundir.METRICS) if "heldout_accuracy" in r]
    assert measured[-1]["step"] > 0 and measured[-1]["heldout_accuracy"] > 0.9  # after the joint training
    scorer = load_scorer("full")
    for prompt in ("a", "cab", "bb"):  # the best has rating 0, the others -1 and -2
        scores = scorer.score([prompt] * 3, ANSWERS)
        assert scores[0] > max(scores[1:]) + 0.5, (prompt, scores)


@pytest.fixture
def mistake(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    monkeypatch.chdir(world)

    def fail(args: str) -> str:
        assert cli.main(args.split()) == cli.MISTAKE
        assert not (world / "x").exists()
        return " ".join(capsys.readouterr().err.split())

    return fail


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "give exactly one of --pairs, --ratings and --choices"),
        ("--choices choices.jsonl --ratings ratings.jsonl", "give exactly one of"),
        ("--choices ratings.jsonl", 'unknown field "response"'),
        ("--ratings flat.jsonl", "all 32 training texts of flat.jsonl have the same rating"),
        ("--ratings ratings.jsonl --held-out 1", "all 1 held-out texts of ratings.jsonl have the same rating"),
        ("--choices choices.jsonl --reward.batch-size 8", "--reward.batch_size=8 texts are no whole number of choices"),
        ("--ratings ratings.jsonl --reward.batch-size 99", "--reward.batch_size=99 texts, but there are 32"),
        ("--choices choices.jsonl --reference reference.jsonl --reward.no-normalise", "--reference is only read to"),
    ],
)
def test_mistakes_leave_nothing_behind(args: str, message: str, mistake: Callable[[str], str]) -> None:
    assert message in mistake(f"reward --model model --run-dir x --reward.lora-layers 1 {args}")
