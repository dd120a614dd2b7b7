"""One PPO file of LLaMA-Factory in both programs: the rewards of every update, and both curves in one picture.

    python make_llamafactory_ppo.py record FILE.yaml OUT.json

runs the file where LLaMA-Factory 0.9.3 is installed, and writes mean and standard error of each update's rewards. Then

    ppo-jax llamafactory FILE.yaml --set output_dir=OURS
    python make_llamafactory_ppo.py draw OUT.json OURS CURVES.json CURVES.png

adds those of our run of the same file, and draws both.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"
Curve = dict[str, Any]  # "mean" and "error" of each update's rewards, how many "rewards" that is, "kl" to the start


def record(file: str, out: str) -> None:
    """Run their PPO, and keep what its reward model says of each update's responses, and their KL."""
    import yaml
    from llamafactory.train.ppo.trainer import CustomPPOTrainer
    from llamafactory.train.tuner import run_exp

    updates: list[list[float]] = []
    kls: list[float] = []
    step = CustomPPOTrainer.step

    def recorded(self: Any, queries: Any, responses: Any, scores: Sequence[Any], *more: Any) -> Any:
        updates.append([float(score) for score in scores])
        stats = step(self, queries, responses, scores, *more)
        kls.append(float(stats["objective/kl"]))
        Path(out).write_text(json.dumps(curve_of(updates) | {"kl": kls}) + "\n")
        return stats

    CustomPPOTrainer.step = recorded
    run_exp(yaml.safe_load(Path(file).read_text()))


def curve_of(updates: Sequence[Sequence[float]]) -> Curve:
    """Mean and standard error of each update."""
    import numpy as np

    means = [float(np.mean(rewards)) for rewards in updates]
    errors = [float(np.std(rewards, ddof=1) / np.sqrt(len(rewards))) for rewards in updates]
    return {"mean": means, "error": errors, "rewards": len(updates[0])}


def curve_of_run(run: Path, rewards: int) -> Curve:
    """The same of a run of ours, whose records have the mean and the spread."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["phase"] == "ppo"]
    errors = [line["reward_std"] / rewards**0.5 for line in updates]
    found = {"mean": [line["reward"] for line in updates], "error": errors, "rewards": rewards}
    return found | {"kl": [line["kl"] for line in updates]}


def draw(theirs: str, run: str, curves: str, picture: str) -> None:
    """Write both curves, and draw them: a line with dots and a dashed one with squares, bars of one standard error."""
    import matplotlib.pyplot as plt

    found = {"LLaMA-Factory 0.9.3": json.loads(Path(theirs).read_text())}
    found["ppo_jax"] = curve_of_run(Path(run), found["LLaMA-Factory 0.9.3"]["rewards"])
    Path(curves).write_text(json.dumps(found, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = ({"fmt": "s--", "color": "0.45", "mfc": "white"}, {"fmt": "o-", "color": "black"})
    for number, ((name, curve), style) in enumerate(zip(found.items(), styles, strict=True)):
        steps = [step + 0.12 * number for step in range(1, len(curve["mean"]) + 1)]
        axes.errorbar(steps, curve["mean"], curve["error"], label=name, capsize=3, linewidth=1.2, **style)
    axes.set(xlabel="update", ylabel="mean reward of its responses, with standard error")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    {"record": record, "draw": draw}[sys.argv[1]](*sys.argv[2:])
