"""Evaluations in pieces: every held-out row once, whatever the batch; given up on request; nothing half written."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import smoke
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.rewards.base import Reward
from ppo_jax.runs.evaluation import collect_columns, count_unchanged, earlier_responses, make_evaluator, summarise
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.train.evaluate import Evaluation
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Rollout, Scores
from tests.runs.test_ppo import FAILS, HELD_OUT, MODEL, SETUP, WordReward

STATE = init_state(jax.random.key(0), SETUP.adapter, MODEL.config, make_optimizer(), 0.1)


def make(folder: Path, batch_size: int, stop_after: int = 99) -> tuple[Any, list]:
    """evaluate, and what it has written; asked to stop at piece `stop_after`."""
    written: list[tuple] = []
    asked = iter([False] * stop_after + [True] * 9)
    loop = dataclasses.replace(SETUP.loop, batch_size=batch_size)
    setup = SETUP._replace(loop=loop, reward=Reward(host=AnyRows()))
    with progress("test", main_process=False) as screen:
        return make_evaluator(
            folder,
            setup,
            Frozen(MODEL.params),
            lambda step, phase, values: written.append((step, phase, dict(values))),
            rundir.write_evaluation,
            screen,
            {},
            lambda: next(asked),
        ), written


class AnyRows(WordReward):
    """`WordReward` that takes a piece of the held-out prompts for an evaluation."""

    def __call__(self, prompts: Any, responses: Any, metadata: Any) -> Any:
        assert len(prompts) == len(responses) == len(metadata) and set(prompts) <= set(HELD_OUT.texts)
        return super().__call__(prompts, responses, metadata)


@pytest.mark.parametrize("batch_size", [4, 6, 8])
def test_every_row_once_in_order(tmp_path: Path, batch_size: int):
    evaluate, written = make(tmp_path, batch_size)
    values = evaluate(2, STATE)
    rows = read_jsonl(tmp_path / rundir.SAMPLES)
    assert [row["prompt"] for row in rows] == HELD_OUT.texts  # 4: a whole piece, and one that is filled up
    points = [sum((w in smoke.GOOD) - (w in smoke.BAD) for w in row["response"].split()) for row in rows]
    points[FAILS] = None
    assert [row["scores"]["reward"] for row in rows] == points
    assert values["reward"] == pytest.approx(np.mean([p for p in points if p is not None]))
    (kept,) = read_jsonl(tmp_path / rundir.EVALUATIONS)  # every held-out prompt, so that two of these can be paired
    assert kept["step"] == 2 and kept["columns"]["reward"] == points
    assert kept["columns"]["valid"] == [point is not None for point in points]
    assert np.mean(kept["columns"]["tokens"]) == values["response_length"]
    assert abs(values["kl"]) < 1e-4  # the policy is the reference
    assert written == [(2, "eval", values)]


def test_the_same_step_and_state_give_the_same_numbers_again(tmp_path: Path):
    evaluate, written = make(tmp_path, 4)
    evaluate(2, STATE)
    evaluate(3, STATE)  # the key does not depend on the step
    assert written[0][2] | {"unchanged": 1.0} == written[1][2]


def test_responses_that_no_update_changes_are_counted(tmp_path: Path) -> None:
    """Against the evaluation before, of the samples that are kept; one at the same step, done again, is not before."""

    def count(step: int, responses: str) -> float | None:
        return count_unchanged(earlier_responses(tmp_path, step, {}), dict(enumerate(responses)))

    assert count(0, "ab") is None
    for step, responses in ((0, ["a", "b", "c", "d"]), (4, ["a", "x", "c", "y"])):
        rundir.write_samples(tmp_path, step, ["p"] * 4, responses, {})
    assert count(0, "aaaa") is None
    assert (count(4, "axcy"), count(8, "axcz"), count(8, "axcy")) == (0.5, 0.75, 1.0)


def test_a_full_disk_changes_no_number_of_an_evaluation(tmp_path: Path) -> None:
    """The samples are not written yet when the next evaluation counts which of them are as before."""
    for name in ("quiet", "hurt"):
        (tmp_path / name).mkdir()
    quiet, written = make(tmp_path / "quiet", 4)
    hurt, kept = make(tmp_path / "hurt", 4)
    for step in (2, 4, 4, 6):
        quiet(step, STATE)
        hurt(step, STATE)
        (tmp_path / "hurt" / rundir.SAMPLES).unlink()
    assert kept == written and written[-1][2]["unchanged"] == 1.0


def test_given_up_between_two_pieces_it_leaves_nothing(tmp_path: Path):
    evaluate, written = make(tmp_path, 4, stop_after=1)
    assert evaluate(2, STATE) is None
    assert written == [] and not (tmp_path / rundir.SAMPLES).exists() and not (tmp_path / rundir.EVALUATIONS).exists()


def test_only_rewards_leave_out_the_rows_that_were_not_scored():
    """A KL or a judge that is NaN is a defect and has to show; a row without a reward lowers no mean."""
    valid = np.array([True, False, True])
    nan = np.nan
    columns = {
        "valid": valid, "reward": np.array([1.0, nan, 3.0]), "reward/part": np.array([2.0, nan, 2.0]),
        "judge": np.array([1.0, 5.0, 6.0]), "broken": np.array([1.0, nan, 6.0]), "kl": np.array([0.5, nan, 0.5]),
        "tokens": np.array([2, 2, 2]), "ended": np.array([True, True, False]),
    }  # fmt: skip
    found = summarise(columns)
    assert (found["reward"], found["reward/part"], found["judge"]) == (2.0, 2.0, 4.0)
    assert found["invalid_scores"] == pytest.approx(1 / 3)
    assert np.isnan([found["broken"], found["kl"], found["kl_per_token"]]).all()


def test_device_and_host_are_summed():
    def host(prompts: Any, responses: Any, metadata: Any) -> Scores:
        return Scores(np.array([1, 2, np.nan]), np.ones(3, bool), {"inner": np.arange(3)})

    scores = Scores(np.array([10, np.nan, 30], np.float32), np.ones(3, bool), {"model": np.array([5, 6, 7])})
    slots, zeros = np.zeros((3, 2), bool), np.zeros((3, 2), np.float32)
    rollout = Rollout(slots.astype(np.int32), slots, slots, zeros, zeros, zeros, np.ones(3, bool), np.arange(3))
    setup = SETUP._replace(judges={}, reward=Reward(lambda *_: scores, host))
    found = collect_columns(setup, Evaluation(rollout, scores, np.zeros(3)), np.arange(3), ["", "", ""])
    np.testing.assert_array_equal(found["reward"], [11, np.nan, np.nan])
    np.testing.assert_array_equal(found["reward/model"], [5, np.nan, np.nan])
    np.testing.assert_array_equal(found["reward/inner"], [0, np.nan, np.nan])


def test_a_reward_on_the_device_that_is_infinite_is_no_score():
    scores = Scores(np.array([1.0, np.inf, np.nan], np.float32), np.ones(3, bool), {})
    rollout = Rollout(*[np.zeros((3, 2), np.float32)] * 6, np.ones(3, bool), np.arange(3))
    setup = SETUP._replace(judges={}, reward=Reward(lambda *_: scores))
    found = collect_columns(setup, Evaluation(rollout, scores, np.zeros(3)), np.arange(3), ["", "", ""])
    values = summarise(found)
    assert values["reward"] == 1.0 and values["invalid_scores"] == pytest.approx(2 / 3)
