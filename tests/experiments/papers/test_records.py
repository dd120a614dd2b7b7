"""A study runs what has no record, once, and leaves one line for each setting."""

import json
from pathlib import Path

import pytest

from experiments.papers.records import Study, read_records, rounded, run_study


def counting(ran: list[int], stop_at: int = -1) -> Study:
    """Settings 0, 1, 2; the result is the square. It fails at `stop_at`."""

    def run(setting: dict, toy: bool) -> dict:
        if setting["n"] == stop_at:
            raise KeyboardInterrupt
        ran.append(setting["n"])
        return {"square": setting["n"] ** 2, "toy": toy}

    return Study("counting", lambda toy: [{"n": n, "seeds": [0, 1]} for n in range(2 if toy else 3)], run)


def test_a_stopped_study_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    ran: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_study(counting(ran, stop_at=2), ["--to", str(tmp_path)])
    path = run_study(counting(ran), ["--to", str(tmp_path)])
    assert ran == [0, 1, 2]
    records = read_records(path)
    assert [record["result"]["square"] for record in records] == [0, 1, 4]
    assert run_study(counting(ran), ["--to", str(tmp_path)]) == path and ran == [0, 1, 2]
    for record in records:
        assert record["setting"]["seeds"] == [0, 1] and record["machine"]["cores"] >= 1 and record["minutes"] >= 0
        assert len(record["date"]) == 10 and "commit" in record


def test_a_line_that_a_stop_cut_off_is_run_again(tmp_path: Path) -> None:
    ran: list[int] = []
    path = run_study(counting(ran), ["--to", str(tmp_path)])
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:2]) + whole[2][:20])
    run_study(counting(ran), ["--to", str(tmp_path)])
    assert ran == [0, 1, 2, 2]
    assert [record["result"]["square"] for record in read_records(path)] == [0, 1, 4]


def test_no_time_begins_nothing_and_a_toy_says_so(tmp_path: Path) -> None:
    ran: list[int] = []
    path = run_study(counting(ran), ["--to", str(tmp_path), "--minutes=-1"])
    assert not path.exists() and ran == []
    toys = read_records(run_study(counting(ran), ["--smoke"]))
    assert [record["result"]["toy"] for record in toys] == [True, True]


def test_numbers_are_rounded_at_any_depth() -> None:
    assert rounded({"a": [1.23456789, (2, 0.000123456789)], "b": "c"}, 3) == {"a": [1.23, [2, 0.000123]], "b": "c"}
    assert json.loads(json.dumps(rounded(float("nan")))) != 0
