"""The log of failures, and the rule that stops a run."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.rewards import failures
from ppo_jax.rewards.failures import FailureLog, next_streak, printable, too_many
from ppo_jax.rewards.scores import number, to_scores


def test_each_cause_is_named_once_and_counted():
    said: list[str] = []
    log = FailureLog(said.append)
    log("HTTP 500", 3, "oops")
    log("HTTP 500", 4, "another")
    log("NaN", 1)
    log("nothing", 0)
    assert log.counts == {"HTTP 500": 7, "NaN": 1}
    assert [line.split(".")[0] for line in said] == [
        "reward: HTTP 500: 3 rows could not be scored (oops)",
        "reward: NaN: 1 row could not be scored",
    ]
    assert log.summary() == "HTTP 500 (7 rows), NaN (1 row)"
    assert FailureLog().summary() == ""


def test_a_service_that_numbers_its_errors_does_not_fill_the_log():
    said: list[str] = []
    log = FailureLog(said.append)
    for i in range(1000):
        log(f"error {i}", 2)
    assert len(said) == len(log.counts) == failures.KINDS + 1
    assert log.counts["other causes"] == 2 * (1000 - failures.KINDS) and sum(log.counts.values()) == 2000


@pytest.mark.parametrize(
    ("failed", "streaks"),
    [
        ([0.3, 0.3, 0.3], [1, 2, 3]),
        ([0.3, 0.2, 0.3, 1.0], [1, 0, 1, 2]),  # exactly the ceiling is still allowed
        ([0.0, 0.25, 0.25, 0.1], [0, 1, 2, 0]),
    ],
)
def test_the_streak(failed: list[float], streaks: list[int]):
    streak, found = 0, []
    for fraction in failed:
        streak = next_streak(streak, fraction, 0.2)
        found.append(streak)
    assert found == streaks


def test_the_error_says_why_and_how_to_go_on():
    text = too_many(7, 3, 0.5, 0.2, "HTTP 500 (96 rows)")
    assert (
        "update 7: 50 % of the rewards failed" in text
        and "more than --loop.max-failed 0.2 did in 3 batches in a row" in text
    )
    assert "HTTP 500 (96 rows)" in text and "--resume" in text


@given(st.floats(width=32) | st.integers() | st.floats() | st.booleans() | st.text() | st.none())
def test_a_number_is_finite_in_float32_and_itself(value: Any):
    found, wrong = number(value)
    if wrong is None:
        assert found == float(value) and math.isfinite(np.float32(found)) and not isinstance(value, bool)
    else:
        assert math.isnan(found) and wrong


def test_failed_rows_are_nan_and_invalid():
    scores = to_scores([1, math.nan, -0.5], {"x": np.array([1, 2, 3])})
    np.testing.assert_array_equal(scores.reward, np.array([1, np.nan, -0.5], np.float32))
    np.testing.assert_array_equal(scores.valid, [True, False, True])
    assert scores.parts["x"].dtype == np.float32


@given(st.text(max_size=400), st.integers(10, 50))
def test_foreign_text_is_one_short_printable_line(text: str, limit: int):
    found = printable(text, limit)
    assert len(found) <= limit and (found.isprintable() or not found)


def test_plain_text_is_left_alone():
    assert printable("Zeile 1\n\tZeile 2") == "Zeile 1 Zeile 2"
    assert printable("x" * 200, 10) == "xxxxxxx..."
