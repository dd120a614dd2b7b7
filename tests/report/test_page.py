"""report: one page from a run directory; nothing loaded, nothing executed, nothing missing, nothing invented."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.report import glance, numbers, stages
from ppo_jax.report import page as report
from ppo_jax.report.evidence import Evidence
from ppo_jax.runs.output import rundir, writers

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' <img src=http://example.com/x.png>"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, text (but for blanks between tags, and pictures) of a page; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.style, self.drawn = [], [], [], "", "", ""
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
        elif "svg" in self.open:
            self.drawn += data
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
    (tmp_path / "config.yaml").write_text(f"seed: 0\nnote: |-\n  {HOSTILE}\n")
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of that run with SUMMARY, parsed."""
    return read(make_run(tmp_path_factory.mktemp("run")), SUMMARY)


FILES = ("metrics.jsonl", "samples.jsonl")
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
        "No check found anything wrong.",
    ):  # fmt: skip
        assert part in page.text, part
    # reward and KL, gains, sqrt KL, VADER's own unit; the reward model's loss and accuracy. The rest never changes
    assert page.tags.count("svg") == 8


def test_training_prompts_are_not_called_held_out(run: Path):
    page = read(run, SUMMARY | {"measured_on": "training prompts"})
    assert "of 64 training prompts" in page.text and "held-out prompts" not in page.text


def test_page_loads_and_runs_nothing(whole: Page):
    page = whole
    assert not {"script", "link", "iframe", "object", "img", "image", "foreignobject"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "srcset", "data", "action")]
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    inside = {value for name, value in page.attributes if name == "id"}
    for link in links:  # to parts of the page, and to the files beside it
        assert link.removeprefix("#") in inside if link.startswith("#") else link in ("config.yaml", "plots", *FILES), (
            link
        )
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in page.style and "@import" not in page.style
    assert all(re.fullmatch(r"url\(#[\w-]+\)", value) for name, value in page.attributes if "url(" in (value or ""))


def test_every_text_is_escaped(whole: Page):
    page = whole
    assert page.text.count(HOSTILE) == 2 + 4 + 1  # title twice, two prompts and two responses, config


def test_names_of_judges_are_escaped_in_pictures_too(run: Path):
    page = read(run, {**SUMMARY, "judges": {"vader": f"${HOSTILE} ☃$"}})
    assert page.drawn.count(HOSTILE) == 3 and "script" not in page.tags and "img" not in page.tags


def test_table_before_and_after(whole: Page):
    page = whole
    # reward 0 -> 2 with an initial spread of 1: +2 standard deviations; VADER 0 -> 0.4 of 0.4: +1
    # errors of independent means over 64 prompts: sqrt(1 + 1) / 8 = 0.18 and sqrt(2) * 0.4 / 8 = 0.071
    assert "Reward reward-model score0.00 ± 1.002.00 ± 1.00+2.00 ± 0.18+2.00" in page.text
    assert "VADER score0.000 ± 0.4000.400 ± 0.400+0.400 ± 0.071+1.00" in page.text
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
    assert "Too few numbers" in page.text and "svg" not in page.tags and "Health" not in page.text


def test_nan_everywhere_is_left_out(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for step in (0, 1):
        write(step, "eval", {"reward": float("nan"), "kl": float("inf")})
    rundir.write_samples(tmp_path, 0, ["p"], ["r"], {"reward": [float("nan")]})
    page = read(tmp_path, {})
    assert (
        "Too few numbers" in page.text
        and "nan" not in page.text.split("verdict")[1].lower()
        and "Reward –" in page.text
    )


def test_without_matplotlib_the_rest_is_there(run: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = read(run, SUMMARY)
    assert "matplotlib is not installed" in page.text and "Reward up 2.0" in page.text and "svg" not in page.tags


def test_many_samples_are_thinned_evenly(tmp_path: Path):
    prompts = [f"p{i}." for i in range(20)]
    for step in range(0, 100, 10):
        rundir.write_samples(tmp_path, step, prompts, ["r"] * 20, {})
    text = read(tmp_path, {}).text
    assert [step for step in range(0, 100, 10) if f"update {step}p" in text] == [0, 30, 60, 90]
    assert "The first 6 of 20 prompts" in text and "p5." in text and "p6." not in text


def test_missing_directory(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        report.write(tmp_path / "nowhere", {})


def test_only_scores_are_measured_in_their_own_spread() -> None:
    # The initial policy is the reference: its KL is 0 up to rounding, and so is the spread of that.
    evidence = Evidence((), {"kl": -1e-9, "kl_std": 1e-6}, {"kl": 5.0, "kl_std": 1.0}, prompts=64)
    (row,) = numbers.score_rows(evidence)
    assert (row["cells"][0][1], row["change"], row["in_std"]) == ("0.00", "+5.00", "")


# -- what a run leaves beside its curves --------------------------------------------------------------------------

CONFIG = """\
model: my/model
reward: [rm]
seed: 3
policy: {kind: lora, rank: 8, layers: 4}
ppo: {group_size: 2, kl: {control: adaptive, place: reward}, sampling: {response_length: 24}}
hyper: {learning_rate: 0.0015, kl_coef: 0.02, temperature: 0.7}
loop: {updates: 10, batch_size: 16, schedule: linear, warmup: 2, best_metric: reward}
"""


def make_whole_run(folder: Path) -> Path:
    """A run in its middle, with everything that a run of today leaves; its best evaluation is not its newest."""
    rng = np.random.default_rng(0)
    write = writers.jsonl_writer(folder / "metrics.jsonl")
    first = rng.normal(size=16)
    for step, gain in ((0, 0.0), (2, 2.0), (4, 1.0)):
        reward = first + gain + 0.1 * rng.normal(size=16)
        columns = {"reward": reward.tolist(), "tokens": [5.0 + step] * 16, "kl": [0.0] * 16}
        texts = [f"p{i}" for i in range(8)]
        rundir.write_evaluation(folder, step, texts, [" r"] * 8, columns, ["reward", "kl"])
        values = {
            "reward": reward.mean(),
            "reward_std": reward.std(ddof=1),
            "kl": 0.5 * step,
            "response_length": 5 + step,
        }
        write(step, "eval", values)
        for i in (step + 1, step + 2):
            write(i, "ppo", {"reward": i / 4, "kl": i / 4, "tokens_per_second": 50.0, "seconds": 2.0, "kl_coef": 0.02})
    (folder / "config.yaml").write_text(CONFIG)
    session = {"started": "2026-11-28T05:40:00+00:00", "machine": "1 x cpu", "versions": {"jax": "9.9"}}
    rundir.add_facts(
        folder,
        held_out=16,
        judges={},
        base="my/model",
        sessions=[session | {"command": "ppo-jax ppo"}, session | {"command": "ppo-jax ppo --resume", "commit": "abc"}],
    )
    (folder / "log.txt").write_text("said")
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(make_whole_run(tmp_path_factory.mktemp("whole")))


def test_a_report_in_the_middle_of_a_run_says_so_and_has_everything_it_needs(middle: Page):
    assert "This run is at update 6 of 10" in middle.text
    for part in (
        "Base modelmy/model", "Rewardrm", "Updates6 of 10", "Batch16 prompts × 2 responses each",
        "Learning rate0.0015, linear, after 2 updates of warm-up", "KL coefficient0.02, adaptive, in the reward",
        "TrainedLoRA of rank 8 on at most the top 4 layers", "Responsesat most 24 tokens, at temperature 0.7",
        "Response tokens seen600", "Held-out prompts16", "Seed3",
        "The same throughoutKL coefficient0.02 score per natSpeed50 response tokens / sTime of an update2 seconds",
        "Commandppo-jax ppo --resume", "Commitabc", "Started2026-11-28 05:40:00+00:00, the first of 2 starts",
        "Machine1 x cpu", "jax version9.9", "of 16 held-out prompts",
    ):  # fmt: skip
        assert part in middle.text, part


def test_the_best_evaluation_has_a_column_and_errors_are_paired(middle: Page):
    assert "beforebest (update 2)after (update 4)changein std" in middle.text
    assert "The best evaluation is that of update 2" in middle.text
    assert "of the differences prompt by prompt (same prompts, same random numbers)" in " ".join(middle.text.split())
    error = float(re.search(r"The change is \+[\d.]+ ± ([\d.]+), the standard error", middle.text)[1])
    assert 0.02 < error < 0.06  # 0.1 sqrt(2) / sqrt(16) = 0.035; independent means would have 0.35


def test_health_links_samples_and_contents(middle: Page):
    assert "Evaluations are on 16 held-out prompts only" in middle.text and "at least 32" in middle.text
    links = [value for name, value in middle.attributes if name == "href"]
    assert {"metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "config.yaml", "log.txt", "run.json"} <= set(links)
    assert {"#verdict", "#health", "#run", "#numbers", "#curves", "#training", "#samples", "#settings"} <= set(links)
    text = " ".join(middle.text.split())
    assert "most changed" in text and "The first 3 of 8 prompts" in text and "a single one may be negative" in text
    assert "Rewards before and after" in text and "Response lengths before and after" in text


def test_one_name_for_one_thing(middle: Page):
    """A sample, the table, the pictures and the screen's words for a judge: the labels of the run."""
    assert "Reward +" in middle.text or "Reward −" in middle.text
    assert not re.search(r"\breward [+−]\d|\bkl [+−]\d|eos_rate|response_length", middle.text.split("Configuration")[0])


OFFLINE = {
    "sft": ({"loss": (3.7, 1.25), "perplexity": (40.1, 3.49)}, "The model writes more like the demonstrations"),
    "dpo": ({"accuracy": (0.5, 0.84), "loss": (0.69, 0.5), "margin": (0.0, 2.5)}, "84% of held-out pairs in the right"),
    "reward": ({"accuracy": (0.51, 0.52)}, "It does not tell good from bad"),
}  # fmt: skip


@pytest.mark.parametrize("phase", OFFLINE)
def test_a_stage_on_fixed_data_has_a_page_like_it(tmp_path: Path, phase: str):
    values, headline = OFFLINE[phase]
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    write(0, phase, {f"heldout_{name}": before for name, (before, _) in values.items()})
    for step in range(1, 4):
        write(step, phase, {"loss": 1.0 / step, "accuracy": 0.5 + step / 10, "learning_rate": 0.1 / step})
    write(3, phase, {f"heldout_{name}": after for name, (_, after) in values.items()})
    table = [{"low": 0.0, "high": 1.5, "pairs": 1200, "predicted": 0.71, "accuracy": 0.65}]
    page = read(tmp_path, {"title": "T", "calibration": table})  # type: ignore[typeddict-item]
    assert headline in page.text and "Before and after" in page.text and page.tags.count("svg") >= 2
    assert ("0.00 to 1.501,20071.0%65.0%" in page.text) == (phase == "reward")
    assert ("is about chance" in page.text) == (phase == "reward")  # the advice; health says it too
    for name, (before, after) in values.items():
        if name == "accuracy":
            assert f"Pairs in the right order %{100 * before:.1f}{100 * after:.1f}" in page.text


@pytest.mark.parametrize("phase", OFFLINE)
def test_a_stage_measured_on_what_it_learned_does_not_call_that_held_out(tmp_path: Path, phase: str):
    values = OFFLINE[phase][0]
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for step, side in ((0, 0), (3, 1)):
        write(step, phase, {"loss": 1.0 - step / 9})
        write(step, phase, {f"heldout_{name}": ends[side] for name, ends in values.items()})
    said = read(tmp_path, {"measured_on": "training demonstrations"}).text
    assert re.search("training (demonstrations|pairs)", said)
    assert "held-out" not in (tmp_path / "report.html").read_text(encoding="utf-8").lower()  # nor in a picture


def test_a_run_of_before_reports_still(tmp_path: Path):
    """No run.json, no evaluations.jsonl, no log.txt; a summary with the keys of that time."""
    page = read(make_run(tmp_path), {"before": {"reward": 0.0}, "after": {"reward": 2.0}, "prompts": 64})
    assert "Reward up 2.0" in page.text and "Command" not in page.text and "run.json" not in page.text


def test_a_base_in_the_cache_is_called_by_its_files_name():
    def name(facts: dict[str, str], **settings: str) -> str:
        return dict(glance.key_settings(settings, facts, [], "sft"))["Base model"]

    assert name({"base": "/home/ada/cache/small.gguf"}) == "small.gguf"
    assert name({"base": "my/model"}) == "my/model"
    assert name({"base": "/somewhere/else"}, model="runs/sft/export/model") == "runs/sft/export/model"


def test_a_loss_that_hardly_moved_is_no_success():
    def verdict(last: float) -> str:
        ends = [{"heldout_loss": loss, "heldout_perplexity": float(np.exp(loss))} for loss in (1.227, last)]
        found = stages.judge_stage([{"step": i, "phase": "sft", **end} for i, end in enumerate(ends)], "sft")
        assert found is not None
        return found.headline

    assert verdict(1.226) == "The model hardly changed on held-out demonstrations"
    assert verdict(1.1) == "The model writes more like the demonstrations"
    assert verdict(1.3) == "The model became worse on held-out demonstrations"
