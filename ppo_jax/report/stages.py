"""What is said of a stage that trains on fixed data: supervised fine-tuning, DPO, a reward model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.models.files.artifacts import EXPORT, REWARD
from ppo_jax.report.verdict import Verdict
from ppo_jax.runs.output.series import Records, finite

UNCHANGED = 0.005  # of the loss: a change below this says nothing
NAMES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "Direct preference optimisation"}


def phase_of(records: Records) -> str:
    """What kind of run these are the records of: ppo where there is any of that, else the stage that came last."""
    phases = [record.get("phase") for record in records]
    if not phases or {"ppo", "eval"} & {*phases}:
        return "ppo"
    return next((phase for phase in reversed(phases) if phase in NAMES), "ppo")


def judge_stage(records: Records, phase: str, kind: str = "held-out") -> Verdict | None:
    """The verdict from the evaluations of the stage, on data of this kind; None where it measured nothing."""
    found = {name: _ends(records, phase, f"heldout_{name}") for name in ("loss", "perplexity", "accuracy", "margin")}
    if phase == "sft" and found["perplexity"] and found["loss"]:
        return _judge_sft(kind, *found["perplexity"], *found["loss"])
    if phase in ("reward", "dpo") and found["accuracy"]:
        training = _ends(records, phase, "accuracy")
        return _judge_pairs(phase, kind, *found["accuracy"], training and training[1])
    return None


def _ends(records: Records, phase: str, name: str) -> tuple[float, float] | None:
    values = [v for r in records if r.get("phase") == phase and (v := finite(r, name)) is not None]
    return (values[0], values[-1]) if values else None


def _judge_sft(kind: str, before: float, after: float, loss_before: float, loss_after: float) -> Verdict:
    text = (
        f"The perplexity of {kind} demonstrations went from {before:.2f} to {after:.2f}, their loss from "
        f"{loss_before:.3f} to {loss_after:.3f} nats per token."
    )
    if abs(loss_after - loss_before) < UNCHANGED * loss_before:
        more = "Raise --sft.learning-rate, or train for longer (--sft.epochs)."
        return Verdict(f"The model hardly changed on {kind} demonstrations", text, (more,))
    if after < before:
        return Verdict("The model writes more like the demonstrations", text)
    return Verdict(
        f"The model became worse on {kind} demonstrations",
        text,
        ("Train for fewer epochs (--sft.epochs), or lower --sft.learning-rate; the loss below shows where it turns.",),
    )


def _judge_pairs(phase: str, kind: str, before: float, after: float, training: float | None) -> Verdict:
    who = "The reward model" if phase == "reward" else "The policy, as its own reward model,"
    text = f"{who} puts {after:.1%} of {kind} pairs in the order of their labels"
    text += f" ({before:.1%} before training)." if before != after else "."
    advice: list[str] = []
    if training is not None and training - after > 0.15:
        text += f" Of the training pairs it is {training:.1%}: much of what was learned is particular to them."
        advice.append(f"Give it more pairs, or train less: --{phase}.epochs, --{phase}.learning-rate.")
    if after <= 0.55:
        advice.append("This is about chance: check that the better response really is the first of each pair.")
        return Verdict("It does not tell good from bad", text, tuple(advice))
    return Verdict(f"{after:.0%} of {kind} pairs in the right order", text, tuple(advice))


def calibration_rows(run_dir: Path, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """How often the reward model is right where it is so sure: from the summary, or from its artifact."""
    table = summary.get("calibration")
    file = run_dir / EXPORT / REWARD / "artifact.json"
    if table is None and file.exists():
        table = json.loads(file.read_text(encoding="utf-8")).get("meta", {}).get("calibration")
    return [
        {
            "range": f"{row['low']:.2f} to {row['high']:.2f}",
            "pairs": f"{row['pairs']:,}",
            "predicted": f"{row['predicted']:.1%}",
            "accuracy": f"{row['accuracy']:.1%}",
        }
        for row in table or ()
    ]
