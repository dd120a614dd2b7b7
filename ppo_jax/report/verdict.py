"""What the numbers of a run say, in words: did the reward rise, and did anything independent rise with it?

A reward model is a proxy: a policy may raise it without writing what people would rate higher (Gao et al. 2022).
Only judges that the training never saw can tell the two apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ppo_jax.report.series import NO_LABELS, Labels, Records, judge_names, series


class Gain(NamedTuple):
    """The change of one score between the initial and the final policy, over the same held-out prompts."""

    before: float
    after: float
    in_std: float | None  # (after - before) / standard deviation of the initial policy's scores
    error: float | None  # standard error of after - before, for independent samples: sqrt((s_0^2 + s_1^2) / n)

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def direction(self) -> int:
        """1 rose, -1 fell, 0 within two standard errors (without an error: the sign of the change)."""
        if self.error is not None and abs(self.change) <= 2 * self.error:
            return 0
        return (self.change > 0) - (self.change < 0)


class Verdict(NamedTuple):
    """A headline of a few words, and one paragraph."""

    headline: str
    text: str


def gain(before: Mapping[str, Any], after: Mapping[str, Any], name: str, count: int | None) -> Gain | None:
    """Change of `name`; its spread is `<name>_std`, over `count` prompts. None where a number is missing."""
    first, last = number(before, name), number(after, name)
    if first is None or last is None:
        return None
    spread, final_spread = number(before, f"{name}_std"), number(after, f"{name}_std")
    in_std = (last - first) / spread if spread else None
    if spread is None or not count:
        return Gain(first, last, in_std, None)
    final_spread = spread if final_spread is None else final_spread
    return Gain(first, last, in_std, math.sqrt((spread**2 + final_spread**2) / count))


def judge(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    records: Records = (),
    count: int | None = None,
    kl_budget: float | None = None,
    reward_accuracy: float | None = None,
    labels: Labels = NO_LABELS,
) -> Verdict | None:
    """The verdict on a run from its scores `before` and `after` (keys as in phase "eval" of metrics.jsonl).

    records: metrics.jsonl, to find a judge that has fallen from its peak. count: held-out prompts. labels: of judges.
    None when there is no reward before and after.
    """
    reward = gain(before, after, "reward", count)
    if reward is None:
        return None
    gains = {name: gain(before, after, name, count) for name in judge_names({*before, *after}, labels)}
    judges = {name: found for name, found in gains.items() if found is not None}
    known = {labels.get(name, name): found for name, found in judges.items()}
    sentences = [_reward_sentence(reward, count)]
    sentences += _judge_sentences(reward, known)
    sentences += _peak_sentences(records, judges, labels)
    sentences += _distance_sentences(before, after, kl_budget)
    if reward_accuracy is not None:
        sentences.append(f"The reward model orders {reward_accuracy:.1%} of held-out pairs as people did.")
    return Verdict(_headline(reward, known), " ".join(sentences))


def number(values: Mapping[str, Any], name: str) -> float | None:
    """The finite number of that name, or None."""
    value = values.get(name)
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _headline(reward: Gain, judges: Mapping[str, Gain]) -> str:
    if reward.direction <= 0:
        return "The reward did not rise" if reward.direction == 0 else "The reward fell"
    size = "The reward rose" if reward.in_std is None else f"Reward up {reward.in_std:.1f} standard deviations"
    directions = [found.direction for found in judges.values()]
    if not directions:
        return f"{size}; nothing independent judged it"
    if min(directions) < 0:
        return f"{size}, but it was gamed" if max(directions) < 0 else f"{size}, but the judges disagree"
    if max(directions) == 0:
        return f"{size}, but no independent judge saw it"
    if min(directions) == 0:
        return f"{size}, and part of the judges agree"
    return (
        f"{size}, and independent judges agree" if len(directions) > 1 else f"{size}, and an independent judge agrees"
    )


def _reward_sentence(reward: Gain, count: int | None) -> str:
    of = f"of {count} held-out prompts " if count else ""
    text = f"The mean reward {of}went from {reward.before:.2f} to {reward.after:.2f}"
    if reward.direction == 0:
        return f"{text}, a change within two standard errors: the training did not move it."
    if reward.in_std is None:
        return f"{text}."
    text += f", {reward.in_std:+.2f} standard deviations of the initial policy's scores"
    if reward.in_std < 0:
        return f"{text}: the training went the wrong way."
    return f"{text}: {'at least' if reward.in_std >= 1 else 'less than'} one standard deviation."


def _judge_sentences(reward: Gain, judges: Mapping[str, Gain]) -> list[str]:
    """What the judges say of a reward that rose."""
    if reward.direction <= 0:
        return []
    if not judges:
        return ["No independent judge scored the responses, so whether the reward was gamed cannot be told."]

    def listing(direction: int) -> str:
        items = [f"{label} ({_size(found)})" for label, found in judges.items() if found.direction == direction]
        return _sentence_list(items)

    rose, flat, fell = listing(1), listing(0), listing(-1)
    sentences = []
    if rose:
        sentences.append(f"Not seen in training, and up as well: {rose}.")
    if flat:
        sentences.append(f"Not seen in training, and without a clear change: {flat}.")
    if fell:
        sentences.append(f"Not seen in training, and down: {fell}.")
    if fell:
        sentences.append(
            "The policy learned to please the reward model in a way that an independent judge does not share: "
            "the proxy was gamed."
            if not rose
            else "The judges disagree, so the gain is at least partly particular to the reward model: read the samples."
        )
    elif not rose:
        sentences.append("So the gain may be particular to the reward model: read the samples.")
    elif not flat:
        shares = [found.in_std / reward.in_std for found in judges.values() if found.in_std and reward.in_std]
        small = (
            f", though the smallest of these gains is {min(shares):.0%} of the reward's, in these units"
            if shares
            else ""
        )
        sentences.append(f"There is no sign that the proxy was gamed{small if shares and min(shares) < 0.5 else ''}.")
    return sentences


def _peak_sentences(records: Records, judges: Mapping[str, Gain], labels: Labels) -> list[str]:
    """Judges that have clearly fallen from their best evaluation: the sign of over-optimisation."""
    sentences = []
    for name, found in judges.items():
        steps, values = series(records, "eval", name)
        label, error = labels.get(name, name), found.error
        if not values or error is None:
            continue
        best = max(range(len(values)), key=values.__getitem__)
        if values[best] - values[-1] > 2 * error and best > 0:
            sentences.append(
                f"{label[0].upper()}{label[1:]} was best at update {steps[best]} ({values[best]:.2f}) and has fallen "
                f"to {values[-1]:.2f} since: the last updates over-optimised the reward."
            )
    return sentences


def _distance_sentences(before: Mapping[str, Any], after: Mapping[str, Any], kl_budget: float | None) -> list[str]:
    """How far the policy went (KL), and whether it changed how long it writes."""
    sentences = []
    kl, per_token = number(after, "kl"), number(after, "kl_per_token")
    if kl is not None:
        text = f"The final policy is {kl:.1f} nats per response from the reference"
        text += f" ({per_token:.2f} per token)" if per_token is not None else ""
        if kl_budget is not None:
            text += f", {'within' if kl <= kl_budget else 'beyond'} the budget of {kl_budget:g}"
        sentences.append(text + ".")
    length = gain(before, after, "response_length", None)
    stops = gain(before, after, "eos_rate", None)
    if length:
        text = f"Responses are {length.after:.1f} tokens long (before: {length.before:.1f})"
        text += f", and {stops.after:.0%} end by themselves (before: {stops.before:.0%})" if stops else ""
        far = length.before > 0 and abs(length.change) / length.before > 0.3
        text += ". Such a change of length may itself be what earns the reward." if far else "."
        sentences.append(text)
    return sentences


def _size(found: Gain) -> str:
    return f"{found.change:+.2f}" if found.in_std is None else f"{found.change:+.2f}, {found.in_std:+.2f} std"


def _sentence_list(items: Sequence[str]) -> str:
    return " and ".join(items)
