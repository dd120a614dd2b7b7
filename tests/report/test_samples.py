"""samples: which prompts are shown, why, and under which names."""

import pytest

from ppo_jax.report.samples import sample_cards, spread


def lines(rewards: dict[int, list[float | None]]) -> list[dict]:
    """step -> the reward of prompts 0, 1, ..."""
    return [
        {"step": step, "index": i, "prompt": f"p{i}", "response": "r", "scores": {"reward": r, "kl": 1.5, "j": 0}}
        for step, column in rewards.items()
        for i, r in enumerate(column)
    ]


def test_first_best_worst_and_most_changed() -> None:
    #               0    1    2    3    4    5     6     7    8    9
    before = [0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 5.0, 5.0, 1.0]
    after = [1.0, 9.9, 0.0, 8.0, 9.0, 7.0, -5.0, -4.0, 1.0, 1.0]
    cards = sample_cards(lines({0: before, 4: after}), {"j": "The judge"})
    shown = [(card.why, card.steps[0]["prompt"]) for card in cards]
    # 1 is the best of all, but shown already; changes: 9 of 7 and 8 of 3 are shown already, then come 7 of 5 and 4 of 8
    assert shown == [
        ("", "p0"), ("", "p1"), ("", "p2"), ("best", "p4"), ("best", "p3"), ("worst", "p6"), ("worst", "p7"),
        ("most changed", "p5"), ("most changed", "p8"),
    ]  # fmt: skip
    assert [step["step"] for step in cards[3].steps] == [0, 4]
    assert cards[3].steps[1]["scores"] == [("Reward", "+9.00"), ("KL", "+1.50"), ("The judge", "+0.00")]


@pytest.mark.parametrize("rewards", [{0: [1.0] * 6, 4: [2.0] * 6}, {0: [1.0] * 9}, {0: [None] * 9, 4: [None] * 9}])
def test_few_prompts_one_evaluation_or_no_scores_select_nothing(rewards: dict) -> None:
    cards = sample_cards(lines(rewards), {})
    assert [(card.why, card.steps[0]["prompt"]) for card in cards] == [("", f"p{i}") for i in range(6)]


def test_a_prompt_whose_reward_failed_is_not_selected_and_has_a_dash() -> None:
    cards = sample_cards(lines({0: [0.0] * 9, 4: [None, *range(8)]}), {})
    assert cards[0].steps[1]["scores"][0] == ("Reward", "–")
    assert "p0" not in [card.steps[0]["prompt"] for card in cards if card.why]


def test_no_samples_are_no_cards() -> None:
    assert sample_cards([], {}) == []


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (7, [0, 2, 4, 6])])
def test_spread_keeps_first_and_last(count: int, shown: list[int]) -> None:
    assert spread(list(range(count)), 4) == shown
