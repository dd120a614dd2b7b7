"""Which prompts the report shows, with what the policy wrote for them at several points of training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ppo_jax.report.measures import measure_of
from ppo_jax.report.templates import signed
from ppo_jax.runs.output.series import Labels, finite

PROMPTS, STEPS = 6, 4  # of prompts that are not selected, and of points of training, shown at most
FEWER, SELECTED = 3, 2  # with scores: prompts that are not selected, and of each kind that is

Sample = Mapping[str, Any]  # a line of samples.jsonl


class Card(NamedTuple):
    """One prompt at several points of training."""

    why: str  # it is shown; "": not selected
    steps: list[dict[str, Any]]  # step, prompt, response, scores as (label, text)


def sample_cards(samples: Sequence[Sample], labels: Labels) -> list[Card]:
    """The first prompts; then, by the reward of the last step, the best, the worst and the most changed ones."""
    by_index: dict[int, dict[int, Sample]] = {}
    for sample in samples:
        by_index.setdefault(sample["index"], {})[sample["step"]] = sample
    if not by_index:
        return []
    steps = spread(sorted({sample["step"] for sample in samples}), STEPS)
    chosen = _choose(by_index, steps)
    return [
        Card(why, [_shown(by_index[index][step], labels) for step in steps if step in by_index[index]])
        for index, why in chosen.items()
    ]


def _choose(by_index: Mapping[int, Mapping[int, Sample]], steps: Sequence[int]) -> dict[int, str]:
    """Index -> why it is shown."""
    order = sorted(by_index)
    first, last = ({i: _reward(by_index[i].get(step)) for i in order} for step in (steps[0], steps[-1]))
    after = {i: reward for i, reward in last.items() if reward is not None}
    change = {i: abs(after[i] - before) for i, before in first.items() if before is not None and i in after}
    if len(change) <= PROMPTS or len(steps) < 2:
        return dict.fromkeys(order[:PROMPTS], "")
    best, most = sorted(after, key=lambda i: -after[i]), sorted(change, key=lambda i: -change[i])
    chosen = dict.fromkeys(order[:FEWER], "")
    for why, ranked in {"best": best, "worst": best[::-1], "most changed": most}.items():
        chosen |= dict.fromkeys([i for i in ranked if i not in chosen][:SELECTED], why)
    return chosen


def _reward(sample: Sample | None) -> float | None:
    return None if sample is None else finite(sample.get("scores", {}), "reward")


def _shown(sample: Sample, labels: Labels) -> dict[str, Any]:
    scores = sample.get("scores", {}).items()
    return {
        "step": sample["step"],
        "prompt": sample["prompt"],
        "response": sample["response"],
        "scores": [("KL" if name == "kl" else measure_of(name, labels).label, signed(value)) for name, value in scores],
    }


def spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, the first and the last among them, evenly apart."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
