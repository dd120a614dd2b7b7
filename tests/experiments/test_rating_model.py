"""Reward models from ratings: trained once, normalised, found again by what describes them."""

import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from experiments import rating_model, smoke
from experiments.movie_reviews import all_pairs_accuracy
from experiments.rating_model import RatingModel, Wanted, obtain
from ppo_jax.data.locks import hold_target
from ppo_jax.rewards.adapter import score_tokens
from ppo_jax.runs.output.screen import progress
from ppo_jax.train.comparisons import rated_pairs
from ppo_jax.train.reward import RewardConfig

MODEL = smoke.model(0)
REVIEWS = smoke.reviews(260)
TRAIN, OTHERS, TEST = REVIEWS[:160], REVIEWS[160:220], REVIEWS[220:]
LORA = RewardConfig(depth=3, lora_layers=2, batch_size=20, epochs=6, learning_rate=3e-3)
PROBE = RewardConfig(depth=2, lora_layers=0, batch_size=30)
WANTED = (Wanted("reward", TRAIN, LORA), Wanted("judge", OTHERS, PROBE))


class Found(NamedTuple):
    models: list[RatingModel]
    written: list[tuple[int, str, dict]]
    cache: Path


def run(cache: Path, wanted=WANTED, test=TEST, seed: int = 0, model=MODEL) -> Found:
    written: list[tuple[int, str, dict]] = []
    with progress("test", main_process=False) as screen:
        models = obtain(wanted, model, test, seed, cache, screen, lambda *record: written.append(record))
    return Found(models, written, cache)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("cache"))


def scores(found: RatingModel, reviews) -> np.ndarray:
    """Of unbucketed texts, all padded to one length."""
    rows = MODEL.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    tokens, mask = np.zeros((len(rows), 16), np.int32), np.zeros((len(rows), 16), bool)
    for i, row in enumerate(rows):
        tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
    return np.asarray(jax.jit(score_tokens, static_argnums=2)(MODEL.params, found.role, found.trunk, tokens, mask))


def test_accuracy_is_over_all_held_out_pairs(first: Found):
    for found in first.models:
        expected = all_pairs_accuracy(scores(found, TEST), [review.rating for review in TEST])
        assert found.accuracy == pytest.approx(expected, abs=0.003)  # rounding may flip a close pair


def test_it_learns_what_it_was_trained_on(first: Found):
    accuracy = all_pairs_accuracy(scores(first.models[0], TRAIN), [review.rating for review in TRAIN])
    assert accuracy > 0.75
    losses = [values["loss"] for _, phase, values in first.written if phase == "reward"]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_scores_have_mean_0_and_std_1_on_the_training_texts(first: Found):
    for found, reviews in zip(first.models, (TRAIN, OTHERS), strict=True):
        values = scores(found, reviews)
        assert abs(values.mean()) < 1e-3
        assert values.std(ddof=1) == pytest.approx(1, rel=1e-3)


def test_roles_read_as_many_layers_as_configured(first: Found):
    reward, judge = first.models
    assert reward.trunk.num_layers == 3 and judge.trunk.num_layers == 2
    assert judge.role.adapter == {}


def test_records_name_the_model_and_count_its_steps(first: Found):
    phases = [phase for _, phase, _ in first.written]
    steps = [step for step, phase, _ in first.written if phase == "reward"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 6 * 160 / 20
    assert "judge" not in phases  # a head alone has no steps
    assert [(step, phase) for step, phase, _ in first.written if phase.endswith("test")] == [
        (0, "reward test"),
        (0, "judge test"),
    ]


def test_the_same_settings_find_the_same_models_without_training(first: Found):
    again = run(first.cache)
    assert again.written == []
    for left, right in zip(first.models, again.models, strict=True):
        assert left.accuracy == right.accuracy and left.trunk == right.trunk
        for a, b in zip(jax.tree.leaves(left.role), jax.tree.leaves(right.role), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_another_run_is_training_is_waited_for(first: Found, tmp_path: Path):
    """As two runs that begin together with nothing in the cache: the slower one finds what the other has left."""
    probe = first.models[1].path
    said: list[str] = []
    with progress("test", main_process=False) as screen, hold_target(tmp_path / probe.name) as _:
        screen.message = said.append  # type: ignore[method-assign, assignment]
        waiting = threading.Thread(
            target=lambda: found.extend(obtain(WANTED[1:], MODEL, TEST, 0, tmp_path, screen, written.append)),  # type: ignore[arg-type]
        )
        found: list[RatingModel] = []
        written: list[object] = []
        waiting.start()
        while not said:
            time.sleep(0.01)
        shutil.copytree(probe, tmp_path / probe.name)
    waiting.join(60)
    assert "waiting for it" in said[0] and "reused from" in said[-1] and not written
    assert [model.accuracy for model in found] == [first.models[1].accuracy]
    assert [path.name for path in tmp_path.iterdir()] == [probe.name]


def test_each_thing_that_decides_the_result_decides_the_place(first: Found, monkeypatch):
    """Only what would be trained is asked for, so nothing is."""
    probe = Wanted("judge", OTHERS, PROBE)

    class Trained(Exception):
        pass

    def refuse(*_):
        raise Trained

    monkeypatch.setattr(rating_model, "fit", refuse)
    assert run(first.cache, [probe]).written == []
    changes = {
        "reward": ([probe._replace(reward=RewardConfig(depth=2, lora_layers=0, batch_size=20))], {}),
        "train": ([probe._replace(train=OTHERS[:-1])], {}),
        "rating": ([probe._replace(train=[OTHERS[0]._replace(rating=0.123), *OTHERS[1:]])], {}),
        "name": ([probe._replace(name="other")], {}),
        "test": ([probe], {"test": TEST[1:]}),
        "seed": ([probe], {"seed": 1}),
        "base": ([probe], {"model": smoke.model(1)}),
    }
    for wanted, options in changes.values():
        with pytest.raises(Trained):
            run(first.cache, wanted, **options)


def test_pairs_are_of_different_ratings_in_the_right_order():
    ratings = np.array([1.0, -1.0, 1.0, 0.5, -1.0])
    better, worse = rated_pairs(ratings, 500, np.random.default_rng(0))
    assert np.all(ratings[better] > ratings[worse])
    # 25 ordered draws of two rows, of which 5 + 2 + 2 have equal ratings
    assert 250 < len(better) < 390
    expected = {(i, j) for i in range(5) for j in range(5) if ratings[i] > ratings[j]}
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
