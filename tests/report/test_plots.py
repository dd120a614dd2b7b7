"""plots: the right numbers on the right axes, and nothing drawn that was not measured."""

import math
from pathlib import Path

import matplotlib.image
import pytest

from ppo_jax.report import plots
from ppo_jax.report.series import moving_average, series
from ppo_jax.runs.output import writers


def records(count=4, **values):
    return [{"step": i, "phase": "ppo", **{k: v(i) for k, v in values.items()}} for i in range(1, count + 1)]


def evaluation(step, **values):
    return {"step": step, "phase": "eval", **values}


def line(axes, index=0):
    x, y = axes.lines[index].get_data()
    return list(x), list(y)


def test_series_leaves_out_nulls_and_infinities():
    rows = records(reward=lambda i: [1.0, None, "Infinity", 2.0][i - 1])
    assert series(rows, "ppo", "reward") == ([1, 4], [1.0, 2.0])
    assert series(rows, "eval", "reward") == ([], [])


def test_moving_average_by_hand():
    # ends: (1 + 2) / 2 and (6 + 12) / 2
    assert moving_average([1.0, 2.0, 6.0, 12.0], 3) == [1.5, 3.0, 20 / 3, 9.0]


def test_reward_against_sqrt_kl():
    rows = records(reward=float, kl=lambda i: [4.0, 9.0, -0.01, None][i - 1])
    spreads = {"reward_std": 1.0, "judge_std": 2.0, "tiny_std": 0.1}
    rows += [evaluation(0, reward=0.5, kl=0.0, judge=0.25, tiny=0.1, **spreads)]
    rows += [evaluation(4, reward=1.5, kl=2.25, judge=1.0, tiny=0.2, **spreads)]
    (axes,) = plots.reward_against_kl(rows, {"judge": "a second model"}).axes
    assert [x.get_label() for x in axes.lines][1:] == ["held-out prompts", "a second model"]  # tiny: another scale
    assert line(axes, 0) == ([2.0, 3.0, 0.0], [1.0, 2.0, 3.0])  # a sampled KL just below 0 counts as 0
    assert line(axes, 1) == ([0.0, 1.5], [0.5, 1.5])
    assert line(axes, 2) == ([0.0, 1.5], [0.25, 1.0])
    assert axes.get_xlabel() == "√KL per response (√nats)"


def test_reward_and_kl_have_panels_of_their_own():
    figure = plots.reward_and_kl([*records(reward=float, kl=lambda i: i / 2), evaluation(4, reward=3.5, kl=2.5)])
    top, bottom = figure.axes
    assert line(top, 0) == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]) and line(top, 1) == ([4], [3.5])
    assert line(bottom, 0)[1] == [0.5, 1.0, 1.5, 2.0] and line(bottom, 1)[1] == [2.5]
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("reward score", "nats per response")


def test_judges_are_gains_in_initial_standard_deviations():
    rows = [
        evaluation(0, reward=1.0, reward_std=2.0, vader=0.1, vader_std=0.5),
        evaluation(9, reward=4.0, reward_std=9.0, vader=0.2, vader_std=9.0),
    ]
    (axes,) = plots.judges(rows).axes
    assert line(axes, 0)[1] == [0.0, 1.5] and line(axes, 1)[1] == pytest.approx([0.0, 0.2])
    for row in rows:
        del row["vader_std"]
    assert plots.judges(rows) is None  # a value without a spread is no judge, unless a label says so
    (axes,) = plots.judges(rows, {"vader": "VADER"}).axes  # one spread is unknown: all in their own units
    assert line(axes, 0)[1] == [0.0, 3.0] and "own units" in axes.get_ylabel()
    assert plots.judges([evaluation(0, reward=1.0), evaluation(1, reward=2.0)]) is None


def test_long_runs_show_a_moving_average_and_say_so():
    (top, _) = plots.reward_and_kl(records(80, reward=lambda i: float(i % 2))).axes
    assert len(top.lines) == 2 and top.lines[1].get_label() == "training prompts (mean of 5)"
    assert set(top.lines[0].get_ydata()) == {0.0, 1.0}  # the raw values stay visible
    assert max(top.lines[1].get_ydata()[2:-2]) == pytest.approx(0.6)


def test_explained_variance_says_what_it_cuts_off():
    (axes,) = plots.explained_variance(records(explained_variance=lambda i: [-50.0, -2.0, 0.1, 0.5][i - 1])).axes
    assert (
        line(axes)[1] == [-1.1, -1.1, 0.1, 0.5]
        and "2 below" in axes.get_title()
        and axes.get_ylim()[0] == pytest.approx(-1.1)
    )


def test_reward_model_shows_chance():
    rows = [
        {"step": i, "phase": "reward", "loss": 0.7 - i / 100, "accuracy": 0.5, "heldout_accuracy": 0.6} for i in (0, 1)
    ]
    loss, accuracy = plots.reward_model(rows).axes
    assert math.log(2) in loss.lines[-1].get_ydata() and 0.5 in accuracy.lines[-1].get_ydata()
    assert [text.get_text() for text in accuracy.get_legend().get_texts()][1] == "held-out pairs"


def test_curves_without_numbers_are_not_drawn(tmp_path: Path):
    assert plots.draw(tmp_path) == [] and not (tmp_path / "plots").exists()
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    write(1, "ppo", {"reward": 1.0, "kl": float("nan"), "explained_variance": float("nan"), "entropy": 2.0})
    assert [plot.path.name for plot in plots.draw(tmp_path)] == ["reward_kl.png", "diagnostics.png"]


def test_pictures_are_sharp_and_not_blank(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for i in range(5):
        write(i, "ppo", {"reward": i, "kl": i, "response_length": 20 + i, "eos_rate": 0.1})
    drawn = plots.draw(tmp_path)
    assert [plot.path.stem for plot in drawn] == ["reward_kl", "reward_sqrt_kl", "response_length"]
    for plot in drawn:
        image = matplotlib.image.imread(plot.path)
        assert image.shape[1] == 1080 and image[..., :3].min() < 0.3  # twice the 540 pixels of the page; ink
