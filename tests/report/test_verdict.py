"""verdict: each outcome from numbers chosen by hand."""

import math

import pytest

from ppo_jax.report import verdict

LABELS = {"vader": "VADER", "judge": "the second reward model"}
BEFORE = {"reward": 0.0, "reward_std": 2.0, "vader": 0.1, "vader_std": 0.5, "judge": 0.0, "judge_std": 1.0}


def judge(records=(), count=100, **after):
    return verdict.judge(BEFORE, {"reward": 3.0, **after}, records, count, labels=LABELS)


def test_gain_by_hand():
    # change 3 of a spread of 2: 1.5 std; standard error sqrt((2^2 + 1^2) / 20) = 0.5
    found = verdict.gain(BEFORE, {"reward": 3.0, "reward_std": 1.0}, "reward", 20)
    assert found == (0.0, 3.0, 1.5, 0.5) and found.direction == 1


@pytest.mark.parametrize(("after", "direction"), [(0.99, 0), (1.01, 1), (-0.99, 0), (-1.01, -1)])
def test_direction_needs_two_standard_errors(after, direction):
    # without a final spread the initial one stands for both: error sqrt((4 + 4) / 32) = 0.5
    assert verdict.gain(BEFORE, {"reward": after}, "reward", 32).direction == direction


def test_no_spread_means_only_the_sign_is_known():
    found = verdict.gain({"reward": 1.0}, {"reward": 0.5}, "reward", 100)
    assert found.in_std is None and found.error is None and found.direction == -1


@pytest.mark.parametrize("broken", [{}, {"reward": None}, {"reward": math.nan}, {"reward": math.inf}])
def test_missing_or_broken_numbers_give_no_verdict(broken):
    assert verdict.judge(BEFORE, broken) is None and verdict.judge(broken, BEFORE) is None


def test_reward_and_judges_rise():
    found = judge(vader=0.6, judge=1.2)
    assert found.headline == "Reward up 1.5 standard deviations, and independent judges agree"
    assert "+1.50 standard deviations of the initial policy's scores: at least one standard deviation" in found.text
    assert "VADER (+0.50, +1.00 std) and the second reward model (+1.20, +1.20 std)" in found.text
    assert "no sign that the proxy was gamed." in found.text  # the smallest share is 1.0 / 1.5: no reservation


def test_a_judge_without_a_label_goes_by_its_name():
    found = verdict.judge(BEFORE, {"reward": 3.0, "vader": 0.6}, (), 100)
    assert "Not seen in training, and up as well: vader (+0.50, +1.00 std)." in found.text


def test_small_gain_of_a_judge_is_a_reservation():
    assert "smallest of these gains is 40% of the reward's" in judge(judge=0.6).text  # 0.6 std of 1.5 std


def test_gamed_when_the_judges_fall():
    found = judge(vader=-0.4, judge=-1.0)
    assert found.headline.endswith("but it was gamed") and "the proxy was gamed" in found.text


def test_judges_that_disagree():
    found = judge(vader=0.6, judge=-1.0)
    assert found.headline.endswith("but the judges disagree") and "was gamed" not in found.text


def test_judges_without_a_clear_change():
    # error of VADER: sqrt(2 * 0.25 / 100) = 0.07, so +0.1 is within two of them
    found = judge(vader=0.2)
    assert found.headline.endswith("but no independent judge saw it")
    assert "without a clear change: VADER" in found.text and "no sign" not in found.text


def test_nothing_independent():
    assert "cannot be told" in judge().text


def test_reward_that_did_not_move_or_fell():
    still = verdict.judge(BEFORE, {"reward": 0.1, "vader": 0.9}, (), 100, labels=LABELS)
    assert still.headline == "The reward did not rise" and "VADER" not in still.text
    fell = verdict.judge(BEFORE, {"reward": -3.0}, (), 100)
    assert fell.headline == "The reward fell" and "wrong way" in fell.text


def test_less_than_one_standard_deviation_is_said():
    assert "+0.75 standard deviations of the initial policy's scores: less than one" in judge(reward=1.5).text


def test_judge_that_fell_from_its_peak():
    # error sqrt(2 * 1 / 100) = 0.14: the fall from 2.0 to 1.0 is clear, from 1.2 to 1.0 it is not
    def evals(peak):
        return [{"step": s, "phase": "eval", "judge": v} for s, v in ((0, 0.0), (20, peak), (40, 1.0))]

    assert "best at update 20 (2.00) and has fallen to 1.00" in judge(evals(2.0), judge=1.0).text
    assert "over-optimised" not in judge(evals(1.2), judge=1.0).text


def test_distance_and_length():
    after = {"reward": 3.0, "kl": 16.0, "kl_per_token": 0.8, "response_length": 10.0, "eos_rate": 0.9}
    before = {**BEFORE, "response_length": 20.0, "eos_rate": 0.25}
    text = verdict.judge(before, after, (), 100, kl_budget=15.0, reward_accuracy=0.771).text
    assert "16.0 nats per response from the reference (0.80 per token), beyond the budget of 15." in text
    assert "10.0 tokens long (before: 20.0), and 90% end by themselves (before: 25%). Such a change of length" in text
    assert "77.1% of held-out pairs" in text
