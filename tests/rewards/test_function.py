"""Rewards that are Python functions: what they are given, what they may return, and what becomes of their failures."""

import subprocess
import sys
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo_jax.rewards import function as module
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rewards.function import FunctionConfig, function_reward
from ppo_jax.types import Scores

PROMPTS, RESPONSES = ["a", "b", "c", "d"], ["one", "two", "three", "four"]
METADATA = [{"id": i, "want": [i]} for i in range(4)]


def call(function: Any, **settings: Any) -> tuple[Scores, FailureLog, list[str]]:
    said: list[str] = []
    log = FailureLog(said.append)
    return function_reward(function, FunctionConfig(**settings), log)(PROMPTS, RESPONSES, METADATA), log, said


def check(scores: Scores, expected: list[float | None]) -> None:
    """None: failed, and then the reward is no number (defect 19), least of all 0."""
    assert scores.reward.dtype == np.float32
    np.testing.assert_array_equal(scores.valid, [value is not None for value in expected])
    np.testing.assert_array_equal(scores.reward, np.array([np.nan if v is None else v for v in expected], np.float32))


@pytest.fixture
def never():
    """An event that is set when the test is over, so that hanging threads end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_batch_at_once():
    seen = []

    def function(prompts, responses, metadata):
        seen.append((prompts, responses, metadata))
        return [len(r) + m["id"] / 4 for r, m in zip(responses, metadata, strict=True)]

    scores, log, said = call(function)
    check(scores, [3.0, 3.25, 5.5, 4.75])  # defect 2: fractions stay
    assert seen == [(PROMPTS, RESPONSES, METADATA)] and not log.counts and not said


def test_row_by_row_in_order_whoever_is_first():
    together = threading.Barrier(4)

    def function(prompt, response, metadata):
        order = together.wait(20)  # all four rows are in flight at once
        threading.Event().wait(0.01 * order)
        return metadata["id"] + 0.5

    scores, log, _ = call(function, per_sample=True, threads=4)
    check(scores, [0.5, 1.5, 2.5, 3.5])
    assert not log.counts


def test_no_more_threads_than_allowed():
    lock, busy = threading.Lock(), [0, 0]

    def function(prompt, response, metadata):
        with lock:
            busy[0] += 1
            busy[1] = max(busy)
        threading.Event().wait(0.02)
        with lock:
            busy[0] -= 1
        return 1

    check(call(function, per_sample=True, threads=2)[0], [1.0] * 4)
    assert busy[1] == 2


def test_what_the_function_does_to_its_arguments_stays_with_it():
    def function(prompts, responses, metadata):
        prompts.clear(), responses.clear(), metadata[0].clear(), metadata[1].update(id=9)
        return [1, 2, 3, 4]

    check(call(function)[0], [1, 2, 3, 4])
    assert PROMPTS == ["a", "b", "c", "d"] and METADATA[:2] == [{"id": 0, "want": [0]}, {"id": 1, "want": [1]}]


@pytest.mark.parametrize(
    "value",
    [
        (0.5, 1, -2, 3),
        np.array([0.5, 1, -2, 3]),
        np.array([0.5, 1, -2, 3], np.float16),
        jnp.array([0.5, 1.0, -2.0, 3.0]),
        torch.tensor([0.5, 1.0, -2.0, 3.0], requires_grad=True),
        [np.float32(0.5), np.int64(1), torch.tensor(-2), jnp.asarray(3)],
        {0.5: "", 1: "", -2: "", 3: ""}.keys(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_every_library(value: Any):
    check(call(lambda *_: value)[0], [0.5, 1, -2, 3])


def test_a_generator_runs_inside_the_time_limit():
    def forever():
        while True:
            yield 1.0

    check(call(lambda *_: (x / 2 for x in range(4)))[0], [0, 0.5, 1, 1.5])
    scores, log, said = call(lambda *_: forever())
    check(scores, [None] * 4)
    assert log.counts == {"the function returned a wrong number of scores": 4} and "more for 4 rows" in said[0]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (True, "bool in place of a number"),
        (np.bool_(True), "bool in place of a number"),
        ("1.5", "str in place of a number"),
        (None, "NoneType in place of a number"),
        (1 + 2j, "complex in place of a number"),
        ([1.0], "list in place of a number"),
        (float("nan"), "NaN"),
        (np.float32("nan"), "NaN"),
        (float("-inf"), "infinity"),
        (1e39, "too large for float32"),
        (-(10**400), "too large for float32"),
    ],
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_value_that_is_no_number_fails_its_row(value: Any, cause: str, per_sample: bool):
    function = (lambda p, r, m: value if m["id"] == 2 else 1.5) if per_sample else (lambda *_: [1.5, 1.5, value, 1.5])
    scores, log, said = call(function, per_sample=per_sample)
    check(scores, [1.5, 1.5, None, 1.5])
    assert log.counts == {f"the function returned {cause}": 1} and len(said) == 1


@pytest.mark.parametrize(
    ("value", "cause", "detail"),
    [
        ([1.0, 2.0], "a wrong number of scores", "2 for 4 rows"),
        ([], "a wrong number of scores", "0 for 4 rows"),
        (np.ones((1, 4)), "a wrong number of scores", "1 for 4 rows"),
        (1.0, "float in place of a list", ""),
        (None, "NoneType in place of a list", ""),
        ("1234", "str in place of a list", ""),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "dict in place of a list", ""),
        (np.float32(1.0), "float32 in place of a list", ""),
    ],
)
def test_an_answer_that_is_not_one_number_per_row_fails_all(value: Any, cause: str, detail: str):
    scores, log, said = call(lambda *_: value)
    check(scores, [None] * 4)
    assert [count for count in log.counts.values()] == [4]
    assert len(said) == 1 and cause in said[0] and detail in said[0]


@pytest.mark.parametrize("error", [KeyError("want\n\x1b[31m"), SystemExit(3), RecursionError("deep")])
def test_an_exception_fails_its_rows_and_says_where(error: BaseException):
    def function(prompt, response, metadata):
        if metadata["id"] % 2:
            raise error
        return 2.25

    scores, log, said = call(function, per_sample=True)
    check(scores, [2.25, None, 2.25, None])
    assert log.counts == {f"the function raised {type(error).__name__}": 2}
    assert len(said) == 1 and "test_function.py:" in said[0] and said[0].isprintable()


def test_a_call_that_hangs_is_given_up_and_the_others_go_on(never: threading.Event):
    """Two threads; the first two rows hang for ever, and the last two are scored all the same."""

    def function(prompt, response, metadata):
        if metadata["id"] < 2:
            never.wait()
        return 1.5

    scores, log, said = call(function, per_sample=True, threads=2, timeout=0.2)
    check(scores, [None, None, 1.5, 1.5])
    assert log.counts == {"the function did not return within 0.2 s": 2} and len(said) == 1


def test_a_batch_that_hangs_fails_and_the_next_one_is_scored(never: threading.Event):
    first = [True]

    def function(prompts, responses, metadata):
        if first and first.pop():
            never.wait()
        return [1, 2, 3, 4]

    log = FailureLog()
    reward = function_reward(function, FunctionConfig(timeout=0.2), log)
    check(reward(PROMPTS, RESPONSES, METADATA), [None] * 4)
    check(reward(PROMPTS, RESPONSES, METADATA), [1, 2, 3, 4])
    assert log.counts == {"the function did not return within 0.2 s": 4}


def test_the_deadline_of_the_batch(never: threading.Event):
    """One thread, and the second row never ends: the batch's deadline does, and the rest was not reached."""

    def function(prompt, response, metadata):
        if metadata["id"] == 1:
            never.wait()
        return 1.5

    scores, log, _ = call(function, per_sample=True, threads=1, timeout=60.0, deadline=0.3)
    check(scores, [1.5, None, None, None])
    assert log.counts == {
        "the function did not return within 0.3 s": 1,
        "the function was not reached before the deadline of the batch": 2,
    }


def test_hanging_calls_do_not_pile_up(never: threading.Event, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ABANDONED", 3)
    calls = []

    def function(prompt, response, metadata):
        calls.append(metadata["id"])
        never.wait()

    log = FailureLog()
    reward = function_reward(function, FunctionConfig(per_sample=True, threads=1, timeout=0.05), log)
    for _ in range(2):
        check(reward(PROMPTS, RESPONSES, METADATA), [None] * 4)
    assert calls == [0, 1, 2] and log.counts["the function is not called any more, since 3 calls hang"] == 5


def test_a_process_ends_while_a_call_hangs():
    """Threads of hanging calls are daemons: the interpreter does not wait for them."""
    code = (
        "import time\n"
        "from ppo_jax.rewards.function import FunctionConfig, function_reward\n"
        "reward = function_reward(lambda *_: time.sleep(600), FunctionConfig(timeout=0.1), print)\n"
        "print(reward(['a'], ['b'], [{}]).valid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the function did not return within 0.1 s 1 \n[False]\n"


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"timeout": 0.0}, {"deadline": float("inf")}])
def test_settings_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FunctionConfig(**wrong)
