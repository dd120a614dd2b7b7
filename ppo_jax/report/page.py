"""One self-contained report.html for a run: verdict, health, settings, numbers, curves, samples.

    page.write(run_dir, {"title": "...", "before": {...}, "after": {...}, "seed": 0})

The page (page.html, page.css) loads nothing, runs no script and escapes every text. Here its numbers are gathered, from
what the run directory holds by now: a run that goes on, or was stopped, has a report too.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ppo_jax.data.disk import replace_file
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.report import glance, numbers, stages, training, verdict
from ppo_jax.report.evidence import Evidence, read_columns, scores_before_after
from ppo_jax.report.plots import Drawn, Picture, draw, evaluation_pictures
from ppo_jax.report.samples import sample_cards
from ppo_jax.report.templates import render
from ppo_jax.runs.health import examine, known_from
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.series import EVALUATED, Records


class Summary(TypedDict, total=False):
    """What an experiment knows beyond its files. Every key may be missing; its part is then left out."""

    title: str
    task: str  # what was trained on what, in a sentence or two
    before: Mapping[str, float]  # scores of the initial policy on the held-out prompts; names as in phase "eval":
    after: Mapping[str, float]  # ... of the final one: reward and judges (each with _std), kl, kl_per_token,
    #   response_length, eos_rate. Without them: first and last "eval" line, else ends of the "ppo" curve
    prompts: int  # number of prompts behind `before` and `after`
    measured_on: str  # "training prompts" (demonstrations, pairs) where there were too few to hold any out; by default
    #   "held-out prompts"
    kl_budget: float  # nats per response that were allowed
    reward_accuracy: float  # held-out pairwise accuracy of the reward model that was optimised
    raters: str  # who put those pairs in order, as in "orders 77 % of them as people did"
    judges: Mapping[str, str]  # name of a judge -> what readers are shown
    judge_accuracy: float  # ... of the second one, the judge
    reference_accuracies: Mapping[str, float]  # floors and ceilings on the same pairs: label -> accuracy
    reward_accuracy_note: str  # which pairs
    calibration: Sequence[Mapping[str, float]]  # of a reward model: `train.calibration.Bucket` as a mapping
    seconds: Mapping[str, float]  # wall time of each phase
    versions: Mapping[str, str]
    machine: str
    seed: int
    date: str
    notes: Sequence[str]


def write(run_dir: str | os.PathLike, summary: Summary | None = None) -> Path:
    """Writes summary.json, plots/*.svg and report.html into the run directory; returns the path of the report.

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
    records, facts = read_jsonl(run_dir / rundir.METRICS), rundir.read_facts(run_dir)
    config, settings = glance.read_settings(run_dir)
    phase = stages.phase_of(records)
    samples = read_jsonl(run_dir / rundir.SAMPLES)
    evidence = evidence_of(run_dir, summary, facts, settings, records)
    kind = evidence.measured_on.split()[0]  # "held-out", or "training"
    told = facts | {name: value for name, value in summary.items() if value is not None}
    about = {"held_out": evidence.prompts, "measured_on": evidence.measured_on}
    ppo = _ppo_parts(run_dir, evidence) if phase == "ppo" else _stage_parts(run_dir, summary, records, phase, kind)
    cards = sample_cards(samples, evidence.labels)
    return {
        "title": summary.get("title") or f"Run {run_dir.resolve().name}",
        "task": summary.get("task"),
        "status": _status(records, settings) if phase == "ppo" else "",
        "findings": examine(records, known_from(told | about)),
        "checked": bool(records),
        "settings": glance.key_settings(settings, facts | about, records, phase),
        "provenance": glance.provenance(facts, summary, records),
        "links": glance.links(run_dir),
        "accuracies": numbers.accuracy_bars(summary),
        "pairs": summary.get("reward_accuracy_note", "held-out pairs" if phase == "ppo" else f"{kind} pairs"),
        "raters": evidence.raters,
        "samples": cards,
        "all_samples": len({sample["index"] for sample in samples}),
        "kl_of_a_sample": any("kl" in sample.get("scores", {}) for sample in samples),
        "environment": glance.environment_rows(facts, summary, records),
        "notes": summary.get("notes", ()),
        "config": config,
        **ppo,
    }


def evidence_of(
    run_dir: Path, summary: Summary, facts: Mapping[str, Any], settings: Mapping[str, Any], records: Records
) -> Evidence:
    """What the numbers, curves and verdict are made from."""
    before, after, source = scores_before_after(summary, records)
    columns = read_columns(run_dir)
    counts = {len(column) for scores in columns.values() for column in scores.values()}
    known = summary.get("prompts") or facts.get("held_out") or (counts.pop() if len(counts) == 1 else None)
    accuracy = summary.get("reward_accuracy")
    return Evidence(
        records=records,
        before=before,
        after=after,
        source=source,
        prompts=known,
        columns=columns,
        measured_on=summary.get("measured_on") or facts.get("measured_on") or EVALUATED,
        labels=summary.get("judges") or facts.get("judges") or {},
        best_metric=glance.at(settings, "loop", "best_metric") or "reward",
        kl_budget=summary.get("kl_budget"),
        reward_accuracy=facts.get("reward_accuracy") if accuracy is None else accuracy,
        raters=summary.get("raters", Evidence().raters),
        pairs="training pairs" if summary.get("reward_accuracy_note") == "training pairs" else Evidence().pairs,
    )


def _status(records: Records, settings: Mapping[str, Any]) -> str:
    """Says of a run that has not reached its end how far it is."""
    planned = glance.planned_updates(settings)
    done = max((r["step"] for r in records if r.get("phase") == "ppo"), default=0)
    if planned is None or done >= planned:
        return ""
    return (
        f"This run is at update {done} of {planned}: it goes on, or was stopped. What follows is what there is so far."
    )


def _ppo_parts(run_dir: Path, evidence: Evidence) -> dict[str, Any]:
    main, small = evaluation_pictures(evidence), training.training_pictures(evidence)
    # Where the reward model was trained in the same run directory, its curves come last.
    small += training.offline_pictures(evidence.records, "reward", "Reward model")
    columns = numbers.score_columns(evidence)
    return {
        "verdict": verdict.judge(evidence),
        "nothing": "Too few numbers for a verdict: no reward before and after.",
        "source": evidence.source,
        "rows": numbers.score_rows(evidence),
        "headings": [heading for heading, _ in columns],
        "prompts": f"{evidence.prompts} {evidence.measured_on}" if evidence.prompts and evidence.held_out else "",
        "paired": numbers.is_paired(evidence),
        "calibration": [],
        "constants": training.constants(evidence.records),
        **_draw(run_dir, main, small),
    }


def _stage_parts(run_dir: Path, summary: Summary, records: Records, phase: str, kind: str) -> dict[str, Any]:
    return {
        "verdict": stages.judge_stage(records, phase, kind),
        "nothing": "Too few numbers for a verdict: there is no evaluation.",
        "source": None,
        "rows": numbers.held_out_rows(records, phase),
        "headings": ["before", "after"],
        "prompts": "",
        "paired": False,
        "calibration": stages.calibration_rows(run_dir, summary) if phase == "reward" else [],
        "constants": training.constants(records, phase),
        **_draw(run_dir, [], training.offline_pictures(records, phase, kind=kind)),
    }


def _draw(run_dir: Path, main: Sequence[Picture], small: Sequence[Picture]) -> dict[str, list[Drawn] | None]:
    """The drawn pictures; None without matplotlib."""
    try:
        drawn = draw(run_dir, [*main, *small])
    except ImportError:
        return {"pictures": None, "panels": None}
    names = {picture.name for picture in main}
    return {"pictures": [p for p in drawn if p.name in names], "panels": [p for p in drawn if p.name not in names]}
