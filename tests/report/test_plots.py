"""plots, training: the right numbers on the right axes, and nothing drawn that was not measured."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ppo_jax.report import drawing, plots, training
from ppo_jax.report.drawing import moving_average
from ppo_jax.report.evidence import Evidence
from ppo_jax.runs.output.series import series


def records(count=4, phase="ppo", **values):
    return [{"step": i, "phase": phase, **{k: v(i) for k, v in values.items()}} for i in range(1, count + 1)]


def evaluation(step, **values):
    return {"step": step, "phase": "eval", **values}


def line(axes, index=0):
    x, y = axes.lines[index].get_data()
    return list(x), list(y)


def title(axes):
    return axes.get_title(loc="left") or axes.get_title()  # the style of `plots.draw` puts it to the left


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def bars(axes, index=0):
    """Half-lengths of the error bars of one series of dots."""
    segments = axes.containers[index].lines[2][0].get_segments()
    return [(high - low) / 2 for (_, low), (_, high) in segments]


def test_series_leaves_out_nulls_and_infinities():
    rows = records(reward=lambda i: [1.0, None, "Infinity", 2.0][i - 1])
    assert series(rows, "ppo", "reward") == ([1, 4], [1.0, 2.0])
    assert series(rows, "eval", "reward") == ([], [])


def test_moving_average_by_hand():
    # ends: (1 + 2) / 2 and (6 + 12) / 2
    assert moving_average([1.0, 2.0, 6.0, 12.0], 3) == [1.5, 3.0, 20 / 3, 9.0]


# -- evaluations --------------------------------------------------------------------------------------------------


def test_reward_and_kl_have_panels_of_their_own():
    rows = [*records(reward=float, kl=lambda i: i / 2), evaluation(4, reward=3.5, kl=2.5)]
    top, bottom = plots.reward_and_kl(Evidence(rows)).axes
    assert line(top, 0) == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]) and line(top, 1) == ([4], [3.5])
    assert line(bottom, 0)[1] == [0.5, 1.0, 1.5, 2.0] and line(bottom, 1)[1] == [2.5]
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("score", "nats per response")
    assert title(top) == "Reward" and title(bottom) == "KL from the reference"


def test_every_held_out_point_has_a_bar_of_two_standard_errors():
    rows = [evaluation(0, reward=1.0, reward_std=2.0, kl=0.0), evaluation(4, reward=3.0, reward_std=1.0, kl=1.0)]
    top, bottom = plots.reward_and_kl(Evidence(rows, prompts=16)).axes
    assert bars(top) == pytest.approx([1.0, 0.5])  # 2 * 2 / 4 and 2 * 1 / 4
    assert not bottom.containers[0].has_yerr  # the spread of the KL is unknown
    assert not plots.reward_and_kl(Evidence(rows)).axes[0].containers[0].has_yerr  # and here the number of prompts


def test_scores_against_sqrt_kl_each_in_its_own_unit():
    rows = records(reward=float, kl=lambda i: [4.0, 9.0, -0.01, None][i - 1])
    rows += [evaluation(0, reward=0.5, kl=0.0, judge=0.25, tiny=0.001, judge_std=2.0, tiny_std=0.1)]
    rows += [evaluation(4, reward=1.5, kl=2.25, judge=1.0, tiny=0.002)]
    own, judge, tiny = plots.scores_against_kl(Evidence(rows, labels={"judge": "a second model"})).axes
    assert line(own, 0) == ([2.0, 3.0, 0.0], [1.0, 2.0, 3.0])  # a sampled KL just below 0 counts as 0
    assert line(own, 1) == ([0.0, 1.5], [0.5, 1.5])
    assert line(judge, 0) == ([0.0, 1.5], [0.25, 1.0]) and line(tiny, 0)[1] == [0.001, 0.002]
    assert [title(a) for a in (own, judge, tiny)] == ["Reward", "A second model", "Tiny"]
    assert tiny.get_xlabel() == "√KL per response (√nats)" and labels(own) == ["training prompts", "held-out prompts"]
    low, high = tiny.get_ylim()
    assert low > 0.0005 and high < 0.0025  # the axis fits the numbers


def test_the_way_through_sqrt_kl_has_arrows_and_the_updates_that_can_be_read():
    points = [(0, 0.0, 0.0), (5, 4.0, 1.0), (10, 4.01, 1.01), (15, 9.0, 0.5)]
    rows = [evaluation(step, kl=kl, reward=reward) for step, kl, reward in points]
    (axes,) = plots.scores_against_kl(Evidence(rows)).axes
    arrows = [(a.xyann, a.xy) for a in axes.texts if a.arrow_patch is not None]
    assert [(start[0], end[0]) for start, end in arrows] == [(0.0, 2.0), (2.0, math.sqrt(4.01)), (math.sqrt(4.01), 3.0)]
    assert sorted(int(a.get_text()) for a in axes.texts if a.get_text()) == [0, 10, 15]  # 5 lies under 10


def test_judges_are_gains_in_initial_standard_deviations():
    rows = [
        evaluation(0, reward=1.0, reward_std=2.0, vader=0.1, vader_std=0.5),
        evaluation(9, reward=4.0, reward_std=9.0, vader=0.2, vader_std=9.0),
    ]
    (axes,) = plots.judges(Evidence(rows)).axes
    assert line(axes, 0)[1] == [0.0, 1.5] and line(axes, 1)[1] == pytest.approx([0.0, 0.2])
    for row in rows:
        del row["vader_std"]
    assert plots.judges(Evidence(rows)) is None  # a value without a spread is no judge, unless a label says so
    (axes,) = plots.judges(Evidence(rows, labels={"vader": "VADER"})).axes  # one spread is unknown: all in own units
    assert line(axes, 0)[1] == [0.0, 3.0] and "own units" in axes.get_ylabel()
    assert plots.judges(Evidence([evaluation(0, reward=1.0), evaluation(1, reward=2.0)])) is None


def test_gains_have_bars_of_paired_differences():
    columns = {0: {"reward": np.array([0.0, 2.0])}, 9: {"reward": np.array([1.0, 5.0])}}
    rows = [
        evaluation(0, reward=1.0, reward_std=2.0, judge=0.0, judge_std=1.0),
        evaluation(9, reward=3.0, reward_std=2.0, judge=1.0, judge_std=1.0),
    ]
    (axes,) = plots.judges(Evidence(rows, columns=columns, prompts=2)).axes
    # differences 1 and 3: standard error sqrt(2) / sqrt(2) = 1; twice that, in initial standard deviations of 2
    assert bars(axes, 0) == pytest.approx([0.0, 1.0])
    assert bars(axes, 1) == pytest.approx([0.0, 2.0])  # independent: 2 sqrt(1 + 1) / sqrt(2)


def test_judges_in_their_own_units():
    rows = [evaluation(s, reward=0.0, reward_std=1.0, j=0.1 * s, j_std=0.4) for s in (0, 5)]
    rows[0]["reward/part_std"] = 1.0  # a part of the reward is no judge
    (axes,) = plots.judge_scores(Evidence(rows, prompts=16, labels={"j": "a judge"})).axes
    assert line(axes)[1] == [0.0, 0.5] and bars(axes) == pytest.approx([0.2, 0.2])
    assert title(axes) == "A judge"
    assert plots.judge_scores(Evidence([evaluation(0, reward=1.0, reward_std=1.0)])) is None


def test_distributions_before_and_after():
    columns = {
        0: {"reward": np.array([0.0, 0.0, 1.0, math.nan]), "tokens": np.array([4.0, 4.0, 5.0, 6.0])},
        8: {"reward": np.array([1.0, 2.0, 2.0, 2.0]), "tokens": np.array([9.0, 9.0, 9.0, 10.0])},
    }
    evidence = Evidence(before={"step": 0}, after={"step": 8}, columns=columns)
    (axes,) = plots.distribution(evidence, "reward").axes
    assert labels(axes) == ["update 0", "update 8"]
    assert [line(axes, i)[0] for i in (0, 1)] == [[pytest.approx(1 / 3)] * 2, [1.75] * 2]  # the means
    (axes,) = plots.distribution(evidence, "tokens").axes
    counts = np.histogram(columns[0]["tokens"], plots.bin_edges(np.arange(4.0, 11.0), whole=True))[0]
    assert list(counts) == [2, 1, 1, 0, 0, 0, 0]  # a bin around every whole number
    assert plots.distribution(evidence._replace(columns={0: columns[0]}), "reward") is None
    assert plots.distribution(Evidence(before={"reward": 1.0}, after={"reward": 2.0}), "reward") is None


def test_long_runs_show_a_moving_average_and_say_so():
    top = plots.reward_and_kl(Evidence(records(80, reward=lambda i: float(i % 2)))).axes[0]
    assert len(top.lines) == 2 and top.lines[1].get_label() == "training prompts (mean of 5)"
    assert set(top.lines[0].get_ydata()) == {0.0, 1.0}  # the raw values stay visible
    assert max(top.lines[1].get_ydata()[2:-2]) == pytest.approx(0.6)


def test_very_long_runs_show_a_band_that_hides_no_spike():
    rows = records(3000, reward=lambda i: 50.0 if i == 1234 else float(i % 2))
    top = plots.reward_and_kl(Evidence(rows)).axes[0]
    (band,) = top.collections
    points = band.get_paths()[0].vertices
    assert points[:, 1].max() == 50.0 and points[:, 1].min() == 0.0 and len(points) < 700
    assert len(top.lines[0].get_xdata()) == 300


# -- training batches ---------------------------------------------------------------------------------------------


def test_explained_variance_says_what_it_cuts_off():
    (axes,) = training.explained_variance(records(explained_variance=lambda i: [-50.0, -2.0, 0.1, 0.5][i - 1])).axes
    assert line(axes)[1] == [-1.1, -1.1, 0.1, 0.5] and "2 below" in title(axes)
    assert axes.get_ylim()[0] == pytest.approx(-1.1)


def test_everything_that_is_logged_and_was_asked_for_is_drawn(tmp_path: Path):
    """Names of the pictures, from metrics that all change."""
    names = (
        "reward", "reward_std", "kl", "entropy", "clip_fraction", "value_clip_fraction", "ratio", "ratio_min",
        "ratio_max", "approx_kl", "value_loss", "grad_norm", "learning_rate", "kl_coef", "tokens_per_second", "seconds",
        "rollout_seconds", "reward_seconds", "learn_seconds", "explained_variance", "response_length", "reward/a",
        "reward/b", "invalid_scores",
    )  # fmt: skip
    evidence = Evidence(records(5, **{name: float for name in names}))
    drawn = plots.draw(tmp_path, training.training_pictures(evidence))
    assert [picture.name for picture in drawn] == [
        "explained_variance", "response_length", "reward_parts", "entropy", "reward_std", "clip_fraction", "ratio",
        "approx_kl", "value_loss", "value_clip_fraction", "grad_norm", "kl_coef", "learning_rate", "invalid_scores",
        "tokens_per_second", "seconds",
    ]  # fmt: skip
    assert training.constants(evidence.records) == []


def curves(name: str) -> training.Curves:
    return next(one for one in training.PPO_CURVES if one.name == name)


def test_metrics_that_belong_together_share_a_panel():
    rows = records(ratio=lambda i: 1.0, ratio_min=lambda i: 1 - i / 10, ratio_max=lambda i: 1 + i)
    (axes,) = training.draw_curves(rows, "ppo", curves("ratio"), "PPO update").axes
    assert labels(axes) == ["mean", "smallest", "largest"] and line(axes, 2)[1] == [2.0, 3.0, 4.0, 5.0]


def test_the_first_update_compiles_and_is_left_out_of_the_times():
    rows = records(seconds=lambda i: [90.0, 1.0, 2.0, 1.0][i - 1], learn_seconds=lambda i: i / 4)
    (axes,) = training.draw_curves(rows, "ppo", curves("seconds"), "PPO update").axes
    assert line(axes, 0) == ([2, 3, 4], [1.0, 2.0, 1.0]) and labels(axes) == ["whole update", "learning"]


def test_what_never_changes_is_listed_and_not_drawn():
    rows = records(kl_coef=lambda i: 0.05, learning_rate=lambda i: 1e-3 + 1e-12 * i, entropy=float)
    assert training.constants(rows) == [("KL coefficient", "0.05 score per nat"), ("Learning rate", "0.001")]
    assert training.draw_curves(rows, "ppo", curves("kl_coef"), "") is None
    assert training.draw_curves(rows, "ppo", curves("entropy"), "") is not None


def test_a_stage_on_fixed_data_shows_held_out_data_and_chance(tmp_path: Path):
    rows = records(3, "reward", loss=lambda i: 0.7 - i / 10, accuracy=lambda i: 0.5 + i / 10)
    rows += [{"step": s, "phase": "reward", "heldout_accuracy": 0.5 + s / 20} for s in (0, 3)]
    by_name = {picture.name: picture for picture in training.offline_pictures(rows, "reward", "An X")}
    (loss,), (accuracy,) = by_name["an_x_loss"].make().axes, by_name["an_x_accuracy"].make().axes
    assert math.log(2) in loss.lines[-1].get_ydata() and 0.5 in accuracy.lines[-1].get_ydata()
    assert labels(accuracy) == ["training batches", "chance", "held-out data"]
    assert line(accuracy, 1) == ([0, 3], [0.5, 0.65]) and by_name["an_x_margin"].make() is None
    assert by_name["an_x_loss"].title == "An X: loss" and training.offline_pictures(rows, "reward")[0].title == "Loss"
    (loss,) = next(p for p in training.offline_pictures(records(3, "sft", loss=float), "sft")).make().axes
    assert loss.get_legend() is None  # the loss of language has no level of chance


# -- SVG ----------------------------------------------------------------------------------------------------------


def some_pictures() -> list[plots.Picture]:
    evidence = Evidence([*records(reward=float, kl=float, entropy=float), evaluation(4, reward=1.0, kl=1.0)])
    return [*plots.evaluation_pictures(evidence), *training.training_pictures(evidence)]


def test_pictures_are_svg_that_scales_and_takes_the_colours_of_the_page(tmp_path: Path):
    drawn = plots.draw(tmp_path, some_pictures())
    assert [picture.name for picture in drawn] == ["reward_kl", "reward_sqrt_kl", "entropy"]
    for picture in drawn:
        root = ElementTree.fromstring(picture.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox", "").startswith("0 0 360 ")
        assert root.get("width") is None and root.get("height") is None
        colours = set(re.findall(r"#[0-9a-f]{6}\b", picture.svg))
        assert colours <= drawing.VARIABLES.keys()
        plain = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)|(href=.|url\()#", "", picture.svg)
        assert "#" not in plain, "a colour that the page cannot set"
        texts = [text for node in root.iter() if node.tag.endswith("text") for text in node.itertext()]
        assert "PPO update" in texts or "√KL per response (√nats)" in texts  # letters, not outlines
        assert "DejaVu" not in picture.svg and "<style" not in picture.svg and "<metadata" not in picture.svg


def test_pictures_on_one_page_share_no_ids(tmp_path: Path):
    drawn = plots.draw(tmp_path, some_pictures())
    ids = [node.get("id") for picture in drawn for node in ElementTree.fromstring(picture.svg).iter() if node.get("id")]
    assert len(ids) == len(set(ids)) and ids
    for picture in drawn:
        for used in re.findall(r"(?:href=.|url\()#([\w-]+)", picture.svg):
            assert f'id="{used}"' in picture.svg


def test_a_picture_is_the_same_again_and_lies_beside_the_report(tmp_path: Path):
    first, second = (plots.draw(tmp_path, some_pictures()) for _ in range(2))
    assert first == second
    for picture in first:
        alone = (tmp_path / "plots" / f"{picture.name}.svg").read_text(encoding="utf-8")
        assert alone.startswith('<svg style="background: #ffffff;') and ElementTree.fromstring(alone) is not None


def test_curves_without_numbers_are_not_drawn(tmp_path: Path):
    nothing = Evidence()
    assert plots.draw(tmp_path, [*plots.evaluation_pictures(nothing), *training.training_pictures(nothing)]) == []
    assert not (tmp_path / "plots").exists()
    rows = [{"step": 1, "phase": "ppo", "reward": 1.0, "kl": None, "explained_variance": None, "entropy": 2.0}]
    found = Evidence(rows)
    drawn = plots.draw(tmp_path, [*plots.evaluation_pictures(found), *training.training_pictures(found)])
    assert [picture.name for picture in drawn] == ["reward_kl"]
    assert training.constants(rows) == [("Entropy", "2 nats per token")]
