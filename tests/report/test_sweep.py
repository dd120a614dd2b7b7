"""The pages of a sweep and of several runs: what they say, that they load nothing, and that they escape every text."""

import math
import re
from pathlib import Path

import pytest

from ppo_jax.data.jsonl import append_jsonl
from ppo_jax.report import compare, sweep
from ppo_jax.report.sweep_plots import Run, pareto
from ppo_jax.runs.output import rundir
from ppo_jax.runs.sweep.results import read_results
from tests.report.made_sweep import make_sweep


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "sweep"
    make_sweep(directory, 3)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large") / "sweep"
    make_sweep(directory, 24, (0, 1))
    return directory


def text_of(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


@pytest.mark.parametrize("which", ["small", "large"])
def test_the_page_is_whole_and_stands_alone(which: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(which)
    results = read_results(directory)
    page = sweep.write(directory, results)
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert "<i>flat</i>" not in html and "<b>her</b>" not in html  # a policy may write HTML
    assert html.count("<svg ") == len(list((directory / "plots").glob("*.svg"))) >= 4
    best = sweep.rank(results)
    assert all(best[i].objectives[0] >= best[i + 1].objectives[0] for i in range(len(best) - 1))
    said = text_of(page)
    assert f"Best: learning_rate {best[0].values['hyper.learning_rate']:.4g}" in said
    for row in best[:5]:
        assert f"trials/{row.names[0]}/config.yaml --run-dir runs/again" in said and f"trial {row.run:04d}" in said
    for row in results.rows:
        assert f"trials/{row.names[0]}/report.html" in html


def test_a_large_sweep_shows_what_became_of_every_trial(large: Path) -> None:
    results = read_results(large)
    said = text_of(sweep.write(large, results))
    assert {row.state for row in results.rows} == {"finished", "pruned", "stopped", "trains"}
    assert "beyond --loop.max-kl 50" in said and "± " in said
    assert 0.99 < sum(results.importance.values()) < 1.01 and set(results.importance) == set(results.paths)
    assert (large / "plots" / "importance.svg").exists()


def test_a_sweep_without_a_finished_trial_has_a_page(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", 3)
    results = read_results(tmp_path / "sweep")
    rows = [row._replace(state="trains", objectives=(), spread=()) for row in results.rows]
    page = sweep.write(tmp_path / "sweep", results._replace(rows=rows, importance={}))
    assert "No trial has finished yet." in text_of(page)
    page = sweep.write(tmp_path / "sweep", results._replace(rows=[], importance={}))
    assert "0 settings" in text_of(page)


def test_low_is_good_where_the_objective_says_so(small: Path) -> None:
    results = read_results(small)
    up, down = sweep.rank(results), sweep.rank(results._replace(objective=("-reward",)))
    assert [row.run for row in up] == [row.run for row in reversed(down)]


def test_the_frontier_holds_what_no_other_beats() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 0.5), "c": (2.0, 3.0), "d": (3.0, 3.0), "e": (0.5, -1.0)}
    runs = [Run(name, "", (), {}, math.nan, point) for name, point in points.items()]
    assert [run.name for run in pareto(runs)] == ["e", "a", "c"]


def test_the_judges_of_compared_runs_and_what_they_measured_are_named(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "ab"]
    for path in runs:
        path.mkdir()
        rows = [
            {"step": i, "phase": "eval", "reward": i, "kl": 0.1 * i, "cat": 7 + i, "cat_std": 1.0} for i in range(3)
        ]
        append_jsonl(path / rundir.METRICS, rows)
        (path / rundir.CONFIG).write_text(
            "hyper: {kl_coef: 0.1}" if path.name == "a" else "hyper: {kl_coef: 0.2, gamma: 1}"
        )
        rundir.add_facts(path, judges={"cat": "Cats say"}, measured_on="training prompts")
    page = compare.write(tmp_path / "out", runs)
    said = text_of(page)
    assert "Cats say (score)" in said and "Training prompts." in said and "Held-out" not in said
    shown, folded = page.read_text(encoding="utf-8").split("<details>")
    assert "hyper.kl_coef" in shown and "hyper.gamma" not in shown and "hyper.gamma" in folded
    assert "9" in said and (tmp_path / "out" / "plots" / "cat_eval.svg").exists()


def test_runs_are_compared_by_what_differs(small: Path, tmp_path: Path) -> None:
    runs = [small / "trials" / f"{i:04d}" for i in range(3)]
    page = compare.write(tmp_path / "out", runs)
    html, said = page.read_text(encoding="utf-8"), text_of(page)
    assert "hyper.learning_rate" in said and "hyper.gamma" not in said and "run_dir" not in said
    pictures = list((tmp_path / "out" / "plots").iterdir())
    assert "<i>flat</i>" not in html and html.count("<svg ") == len(pictures)
    assert compare.short_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert compare.differences([{"a": "1", "b": "2"}, {"a": "1", "c": "3"}]) == [("b", ["2", "–"]), ("c", ["–", "3"])]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        compare.write(tmp_path / "out", [runs[0], tmp_path])
    with pytest.raises(ValueError, match="at least two"):
        compare.write(tmp_path / "out", runs[:1])
