"""The reward stage: batches of pairs, ratings and choices by hand, LoRA and full models trained and loaded."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.data import EncodedPairs, PairBatch
from ppo_jax.data.encode import EncodedChoices, EncodedRatings
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.rewards.loading import load_reward, load_scorer
from ppo_jax.rewards.model import FullReward
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.reward import (
    check_batch,
    collect_comparisons,
    compare_choices,
    compare_pairs,
    run_reward,
    training_batches,
)
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.train.reward import RewardConfig
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

HEAD_ONLY = RewardConfig(lora_layers=0, batch_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("base") / "model"
    hf.save(path, SMALL, random_params(SMALL), make_tokenizer())
    return load_model(path)


def pairs(count: int, seed: int = 0) -> EncodedPairs:
    """Random texts; the chosen one ends in token 7, the rejected one in 8."""
    rng = np.random.default_rng(seed)
    text = lambda last: [*rng.integers(2, 40, rng.integers(1, 6)).tolist(), last]
    chosen, rejected = ([text(last) for _ in range(count)] for last in (7, 8))
    return EncodedPairs(chosen, rejected, [0.0] * count, list(range(count)), 0)


def test_comparisons_by_hand() -> None:
    """Two pairs: rows 0, 1 are chosen, rows 2, 3 rejected; only (0, 2) and (1, 3) are compared."""
    chosen, rejected = np.array([[4, 5, 6], [7, 0, 0]], np.int32), np.array([[4, 0, 0], [8, 9, 0]], np.int32)
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool), np.array([[1, 0, 0], [1, 1, 0]], bool)
    batch = PairBatch(chosen, mask[0], rejected, mask[1], np.array([0.5, 2.0], np.float32), np.arange(2))
    found = compare_pairs(batch)
    np.testing.assert_array_equal(found.tokens, [[4, 5, 6], [7, 0, 0], [4, 0, 0], [8, 9, 0]])
    np.testing.assert_array_equal(found.mask, np.concatenate(mask))
    np.testing.assert_array_equal(np.argwhere(found.better), [[0, 2], [1, 3]])
    assert found.margin[0, 2] == 0.5 and found.margin[1, 3] == 2.0 and np.count_nonzero(found.margin) == 2
    assert found.prefix is None


@pytest.mark.parametrize("depth", [0, 1])
def test_the_head_alone_orders_what_it_can_read(depth: int, model: Model, screen: Screen, tmp_path: Path) -> None:
    """The last token decides, and its residual stream says which it is; also on a trunk of one layer."""
    reward = RewardConfig(depth=depth, lora_layers=0, batch_size=8)
    result = run_reward(tmp_path, OfflineSetup(model, pairs(150), pairs(30, seed=1), reward, 0), screen)
    assert result.accuracy > 0.85 and result.trunk.num_layers == (depth or 2)
    assert result.role.adapter == {}
    found = artifacts.load(tmp_path / "export" / "reward", "reward")
    artifacts.check_base(found, model.fingerprint, model.config)
    assert found.meta["accuracy"] == result.accuracy and found.trunk(model.config) == result.trunk

    # the saved role scores the training texts with mean 0 and std 1
    rows = [*pairs(150).chosen, *pairs(150).rejected]
    mask = np.arange(6) < np.array([len(row) for row in rows])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    role = RewardRole(found.adapter, found.head)
    scores = np.asarray(jax.jit(lambda t, m: score_tokens(model.params, role, result.trunk, t, m))(tokens, mask))
    np.testing.assert_allclose([scores.mean(), scores.std(ddof=1)], [0, 1], atol=1e-3)


def test_margins_reach_the_fit(model: Model, screen: Screen, tmp_path: Path) -> None:
    """Before normalisation a demanded lead makes the head larger; so kernel * gain stays, and 1 / gain grows."""
    reward = RewardConfig(lora_layers=0, batch_size=8)
    gains = []
    for name, margin in (("a", 0.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        given = pairs(150)._replace(margins=[margin] * 150)
        role = run_reward(tmp_path / name, OfflineSetup(model, given, pairs(8, 1), reward, 0), screen).role
        gains.append(float(role.head["gain"]))
    assert gains[1] < 0.8 * gains[0]


def group(rng: np.random.Generator, n: int) -> tuple[list[list[int]], int]:
    """n texts; the best one ends in token 7, the others in 8."""
    best = int(rng.integers(n))
    rows = [[*rng.integers(2, 40, rng.integers(1, 6)).tolist(), 7 if i == best else 8] for i in range(n)]
    return rows, best


def some_choices(count: int, seed: int = 0) -> EncodedChoices:
    rng = np.random.default_rng(seed)
    groups, best = zip(*(group(rng, int(rng.integers(2, 5))) for _ in range(count)), strict=True)
    return EncodedChoices(list(groups), list(best), 0)


def some_ratings(count: int, seed: int = 0) -> EncodedRatings:
    given = pairs(count // 2, seed)
    rows = [row for both in zip(given.chosen, given.rejected, strict=True) for row in both]
    return EncodedRatings(rows, [2.5, -1.0] * (count // 2), 0)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_choices_by_hand() -> None:
    """Groups of 2 and 3 responses in 3 rows each; the missing row is a filler that nothing is compared with."""
    data = EncodedChoices([[[4, 5], [6]], [[7], [8, 9, 10], [11]]], [1, 0], 0)
    batch = compare_choices(data, np.array([1, 0]), 0)
    np.testing.assert_array_equal(batch.tokens[:5], [[7, 0, 0], [8, 9, 10], [11, 0, 0], [4, 5, 0], [6, 0, 0]])
    np.testing.assert_array_equal(batch.mask.sum(1), [1, 3, 1, 2, 1, 1])
    np.testing.assert_array_equal(np.argwhere(batch.better), [[0, 1], [0, 2], [4, 3]])
    assert not np.any(batch.margin)


def test_comparisons_of_ratings_and_choices() -> None:
    rated = collect_comparisons(EncodedRatings([[1], [2], [3]], [0.5, 2.0, 0.5], 0), 0)
    assert (rated.better.tolist(), rated.worse.tolist(), rated.loss) == ([1, 1], [0, 2], "pairwise")
    chosen = collect_comparisons(EncodedChoices([[[4, 5], [6]], [[7], [8, 9], [9]]], [1, 0], 0), 0)
    assert (chosen.better.tolist(), chosen.worse.tolist(), chosen.loss) == ([1, 2, 2], [0, 3, 4], "best")
    assert chosen.rows == [[4, 5], [6], [7], [8, 9], [9]]
    many = collect_comparisons(
        EncodedRatings([[1]] * 400, [float(i % 7) for i in range(400)], 0), 0
    )  # 160,000 ordered pairs
    better, worse = (np.array([i % 7 for i in side]) for side in (many.better, many.worse))
    assert 30_000 < len(better) <= 50_000 and np.all(better > worse)
    with pytest.raises(ValueError, match="all 3 texts have the same rating.*give texts with different ratings"):
        collect_comparisons(EncodedRatings([[1]] * 3, [1.0] * 3, 0), 0)


def test_every_choice_is_seen_once_an_epoch() -> None:
    data = EncodedChoices([[[i + 2], [i + 3]] for i in range(6)], [0] * 6, 0)
    reward = RewardConfig(lora_layers=1, batch_size=4, epochs=2)
    batch, steps = training_batches(data, reward, 0, 0)
    assert steps == 6
    firsts = np.array([np.asarray(batch(step).tokens)[::2, 0] for step in range(6)]) - 2
    for epoch in (firsts[:3], firsts[3:]):
        assert sorted(epoch.ravel().tolist()) == list(range(6))
    assert firsts[:3].tolist() != firsts[3:].tolist()
    assert training_batches(data, HEAD_ONLY, 0, 0)[1] == 0


@pytest.mark.parametrize(
    ("size", "data", "message"),
    [
        (9, pairs(10), "batch_size=9 texts are no whole number of pairs; give a multiple of 2"),
        (50, pairs(10), "batch_size=50 texts are 25 pairs, but there are 10"),
        (10, some_choices(9), "batch_size=10 texts are no whole number of choices of 4; give a multiple of 4"),
        (40, some_choices(9), "batch_size=40 texts are 10 choices of 4, but there are 9"),
        (11, some_ratings(10), "batch_size=11 texts, but there are 10"),
    ],
)
def test_batches_that_cannot_be_filled_name_the_field(size: int, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(RewardConfig(batch_size=size), data)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "ratings", "choices"])
def test_every_kind_of_preference_trains_a_lora_model(kind: str, model: Model, screen: Screen, tmp_path: Path) -> None:
    """From a random head, so that what is learnt is learnt by the joint training."""
    make = {"pairs": pairs, "ratings": some_ratings, "choices": some_choices}[kind]
    reward = RewardConfig(lora_layers=1, batch_size=8, epochs=6, learning_rate=1e-2, head_steps=0, centring=0.01)
    result = run_reward(tmp_path, OfflineSetup(model, make(120), make(40, 1), reward, 0), screen)
    records = read_jsonl(tmp_path / rundir.METRICS)
    # A batch of equal ratings has no loss.
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4]) and all("centre" in r for r in records if "grad_norm" in r)
    assert result.accuracy > 0.75
    heldout = [r for r in records if "heldout_accuracy" in r]
    assert len(heldout) == 1 and heldout[0]["step"] == sum("grad_norm" in r for r in records)
    assert "heldout_calibration_error" in heldout[0]
    assert ("heldout_best_accuracy" in heldout[0]) == (kind == "choices")


def test_a_full_model_is_a_directory_of_its_own(model: Model, screen: Screen, tmp_path: Path) -> None:
    """It needs no base, all of its arrays were trained, and its scores are normalised on the reference texts."""
    reward = RewardConfig(kind="full", depth=1, batch_size=8, epochs=2, learning_rate=1e-3)
    reference = some_ratings(30, seed=5).rows
    before = jax.tree.map(np.asarray, model.params)
    result = run_reward(tmp_path, OfflineSetup(model, pairs(60), pairs(30, 1), reward, 0, reference=reference), screen)
    assert result.accuracy > 0.85 and result.path == tmp_path / "export" / "reward"
    scorer = load_scorer(tmp_path)
    scores = scorer.score_rows(reference)
    np.testing.assert_allclose([scores.mean(), scores.std(ddof=1)], [0, 1], atol=1e-4)
    found = load_reward(tmp_path, model)
    assert isinstance(found.params, FullReward) and found.metadata["accuracy"] == result.accuracy
    assert found.metadata["normalised_on"] == "reference texts" and found.metadata["reward"]["kind"] == "full"
    trained = found.params.params
    assert trained["layers"]["q"].shape[0] == 1
    for name in ("q", "down", "mlp_norm"):
        assert np.abs(trained["layers"][name] - before["layers"][name][:1]).max() > 1e-4
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_without_normalisation_the_gain_stays_1(model: Model, screen: Screen, tmp_path: Path) -> None:
    reward = RewardConfig(lora_layers=0, batch_size=8, normalise=False)
    result = run_reward(tmp_path, OfflineSetup(model, pairs(60), pairs(30, 1), reward, 0), screen)
    assert result.role.head["gain"] == 1
    assert artifacts.load(result.path, "reward").meta["normalised_on"] is None


def test_the_report_is_that_of_the_saved_model(model: Model, screen: Screen, tmp_path: Path) -> None:
    unseen = pairs(37, 1)
    result = run_reward(tmp_path, OfflineSetup(model, pairs(60), unseen, HEAD_ONLY, 0), screen)
    scorer = load_scorer(tmp_path)
    chosen, rejected = scorer.score_rows(unseen.chosen), scorer.score_rows(unseen.rejected)
    scores = np.concatenate([chosen, rejected])
    assert result.heldout["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    (logged,) = [r for r in read_jsonl(tmp_path / rundir.METRICS) if "heldout_score_mean" in r]
    for name in ("mean", "std", "min", "max"):  # after normalising, in metrics.jsonl too
        assert result.heldout[f"score_{name}"] == pytest.approx(getattr(np, name)(scores), abs=1e-4)
        assert logged[f"heldout_score_{name}"] == result.heldout[f"score_{name}"]
    assert sum(bucket.pairs for bucket in result.calibration) == 37
    gaps = np.sort(np.abs(chosen - rejected)) / float(result.role.head["gain"])
    assert result.calibration[-1].high == pytest.approx(gaps[-1], rel=1e-3)
    assert scorer.meta["calibration"] == [bucket._asdict() for bucket in result.calibration]
