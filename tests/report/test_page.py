"""report: one page from a run directory; nothing loaded, nothing executed, nothing missing, nothing invented."""

import base64
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ppo_jax.report import page as report
from ppo_jax.runs.output import rundir, writers

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' <img src=http://example.com/x.png>"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, text (but for blanks between tags) and images of a page; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.style = [], [], [], "", ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif data.strip():
            self.text += data


def make_run(tmp_path: Path) -> Path:
    """A short run with everything in it."""
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for step in range(3):
        write(step, "reward", {"loss": 0.7 - step / 10, "accuracy": 0.5 + step / 10})
    for step in range(1, 5):
        write(step, "ppo", {"reward": step, "kl": step, "explained_variance": 0.1, "response_length": 20.0})
    for step in (0, 4):
        scores = {"reward": 0.5 * step, "reward_std": 1.0, "vader": 0.1 * step, "vader_std": 0.4, "kl": step}
        write(step, "eval", scores)
        rundir.write_samples(tmp_path, step, [f"prompt {HOSTILE}"], [f" response {HOSTILE}"], {"reward": [step - 2]})
    (tmp_path / "config.yaml").write_text(f"seed: 0\nnote: {HOSTILE}\n")
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of that run with SUMMARY, parsed."""
    return read(make_run(tmp_path_factory.mktemp("run")), SUMMARY)


SUMMARY: report.Summary = {
    "title": f"Title {HOSTILE}",
    "task": "What was done.",
    "prompts": 64,
    "judges": {"vader": "VADER"},
    "reward_accuracy": 0.771,
    "reference_accuracies": {"one human rater": 0.886, "bag-of-words ridge": 0.728},
    "versions": {"jax": "0.10.2"},
    "machine": "2 cores",
    "seed": 7,
    "seconds": {"ppo": 275.0, "reward model": 60.0},
    "notes": ["A note."],
}


def read(run: Path, summary: report.Summary | None = None) -> Page:
    return Page(report.write(run, summary).read_text(encoding="utf-8"))


def test_page_has_every_part(whole: Page):
    page = whole
    for part in (
        "Reward up 2.0 standard deviations, and an independent judge agrees",
        "of 64 held-out prompts", "this reward model77.1%", "one human rater88.6%", "jax version0.10.2", "seed7",
        "wall time, ppo4:35", "in all5:35", "A note.", "update 0", "update 4", "seed: 0", "What was done.",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("img") == 6  # reward+KL, sqrt KL, judges, explained variance, length, reward model


def test_page_loads_and_runs_nothing(whole: Page):
    page = whole
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 6
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in page.style and "@import" not in page.style


def test_every_text_is_escaped(whole: Page):
    page = whole
    assert page.text.count(HOSTILE) == 2 + 4 + 1  # title twice, two prompts and two responses, config


def test_table_before_and_after(whole: Page):
    page = whole
    # reward 0 -> 2 with an initial spread of 1: +2 standard deviations; VADER 0 -> 0.4 of 0.4: +1
    assert "Reward reward-model score0.00 ± 1.002.00 ± 1.00+2.00+2.00" in page.text
    assert "VADER score0.000 ± 0.4000.400 ± 0.400+0.400+1.00" in page.text
    assert "KL from the reference nats per response0.004.00+4.00" in page.text


def test_summary_beats_the_evaluations_and_is_stored(run: Path):
    summary: report.Summary = {"before": {"reward": 5.0}, "after": {"reward": 4.0}}
    assert "The reward fell" in read(run, summary).text
    assert json.loads((run / "summary.json").read_text()) == summary
    assert "The reward fell" in read(run).text  # made again from summary.json


def test_a_plain_ppo_run_has_a_report(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for step in range(1, 21):
        write(step, "ppo", {"reward": step, "reward_std": 2.0, "kl": 0.5 * step})
    page = read(tmp_path, {})
    # first two updates 1.5, last two 19.5: 18 / 2 = 9 initial standard deviations
    assert "from 1.50 to 19.50, +9.00 standard deviations" in page.text
    assert "first and last 2 updates; no held-out evaluation" in page.text
    assert "held-out prompts" not in page.text and "cannot be told" in page.text
    assert "Samples" not in page.text and "Configuration" not in page.text and "Environment" not in page.text


def test_an_empty_run_has_a_report(tmp_path: Path):
    page = read(tmp_path)
    assert "Too few numbers" in page.text and page.tags.count("img") == 0


def test_nan_everywhere_is_left_out(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for step in (0, 1):
        write(step, "eval", {"reward": float("nan"), "kl": float("inf")})
    rundir.write_samples(tmp_path, 0, ["p"], ["r"], {"reward": [float("nan")]})
    page = read(tmp_path, {})
    assert (
        "Too few numbers" in page.text
        and "nan" not in page.text.split("verdict")[1].lower()
        and "reward –" in page.text
    )


def test_without_matplotlib_the_rest_is_there(run: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = read(run, SUMMARY)
    assert "matplotlib is not installed" in page.text and "Reward up 2.0" in page.text and "img" not in page.tags


def test_many_samples_are_thinned_evenly(tmp_path: Path):
    prompts = [f"p{i}." for i in range(20)]
    for step in range(0, 100, 10):
        rundir.write_samples(tmp_path, step, prompts, ["r"] * 20, {})
    text = read(tmp_path, {}).text
    assert [step for step in range(0, 100, 10) if f"update {step}p" in text] == [0, 30, 60, 90]
    assert "The first 6 of 20 prompts" in text and "p5." in text and "p6." not in text


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (7, [0, 2, 4, 6])])
def test_spread_keeps_first_and_last(count, shown):
    assert report.spread(list(range(count)), 4) == shown


def test_missing_directory(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        report.write(tmp_path / "nowhere", {})


def test_only_scores_are_measured_in_their_own_spread() -> None:
    # The initial policy is the reference: its KL is 0 up to rounding, and so is the spread of that.
    before, after = {"kl": -1e-9, "kl_std": 1e-6}, {"kl": 5.0, "kl_std": 1.0}
    (row,) = report.number_rows(before, after, 64, {})
    assert (row["before"]["mean"], row["change"], row["in_std"]) == ("0.00", "+5.00", "")
