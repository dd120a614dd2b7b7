"""One self-contained report.html for a run: verdict, numbers, curves, samples, configuration.

    page.write(run_dir, {"title": "...", "before": {...}, "after": {...}, "seed": 0})

The page (page.html, page.css) loads nothing, runs no script and escapes every text. Here its numbers are gathered.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ppo_jax.data.disk import replace_file
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.report import plots, verdict
from ppo_jax.report.series import Labels, Records, judge_names, series
from ppo_jax.report.templates import real_minus, render
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
    text = render("page.html", **gather(run_dir, summary or {}))
    replace_file(path, text.encode("utf-8", "replace"))
    return path


def gather(run_dir: Path, summary: Summary) -> dict[str, Any]:
    """What the page shows, by its name in page.html."""
    records = read_jsonl(run_dir / rundir.METRICS)
    before, after, source = scores_before_after(summary, records)
    count = summary.get("prompts") if source in (None, HELD_OUT) else None
    labels = summary.get("judges", {})
    accuracy = summary.get("reward_accuracy")
    samples = read_jsonl(run_dir / rundir.SAMPLES)
    config = run_dir / rundir.CONFIG
    return {
        "title": summary.get("title") or f"Run {run_dir.resolve().name}",
        "task": summary.get("task"),
        "verdict": verdict.judge(before, after, records, count, summary.get("kl_budget"), accuracy, labels),
        "source": source,
        "rows": number_rows(before, after, count, labels),
        "prompts": count,
        "accuracies": accuracy_bars(summary),
        "pairs": summary.get("reward_accuracy_note", "held-out pairs"),
        "plots": curve_pictures(run_dir, labels),
        "samples": sample_cards(samples),
        "all_samples": len({sample["index"] for sample in samples}),
        "facts": environment_facts(summary, records),
        "notes": summary.get("notes", ()),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
    }


HELD_OUT = "the first and the last evaluation"


def scores_before_after(summary: Summary, records: Records) -> tuple[Mapping[str, Any], Mapping[str, Any], str | None]:
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


def number_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], count: int | None, labels: Labels
) -> list[dict[str, Any]]:
    """The scores before and after, with units; only rewards and judges are measured in their own spread."""
    judges = {name: (labels.get(name, name), "score", "{:.3f}", 1) for name in judge_names({*before, *after}, labels)}
    measures = {"reward": MEASURES["reward"], **judges, **MEASURES}
    rows = []
    for name, (label, unit, form, factor) in measures.items():
        found = verdict.gain(before, after, name, count)
        if found is None:
            continue
        spreads = [verdict.number(values, f"{name}_std") for values in (before, after)]
        first, last = (
            {
                "mean": real_minus(form.format(mean * factor)),
                "spread": None if spread is None else form.format(spread * factor),
            }
            for mean, spread in zip((found.before, found.after), spreads, strict=True)
        )
        scored = found.in_std is not None and name in ("reward", *judges)
        change = real_minus(form.replace("{:", "{:+").format(found.change * factor))
        in_std = real_minus(f"{found.in_std:+.2f}") if scored else ""
        rows.append({"label": label, "unit": unit, "before": first, "after": last, "change": change, "in_std": in_std})
    return rows


def accuracy_bars(summary: Summary) -> list[tuple[str, float, bool]]:
    """(label, accuracy, whether it is the model that was optimised): it beside floors and ceilings, best first."""
    rows = [(label, value, False) for label, value in summary.get("reference_accuracies", {}).items()]
    if summary.get("reward_accuracy") is not None:
        rows.append(("this reward model", summary["reward_accuracy"], True))
    if summary.get("judge_accuracy") is not None:
        rows.append(("the second reward model (judge)", summary["judge_accuracy"], False))
    return sorted(rows, key=lambda row: -row[1])


def curve_pictures(run_dir: Path, labels: Labels) -> list[dict[str, Any]] | None:
    """The curves as bytes in base64; None without matplotlib."""
    try:
        drawn = plots.draw(run_dir, labels)
    except ImportError:
        return None
    return [
        {
            "title": plot.title,
            "caption": plot.caption,
            "wide": plot.path.stem == "diagnostics",
            "data": base64.b64encode(plot.path.read_bytes()).decode(),
        }
        for plot in drawn
    ]


def sample_cards(samples: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The same prompts at several points of training, a list of samples for each of the first prompts."""
    steps = spread(sorted({sample["step"] for sample in samples}), SAMPLE_STEPS)
    by_index: dict[int, dict[int, Mapping[str, Any]]] = {}
    for sample in samples:
        by_index.setdefault(sample["index"], {})[sample["step"]] = sample
    shown = sorted(by_index)[:SAMPLE_PROMPTS]
    return [[by_index[index][step] for step in steps if step in by_index[index]] for index in shown]


def environment_facts(summary: Summary, records: Records) -> dict[str, str]:
    """Where, when and how fast it ran."""
    facts: dict[str, str] = {key: str(summary[key]) for key in ("date", "machine", "seed") if key in summary}
    facts.update({f"{name} version": version for name, version in summary.get("versions", {}).items()})
    seconds = summary.get("seconds", {})
    times = {**seconds, "in all": sum(seconds.values())} if len(seconds) > 1 else seconds
    facts.update({f"wall time, {phase}": f"{clock_time(value)} (m:ss)" for phase, value in times.items()})
    _, rates = series(records, "ppo", "tokens_per_second")
    if rates:
        facts["PPO throughput, median"] = f"{sorted(rates)[len(rates) // 2]:,.0f} tokens/s"
    return facts


def spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, the first and the last among them, evenly apart."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
