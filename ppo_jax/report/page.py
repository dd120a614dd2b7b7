"""One self-contained report.html for a run: verdict, numbers, curves, samples, configuration.

    report.write(run_dir, {"title": "...", "before": {...}, "after": {...}, "seed": 0})

The page loads nothing, runs no script and escapes every text (a policy may well write HTML).
"""

import base64
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ppo_jax.data.disk import replace_file
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.report import plots, verdict
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import clock_time

SAMPLE_PROMPTS, SAMPLE_STEPS = 6, 4  # shown at most


class Summary(TypedDict, total=False):
    """What an experiment knows beyond its files. Every key may be missing; its part is then left out."""

    title: str
    task: str  # what was trained on what, in a sentence or two
    before: Mapping[str, float]  # scores of the initial policy on the held-out prompts; names as in phase "eval":
    after: Mapping[str, float]  # ... of the final one: reward and judges (each with _std), kl, kl_per_token,
    #   response_length, eos_rate. Without them: first and last "eval" line, else ends of the "ppo" curve
    prompts: int  # number of held-out prompts behind `before` and `after`
    measured_on: str  # "training prompts" where there were too few to hold any out; by default "held-out prompts"
    kl_budget: float  # nats per response that were allowed
    reward_accuracy: float  # held-out pairwise accuracy of the reward model that was optimised
    judges: Mapping[str, str]  # name of a judge -> what readers are shown
    judge_accuracy: float  # ... of the second one, the judge
    reference_accuracies: Mapping[str, float]  # floors and ceilings on the same pairs: label -> accuracy
    reward_accuracy_note: str  # which pairs
    seconds: Mapping[str, float]  # wall time of each phase
    versions: Mapping[str, str]
    machine: str
    seed: int
    date: str
    notes: Sequence[str]


# name: label, unit, format, factor. The spread <name>_std is shown with its score.
MEASURES = {
    "reward": ("Reward", "reward-model score", "{:.2f}", 1),
    "kl": ("KL from the reference", "nats per response", "{:.2f}", 1),
    "kl_per_token": ("KL from the reference", "nats per token", "{:.3f}", 1),
    "entropy": ("Entropy", "nats per token", "{:.2f}", 1),
    "response_length": ("Response length", "tokens", "{:.1f}", 1),
    "eos_rate": ("Responses that end by themselves", "% with EOS", "{:.1f}", 100),
}


def write(run_dir: str | os.PathLike, summary: Summary | None = None) -> Path:
    """Writes summary.json, plots/*.png and report.html into the run directory; returns the path of the report.

    Without `summary` the stored summary.json is used, so that a report can be made again. Whatever the run lacks
    is left out; without matplotlib the curves are, and the page says so. Raises FileNotFoundError when there is no
    run directory, ValueError for a metrics.jsonl or samples.jsonl that is damaged before its last line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run directory")
    if summary is None:
        summary = rundir.read_summary(run_dir)  # type: ignore[assignment]
    else:
        rundir.write_summary(run_dir, summary)
    path = run_dir / rundir.REPORT
    replace_file(path, page(run_dir, summary or {}).encode("utf-8", "replace"))
    return path


def page(run_dir: Path, summary: Summary) -> str:
    """The HTML text of the report."""
    records = read_jsonl(run_dir / rundir.METRICS)
    before, after, source = scores_before_after(summary, records)
    held_out = source is None or source == HELD_OUT
    count = summary.get("prompts") if held_out else None
    labels = summary.get("judges", {})
    accuracy = summary.get("reward_accuracy")
    what = summary.get("measured_on", "held-out prompts")
    found = verdict.judge(before, after, records, count, summary.get("kl_budget"), accuracy, labels, what)
    title = summary.get("title") or f"Run {run_dir.resolve().name}"
    sections = [
        _verdict(found, source),
        _numbers(before, after, count, labels, what),
        _accuracies(summary),
        _curves(run_dir, labels, what),
        _samples(read_jsonl(run_dir / rundir.SAMPLES)),
        _environment(summary, records),
        _config(run_dir),
    ]
    task = f"<p class='task'>{_text(summary['task'])}</p>" if summary.get("task") else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{_text(title)}</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{_text(title)}</h1>{task}</header>" + "".join(sections) + "</main></body></html>\n"
    )


HELD_OUT = "the first and the last evaluation"


def scores_before_after(
    summary: Summary, records: plots.Records
) -> tuple[Mapping[str, Any], Mapping[str, Any], str | None]:
    """Scores of the initial and of the final policy, and where they come from (None: the summary).

    In this order: the summary; the first and last record of phase "eval"; the mean of the first and of the last
    tenth of phase "ppo".
    """
    if summary.get("before") and summary.get("after"):
        return summary["before"], summary["after"], None
    evaluations = [r for r in records if r.get("phase") == "eval"]
    if len(evaluations) > 1:
        return evaluations[0], evaluations[-1], HELD_OUT
    updates = [r for r in records if r.get("phase") == "ppo"]
    if len(updates) < 2:
        return {}, {}, None
    tenth = max(1, len(updates) // 10)
    first, last = updates[:tenth], updates[-tenth:]
    names = [name for name in MEASURES if all(verdict.number(r, name) is not None for r in first + last)]
    before, after = ({name: sum(r[name] for r in part) / tenth for name in names} for part in (first, last))
    if (spread := verdict.number(updates[0], "reward_std")) is not None:
        before["reward_std"] = spread
    updates_text = "update" if tenth == 1 else f"{tenth} updates"
    return before, after, f"the training batches of the first and last {updates_text}; no held-out evaluation"


# -- sections --------------------------------------------------------------------------------------------------------


def _verdict(found: verdict.Verdict | None, source: str | None) -> str:
    if found is None:
        return "<section class='verdict'><p>Too few numbers for a verdict: no reward before and after.</p></section>"
    note = f"<p class='note'>Before and after are {_text(source)}.</p>" if source else ""
    return (
        f"<section class='verdict'><p class='headline'>{_text(_minus(found.headline))}</p>"
        f"<p>{_text(_minus(found.text))}</p>{note}</section>"
    )


def _numbers(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    count: int | None,
    labels: plots.Labels,
    what: str = "held-out prompts",
) -> str:
    """Table of the scores before and after, with units."""
    rows = []
    judges = {name: (_text(labels.get(name, name)), "score", "{:.3f}", 1) for name in _judges(before, after, labels)}
    measures = {"reward": MEASURES["reward"], **judges, **MEASURES}
    for name, (label, unit, form, factor) in measures.items():
        found = verdict.gain(before, after, name, count)
        if found is None:
            continue
        cells = [_value(values, name, form, factor) for values in (before, after)]
        change = _minus(form.replace("{:", "{:+").format(found.change * factor))
        in_std = _minus(f"{found.in_std:+.2f}") if found.in_std is not None and name in ("reward", *judges) else ""
        rows.append(
            f"<tr><th scope='row'>{label} <span class='unit'>{unit}</span></th>"
            f"<td>{cells[0]}</td><td>{cells[1]}</td><td>{change}</td><td>{in_std}</td></tr>"
        )
    if not rows:
        return ""
    prompts = f"Mean over {count} {what}" if count else "Mean"
    return (
        "<section><h2>Before and after</h2><div class='scroll'><table class='numbers'><thead>"
        "<tr><th></th><th>before</th><th>after</th><th>change</th><th>in std</th></tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table></div>"
        f"<p class='note'>{prompts}; ± is the standard deviation between responses, and “in std” the change in "
        "standard deviations of the initial policy.</p></section>"
    )


def _accuracies(summary: Summary) -> str:
    """The reward model beside floors and ceilings, best first, as bars from chance (50%) to 100%."""
    rows = [(value, label, False) for label, value in summary.get("reference_accuracies", {}).items()]
    if summary.get("reward_accuracy") is not None:
        rows.append((summary["reward_accuracy"], "this reward model", True))
    if summary.get("judge_accuracy") is not None:
        rows.append((summary["judge_accuracy"], "the second reward model (judge)", False))
    if not rows:
        return ""
    body = "".join(
        f"<tr{' class=own' if own else ''}><th scope='row'>{_text(label)}</th><td>{value:.1%}</td>"
        f"<td class='bar'><span style='width:{max(0.0, min(1.0, 2 * value - 1)):.1%}'></span></td></tr>"
        for value, label, own in sorted(rows, key=lambda row: -row[0])
    )
    note = _text(summary.get("reward_accuracy_note", "held-out pairs"))
    return (
        f"<section><h2>How good is the reward model?</h2><table class='accuracies'>{body}</table>"
        "<p class='note'>Pairs put in the same order as by people. Bars start at chance, 50%. "
        f"Measured on {note}.</p>"
        "</section>"
    )


def _judges(before: Mapping[str, Any], after: Mapping[str, Any], labels: plots.Labels) -> list[str]:
    return plots.judge_names({*before, *after}, labels)


def _curves(run_dir: Path, labels: plots.Labels, what: str) -> str:
    try:
        drawn = plots.draw(run_dir, labels, what)
    except ImportError:
        return "<section><h2>Curves</h2><p class='note'>Left out: matplotlib is not installed.</p></section>"
    figures = "".join(
        f"<figure{' class=wide' if plot.path.stem == 'diagnostics' else ''}><img alt='{_text(plot.title)}' "
        f"src='data:image/png;base64,{base64.b64encode(plot.path.read_bytes()).decode()}'>"
        f"<figcaption>{_text(plot.caption)}</figcaption></figure>"
        for plot in drawn
    )
    return f"<section><h2>Curves</h2><div class='figures'>{figures}</div></section>" if drawn else ""


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The same prompts at several points of training, one card per prompt."""
    steps = spread(sorted({sample["step"] for sample in samples}), SAMPLE_STEPS)
    by_index: dict[int, dict[int, Mapping[str, Any]]] = {}
    for sample in samples:
        by_index.setdefault(sample["index"], {})[sample["step"]] = sample
    shown = sorted(by_index)[:SAMPLE_PROMPTS]
    if not shown:
        return ""
    cards = "".join(
        "<div class='card'>" + "".join(_sample(by_index[i][step]) for step in steps if step in by_index[i]) + "</div>"
        for i in shown
    )
    many = f"The first {len(shown)} of {len(by_index)} prompts" if len(by_index) > len(shown) else "All prompts"
    return (
        f"<section><h2>Samples</h2><p class='note'>{many}, not selected, at the same points of training. "
        f"<span class='prompt'>The prompt is grey,</span> <span class='response'>the policy wrote the rest.</span></p>"
        f"<div class='samples'>{cards}</div></section>"
    )


def _sample(sample: Mapping[str, Any]) -> str:
    scores = "".join(
        f"<span><i>{_text(name)}</i> {_signed(value)}</span>" for name, value in sample.get("scores", {}).items()
    )
    return (
        f"<div class='sample'><div class='step'>update {sample['step']}</div><p><span class='prompt'>"
        f"{_text(sample['prompt'])}</span><span class='response'>{_text(sample['response'])}</span></p>"
        f"<div class='scores'>{scores}</div></div>"
    )


def _environment(summary: Summary, records: plots.Records) -> str:
    facts: dict[str, str] = {key: str(summary[key]) for key in ("date", "machine", "seed") if key in summary}
    facts.update({f"{name} version": version for name, version in summary.get("versions", {}).items()})
    seconds = summary.get("seconds", {})
    times = {**seconds, "in all": sum(seconds.values())} if len(seconds) > 1 else seconds
    facts.update({f"wall time, {phase}": f"{clock_time(value)} (m:ss)" for phase, value in times.items()})
    _, rates = plots.series(records, "ppo", "tokens_per_second")
    if rates:
        facts["PPO throughput, median"] = f"{sorted(rates)[len(rates) // 2]:,.0f} tokens/s"
    notes = "".join(f"<li>{_text(note)}</li>" for note in summary.get("notes", ()))
    if not facts and not notes:
        return ""
    rows = "".join(f"<tr><th scope='row'>{_text(name)}</th><td>{_text(fact)}</td></tr>" for name, fact in facts.items())
    return (
        "<section><h2>Environment</h2>"
        + (f"<table class='facts'>{rows}</table>" if rows else "")
        + (f"<ul>{notes}</ul>" if notes else "")
        + "</section>"
    )


def _config(run_dir: Path) -> str:
    path = run_dir / rundir.CONFIG
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return (
        f"<section><h2>Configuration</h2><details><summary>{rundir.CONFIG}: everything needed to repeat the run"
        f"</summary><pre>{_text(text)}</pre></details></section>"
    )


# -- parts -----------------------------------------------------------------------------------------------------------


def spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, the first and the last among them, evenly apart."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _value(values: Mapping[str, Any], name: str, form: str, factor: float) -> str:
    text = form.format(float(values[name]) * factor)
    deviation = verdict.number(values, f"{name}_std")
    around = f" <span class='unit'>± {form.format(deviation * factor)}</span>" if deviation is not None else ""
    return _minus(text) + around


def _signed(value: float | None) -> str:
    if value is None or not math.isfinite(float(value)):
        return "–"
    return _minus(f"{float(value):+.2f}")


def _minus(text: str) -> str:
    """The text with a real minus before numbers, and none before a zero."""
    return re.sub(r"-(?=\d)", "−", re.sub(r"-(?=0(\.0*)?%?$)", "", text))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


CSS = """
:root { color-scheme: light; --ink: #22262b; --soft: #626973; --line: #e3e6ea; --blue: #2b5f8f; --pale: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
section { margin-top: 2.6rem; }
p { margin: 0 0 .7rem; max-width: 46rem; }
.task, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .86rem; }
.note { margin-top: .6rem; }
.verdict { background: var(--pale); border-left: 4px solid var(--blue); margin-top: 1.6rem; max-width: 54rem; }
.verdict { padding: 1.1rem 1.4rem .5rem; }
.verdict p { max-width: none; }
.headline { font-size: 1.25rem; font-weight: 650; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: .84rem; }
.numbers { width: 100%; max-width: 54rem; }
.numbers td, .numbers thead th { text-align: right; padding: .42rem 0 .42rem 1rem; white-space: nowrap; }
.unit { color: var(--soft); font-size: .84rem; }
.accuracies { width: 100%; max-width: 44rem; }
.accuracies td { text-align: right; }
.accuracies .bar { width: 45%; padding-right: 0; }
.bar span { display: block; height: .7rem; background: #c3c9d0; border-radius: 2px; }
.own th, .own td { font-weight: 650; }
.own .bar span { background: var(--blue); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 2rem 1.6rem; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; }
.wide img { min-width: 44rem; }
img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .35rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .2rem 1rem; margin-bottom: 1rem; }
.sample { display: grid; grid-template-columns: 5.5rem 1fr 7.2rem; gap: 0 1rem; padding: .6rem 0; }
.sample + .sample { border-top: 1px solid var(--line); }
.sample p { margin: 0; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; }
.step, .scores { color: var(--soft); font-size: .84rem; line-height: 1.85; font-variant-numeric: tabular-nums; }
.scores span { display: flex; justify-content: space-between; line-height: 1.5; color: var(--ink); }
.scores i { font-style: normal; color: var(--soft); }
.prompt { color: #7b828b; }
.response { color: var(--ink); background: #eef4fa; border-radius: 3px; box-decoration-break: clone; padding: .06em 0; }
pre { background: var(--pale); padding: 1rem; overflow-x: auto; font-size: .84rem; line-height: 1.45; }
summary { cursor: pointer; color: var(--blue); }
@media (max-width: 42rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .numbers td, .numbers thead th { padding-left: .5rem; }
  .numbers td .unit { display: block; }
  .sample { grid-template-columns: 1fr; }
  .scores { display: flex; gap: 1.2rem; }
  .scores span { gap: .4rem; }
}
@media print { .card, figure { break-inside: avoid; } main { padding: 0; } }
"""
