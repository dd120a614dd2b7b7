"""evidence: gains with their errors, prompt by prompt where both evaluations are kept; which numbers are compared."""

import math
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.report.evidence import (
    HELD_OUT,
    Evidence,
    best_evaluation,
    gain,
    mean_error,
    paired_differences,
    read_columns,
    scores_before_after,
)
from ppo_jax.runs.output import rundir

BEFORE = {"reward": 0.0, "reward_std": 2.0}


def unpaired(after: dict, prompts: int | None, before: dict = BEFORE):
    return gain(Evidence((), before, after, prompts=prompts), "reward")


def test_gain_by_hand() -> None:
    # change 3 of a spread of 2: 1.5 std; standard error sqrt((2^2 + 1^2) / 20) = 0.5
    found = unpaired({"reward": 3.0, "reward_std": 1.0}, 20)
    assert found == (0.0, 3.0, 1.5, pytest.approx(0.5), False) and found.direction == 1


@pytest.mark.parametrize(("after", "direction"), [(0.99, 0), (1.01, 1), (-0.99, 0), (-1.01, -1)])
def test_direction_needs_two_standard_errors(after: float, direction: int) -> None:
    # without a final spread the initial one stands for both: error sqrt((4 + 4) / 32) = 0.5
    found = unpaired({"reward": after}, 32)
    assert found is not None and found.direction == direction


def test_no_spread_means_only_the_sign_is_known() -> None:
    found = unpaired({"reward": 0.5}, 100, {"reward": 1.0})
    assert found is not None and found.in_std is None and found.error is None and found.direction == -1


def test_paired_error_by_hand() -> None:
    """Differences 1, 2, 3 and 2: mean 2, std sqrt(2/3), standard error sqrt(2/3) / 2 = 0.41."""
    first, last = np.array([0.0, 5.0, 9.0, 2.0]), np.array([1.0, 7.0, 12.0, 4.0])
    before, after = ({"step": s, "reward": x.mean(), "reward_std": x.std(ddof=1)} for s, x in ((0, first), (8, last)))
    evidence = Evidence((), before, after, prompts=4, columns={0: {"reward": first}, 8: {"reward": last}})
    found = gain(evidence, "reward")
    assert found is not None and found.paired and found.error == pytest.approx(math.sqrt(2 / 3) / 2)
    assert found.direction == 1  # 2 is beyond 0.82; independent means would have an error of 3.2
    independent = gain(evidence._replace(columns={}), "reward")
    assert independent is not None and not independent.paired and independent.direction == 0


def test_only_prompts_with_both_scores_are_paired() -> None:
    columns = {0: {"reward": np.array([0.0, math.nan, 1.0])}, 4: {"reward": np.array([1.0, 2.0, math.nan])}}
    assert paired_differences(columns, 0, 4, "reward") is None  # one is left
    columns[4]["reward"][2] = 3.0
    assert list(paired_differences(columns, 0, 4, "reward")) == [1.0, 2.0]  # type: ignore[arg-type]
    assert paired_differences(columns, None, 4, "reward") is None
    assert paired_differences(columns, 0, 5, "reward") is None
    assert paired_differences(columns, 0, 4, "other") is None
    columns[4]["reward"] = np.zeros(2)  # another number of held-out prompts: not the same ones
    assert paired_differences(columns, 0, 4, "reward") is None


def test_means_of_lengths_and_ends_are_paired_by_their_columns() -> None:
    columns = {s: {"tokens": np.array([4.0 + s, 6.0]), "ended": np.array([1.0, 0.0])} for s in (0, 2)}
    assert list(paired_differences(columns, 0, 2, "response_length")) == [2.0, 0.0]  # type: ignore[arg-type]
    assert list(paired_differences(columns, 0, 2, "eos_rate")) == [0.0, 0.0]  # type: ignore[arg-type]


def test_columns_come_from_the_file_and_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    assert read_columns(tmp_path) == {}
    for reward in ([1.0, 2.0], [3.0, math.nan]):  # an evaluation whose samples could not be written was written again
        rundir.write_evaluation(tmp_path, 4, [], [], {"reward": reward, "ended": [True, False]}, ["reward"])
    found = read_columns(tmp_path)
    assert found[4]["reward"][0] == 3.0 and math.isnan(found[4]["reward"][1]) and list(found[4]["ended"]) == [1.0, 0.0]


RECORDS = [
    {"step": 0, "phase": "eval", "reward": 0.5},
    *({"step": i, "phase": "ppo", "reward": float(i), "reward_std": 3.0, "kl": 0.1 * i} for i in range(1, 21)),
    {"step": 10, "phase": "eval", "reward": 2.5},
    {"step": 20, "phase": "eval", "reward": 2.0},
]


def test_a_summary_is_found_among_the_evaluations_and_else_taken_as_it_is() -> None:
    before, after, source = scores_before_after({"before": {"reward": 0.5}, "after": {"reward": 2.0}}, RECORDS)
    assert (before["step"], after["step"], source) == (0, 20, None)
    before, after, source = scores_before_after({"before": {"reward": 5.0}, "after": {"reward": 4.0}}, RECORDS)
    assert (before, after, source) == ({"reward": 5.0}, {"reward": 4.0}, None)


def test_in_the_middle_of_a_run_the_newest_evaluation_is_the_last() -> None:
    before, after, source = scores_before_after({"title": "begun"}, RECORDS[:-1])
    assert (before["step"], after["step"], source) == (0, 10, HELD_OUT)


def test_without_evaluations_the_ends_of_the_curve_are_compared() -> None:
    before, after, source = scores_before_after({}, RECORDS[1:21])
    assert (before["reward"], after["reward"]) == (1.5, 19.5) and "2 updates; no held-out" in str(source)
    assert not Evidence(source=source).held_out and Evidence(source=HELD_OUT).held_out
    assert scores_before_after({}, RECORDS[1:2]) == ({}, {}, None)


def test_the_best_evaluation_is_one_after_training_began() -> None:
    found = best_evaluation(Evidence(RECORDS))
    assert found is not None and found["step"] == 10
    lowest = best_evaluation(Evidence(RECORDS, best_metric="-reward"))
    assert lowest is not None and lowest["step"] == 20  # 0.5 at update 0 is no result of training
    assert (
        best_evaluation(Evidence(RECORDS[:1])) is None and best_evaluation(Evidence(RECORDS, best_metric="x")) is None
    )


def test_the_error_of_a_mean_is_its_spread_over_the_root_of_the_prompts() -> None:
    assert mean_error(Evidence(prompts=16), {"reward": 1.0, "reward_std": 2.0}, "reward") == 0.5
    assert mean_error(Evidence(), {"reward_std": 2.0}, "reward") is None
    kept = Evidence(prompts=4, columns={8: {"tokens": np.array([1.0, 3.0, math.nan, 2.0])}})
    # std of 1, 3 and 2: 1; over the root of three
    assert mean_error(kept, {"step": 8, "response_length": 2.0}, "response_length") == pytest.approx(1 / math.sqrt(3))
    assert mean_error(kept, {"step": 9, "response_length": 2.0}, "response_length") is None
    assert mean_error(Evidence(prompts=16), {"reward": 1.0}, "reward") is None
