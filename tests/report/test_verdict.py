"""verdict: each outcome from numbers chosen by hand."""

import math

import pytest

from ppo_jax.report import verdict
from ppo_jax.report.evidence import Evidence

LABELS = {"vader": "VADER", "judge": "the second reward model"}
BEFORE = {"reward": 0.0, "reward_std": 2.0, "vader": 0.1, "vader_std": 0.5, "judge": 0.0, "judge_std": 1.0}


def judge(records=(), prompts=100, labels=LABELS, **after):
    evidence = Evidence(records, BEFORE, {"reward": 3.0, **after}, prompts=prompts, labels=labels)
    return verdict.judge(evidence)


@pytest.mark.parametrize("broken", [{}, {"reward": None}, {"reward": math.nan}, {"reward": math.inf}])
def test_missing_or_broken_numbers_give_no_verdict(broken):
    assert verdict.judge(Evidence(before=BEFORE, after=broken)) is None
    assert verdict.judge(Evidence(before=broken, after=BEFORE)) is None


def test_reward_and_judges_rise():
    found = judge(vader=0.6, judge=1.2)
    assert found.headline == "Reward up 1.5 standard deviations, and independent judges agree"
    assert "+1.50 standard deviations of the initial policy's scores: at least one standard deviation" in found.text
    assert "VADER (+0.50, +1.00 std) and the second reward model (+1.20, +1.20 std)" in found.text
    assert "no sign that the proxy was gamed." in found.text  # the smallest share is 1.0 / 1.5: no reservation


def test_a_judge_without_a_label_goes_by_its_name():
    found = judge(labels={}, vader=0.6)
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
    still = judge(reward=0.1, vader=0.9)
    assert still.headline == "The reward did not rise" and "VADER" not in still.text
    fell = judge(reward=-3.0)
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
    evidence = Evidence((), before, after, prompts=100, kl_budget=15.0, reward_accuracy=0.771)
    text = verdict.judge(evidence).text
    assert "16.0 nats per response from the reference (0.80 per token), beyond the budget of 15." in text
    assert "10.0 tokens long (before: 20.0), and 90% end by themselves (before: 25%). Such a change of length" in text
    assert "77.1% of held-out pairs as their labels say" in text
    assert "pairs as people did" in verdict.judge(evidence._replace(raters="people did")).text


# -- a reward that did not clearly rise -------------------------------------------------------------------------------


def training(first: float, last: float, count: int = 20) -> list[dict]:
    """Batches whose mean reward goes evenly from one to the other, with a spread of 2 in each."""
    rewards = [first + (last - first) * i / (count - 1) for i in range(count)]
    return [{"step": i + 1, "phase": "ppo", "reward": r, "reward_std": 2.0} for i, r in enumerate(rewards)]


def test_a_policy_that_moved_is_never_said_not_to_have_moved():
    # error sqrt(2 * 4 / 100) = 0.28: a change of 0.1 is within two of them
    for kl, said in ((0.0, True), (0.09, True), (3.0, False)):
        found = judge(reward=0.1, kl=kl)
        assert ("did not move it" in found.text) == said
        assert (found.headline == "The reward did not rise") == said
    assert found.headline == "The policy moved, but the reward did not clearly change"
    assert "went from 0.00 to 0.10, a change of +0.1 ± 0.28, within two standard errors" in found.text


def test_a_curve_that_doubled_is_told_beside_prompts_that_cannot_tell():
    found = judge(training(1.0, 2.0), reward=0.1, kl=0.0)
    assert "rose in training, but not clearly on the held-out prompts" in found.headline
    assert "did not move" not in found.text and "training prompts it went from 1.03 to 1.97" in found.text
    assert "training prompts" not in judge(training(1.0, 1.2), reward=0.1, kl=0.0).text  # a tenth of its spread


def test_how_many_prompts_would_show_the_change():
    # two errors are 2 * 0.283 = 0.566; a change of 0.2 is seen with 100 * (0.566 / 0.2)^2 = 800 prompts
    assert "About 800 held-out prompts would show a change of this size." in judge(reward=0.2, kl=3.0).text
    assert "would show" not in judge(reward=0.01, kl=3.0).text  # 320,000: nobody has so many
    assert "would show" not in judge(reward=-0.2, kl=3.0).text


@pytest.mark.parametrize(
    ("after", "advice"),
    [
        ({"reward": 0.1, "kl": 0.0}, "Raise --hyper.learning-rate"),
        ({"reward": 0.1, "kl": 3.0}, "--held-out; 100 now"),
        ({"reward": -3.0}, "Lower --hyper.learning-rate"),
        ({"vader": -0.4}, "--loop.best-metric"),
        ({"vader": 0.6}, None),
        ({}, None),
    ],
)
def test_what_failed_comes_with_advice(after, advice):
    found = judge(**after).advice
    assert advice in found[0] if advice else found == ()


# -- judges, the best evaluation --------------------------------------------------------------------------------------


def test_parts_of_the_reward_are_no_judges():
    found = judge(**{"reward/helpful": 9.0, "reward/helpful_std": 1.0, "vader": 0.6})
    assert "helpful" not in found.text and found.headline.endswith("and an independent judge agrees")


def test_judges_that_agree_are_counted():
    before = {**BEFORE, "third": 0.0, "third_std": 1.0}
    after = {"reward": 3.0, "vader": 0.6, "judge": 1.2, "third": 0.0, "third_std": 1.0}
    found = verdict.judge(Evidence((), before, after, prompts=100, labels=LABELS))
    assert found.headline.endswith("and 2 of 3 independent judges agree")


def evaluation(step, reward, judge, kl=1.0):
    return {"step": step, "phase": "eval", **BEFORE, "reward": reward, "judge": judge, "kl": kl}


def test_the_best_evaluation_is_named_with_its_numbers_beside_the_last():
    records = [evaluation(0, 0.0, 0.0, 0.0), evaluation(10, 4.0, 2.0, 5.0), evaluation(20, 3.0, 1.9, 9.0)]
    evidence = Evidence(records, records[0], records[-1], prompts=100, labels=LABELS)
    text = verdict.judge(evidence).text
    # error of independent means sqrt(2 * 4 / 100) = 0.28; 1.0 is beyond two of them
    assert (
        "The best evaluation is that of update 10 (reward 4.00, VADER 0.100, the second reward model 2.000, KL 5.00); "
        "the last one, of update 20, lies -1.00 ± 0.28 from it, a clear difference."
    ) in text
    near = [*records[:1], evaluation(10, 3.1, 2.0), records[-1]]
    assert "no clear difference" in verdict.judge(evidence._replace(records=near)).text
    assert "best evaluation" not in verdict.judge(evidence._replace(records=records[:1] + records[2:])).text
    assert "update 20 (kl 9.000" not in text
    by_kl = verdict.judge(evidence._replace(records=near, best_metric="-kl")).text
    assert "that of update 10 (KL 1.00" in by_kl
