"""What the numbers of a run say, in words: did the reward rise, and did anything independent rise with it?

A reward model is a proxy: a policy may raise it without writing what people would rate higher (Gao et al. 2022).
Only judges that the training never saw can tell the two apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppo_jax.report.evidence import Evidence, Gain, Values, best_evaluation, gain
from ppo_jax.report.measures import measure_of
from ppo_jax.runs.output.series import finite, judge_names, series

STILL = 0.1  # nats per response below which a policy counts as the reference


class Verdict(NamedTuple):
    """A headline of a few words, one paragraph, and what to do next where something failed."""

    headline: str
    text: str
    advice: tuple[str, ...] = ()


class Movement(NamedTuple):
    """What says that the policy moved, whatever the held-out reward shows."""

    kl: float | None  # nats per response of the final policy
    training: tuple[float, float] | None  # mean reward of the first and of the last training batches

    @property
    def rose(self) -> bool:
        return self.training is not None and self.training[1] > self.training[0]

    @property
    def happened(self) -> bool:
        return self.rose or (self.kl is not None and self.kl > STILL)


def judge(evidence: Evidence) -> Verdict | None:
    """The verdict on a run. None when there is no reward before and after."""
    reward = gain(evidence, "reward")
    if reward is None:
        return None
    names = judge_names({*evidence.before, *evidence.after}, evidence.labels)
    gains = {name: gain(evidence, name) for name in names}
    judges = {name: found for name, found in gains.items() if found is not None}
    known = {evidence.labels.get(name, name): found for name, found in judges.items()}
    moved = movement(evidence)
    sentences = _reward_sentences(evidence, reward, moved)
    sentences += _judge_sentences(reward, known)
    sentences += _best_sentences(evidence, [*judges])
    sentences += _peak_sentences(evidence, judges)
    sentences += _distance_sentences(evidence)
    if evidence.reward_accuracy is not None:
        accuracy = f"The reward model orders {evidence.reward_accuracy:.1%} of {evidence.pairs} as {evidence.raters}."
        sentences.append(accuracy)
    advice = _advice(evidence, reward, [*judges.values()], moved)
    return Verdict(_headline(reward, known, moved, evidence.measured_on), " ".join(sentences), advice)


def movement(evidence: Evidence) -> Movement:
    """How far the policy went, and the reward of training batches where it clearly changed.

    Clearly: by more than a quarter of the spread of a batch, from the mean of the first tenth of the updates to that of
    the last one.
    """
    values, spreads = (series(evidence.records, "ppo", name)[1] for name in ("reward", "reward_std"))
    training = None
    if len(values) > 1 and spreads:
        tenth = max(1, len(values) // 10)
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        training = (first, last) if abs(last - first) > 0.25 * spreads[0] else None
    return Movement(finite(evidence.after, "kl"), training)


def _headline(reward: Gain, judges: Mapping[str, Gain], moved: Movement, measured_on: str) -> str:
    if reward.direction < 0:
        return "The reward fell"
    if reward.direction == 0:
        if moved.rose:
            return f"The reward rose in training, but not clearly on the {measured_on}"
        return (
            "The policy moved, but the reward did not clearly change" if moved.happened else "The reward did not rise"
        )
    size = "The reward rose" if reward.in_std is None else f"Reward up {reward.in_std:.1f} standard deviations"
    directions = [found.direction for found in judges.values()]
    if not directions:
        return f"{size}; nothing independent judged it"
    if min(directions) < 0:
        return f"{size}, but it was gamed" if max(directions) < 0 else f"{size}, but the judges disagree"
    if max(directions) == 0:
        return f"{size}, but no independent judge saw it"
    if min(directions) == 0:
        return f"{size}, and {sum(d > 0 for d in directions)} of {len(directions)} independent judges agree"
    return (
        f"{size}, and independent judges agree" if len(directions) > 1 else f"{size}, and an independent judge agrees"
    )


def _reward_sentences(evidence: Evidence, reward: Gain, moved: Movement) -> list[str]:
    of = f"of {evidence.prompts} {evidence.measured_on} " if evidence.prompts else ""
    text = f"The mean reward {of}went from {reward.before:.2f} to {reward.after:.2f}"
    error = f" ± {reward.error:.2g}" if reward.error is not None else ""
    if reward.direction == 0:
        within = f"{text}, a change of {reward.change:+.2g}{error}, within two standard errors"
        within = within if reward.change else f"{text}, which is no change at all"
        if not moved.happened:
            return [f"{within}{': the training did not move it' if moved.kl is not None else ''}."]
        sentences = [f"{within}: these prompts cannot tell it from none."]
        if moved.training is not None:
            sentences.append("On the training prompts it went from {:.2f} to {:.2f}.".format(*moved.training))
        if (needed := _prompts_needed(evidence, reward)) is not None:
            sentences.append(f"About {needed} {evidence.measured_on} would show a change of this size.")
        return sentences
    if reward.in_std is None:
        return [f"{text}."]
    text += f", {reward.in_std:+.2f} standard deviations of the initial policy's scores"
    paired = ", the standard error of the differences prompt by prompt" if reward.paired else ", two independent means"
    sized = [f"The change is {reward.change:+.2f}{error}{paired}."] if error else []
    if reward.in_std < 0:
        return [f"{text}: the training went the wrong way.", *sized]
    return [f"{text}: {'at least' if reward.in_std >= 1 else 'less than'} one standard deviation.", *sized]


def _prompts_needed(evidence: Evidence, reward: Gain) -> int | None:
    """Prompts whose two standard errors are the change that was seen; None where that is no use."""
    if not evidence.prompts or not reward.error or reward.change <= 0:
        return None
    needed = math.ceil(evidence.prompts * (2 * reward.error / reward.change) ** 2)
    return needed if needed <= 50 * evidence.prompts else None


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


def _best_sentences(evidence: Evidence, judges: Sequence[str]) -> list[str]:
    """The best evaluation beside the last one, with all that both measured."""
    best, last = best_evaluation(evidence), evidence.after
    if best is None or last.get("step") in (None, 0, best["step"]):
        return []
    name = evidence.best_metric.removeprefix("-")
    found = gain(evidence, name, best, last)
    told = [_told(evidence, best, other) for other in dict.fromkeys((name, "reward", *judges, "kl"))]
    text = f"The best evaluation is that of update {best['step']} ({', '.join(item for item in told if item)})"
    if found is None:
        return [f"{text}."]
    change, error = f"{found.change:+.2g}", ""
    if found.error:  # as many digits as its error has
        digits = max(0, 1 - math.floor(math.log10(found.error)))
        change, error = f"{found.change:+.{digits}f}", f" ± {found.error:.{digits}f}"
    clear = "a clear difference" if found.direction else "no clear difference: the best of several is partly luck"
    return [f"{text}; the last one, of update {last['step']}, lies {change}{error} from it, {clear}."]


def _told(evidence: Evidence, values: Values, name: str) -> str:
    value, measure = finite(values, name), measure_of(name, evidence.labels)
    label = {"reward": "reward", "kl": "KL"}.get(name, evidence.labels.get(name, name))
    return "" if value is None else f"{label} {measure.form.format(value * measure.factor)}"


def _peak_sentences(evidence: Evidence, judges: Mapping[str, Gain]) -> list[str]:
    """Judges that have clearly fallen from their best evaluation: the sign of over-optimisation."""
    sentences = []
    for name, found in judges.items():
        steps, values = series(evidence.records, "eval", name)
        label, error = evidence.labels.get(name, name), found.error
        if not values or error is None:
            continue
        best = max(range(len(values)), key=values.__getitem__)
        if values[best] - values[-1] > 2 * error and best > 0:
            sentences.append(
                f"{label[0].upper()}{label[1:]} was best at update {steps[best]} ({values[best]:.2f}) and has fallen "
                f"to {values[-1]:.2f} since: the last updates over-optimised the reward."
            )
    return sentences


def _distance_sentences(evidence: Evidence) -> list[str]:
    """How far the policy went (KL), and whether it changed how long it writes."""
    sentences, after, budget = [], evidence.after, evidence.kl_budget
    kl, per_token = finite(after, "kl"), finite(after, "kl_per_token")
    if kl is not None:
        text = f"The final policy is {kl:.1f} nats per response from the reference"
        text += f" ({per_token:.2f} per token)" if per_token is not None else ""
        if budget is not None:
            text += f", {'within' if kl <= budget else 'beyond'} the budget of {budget:g}"
        sentences.append(text + ".")
    length, stops = gain(evidence, "response_length"), gain(evidence, "eos_rate")
    if length:
        text = f"Responses are {length.after:.1f} tokens long (before: {length.before:.1f})"
        text += f", and {stops.after:.0%} end by themselves (before: {stops.before:.0%})" if stops else ""
        far = length.before > 0 and abs(length.change) / length.before > 0.3
        text += ". Such a change of length may itself be what earns the reward." if far else "."
        sentences.append(text)
    return sentences


def _advice(evidence: Evidence, reward: Gain, judges: Sequence[Gain], moved: Movement) -> tuple[str, ...]:
    """What to do next; nothing where the reward rose and no judge fell."""
    if reward.direction < 0:
        return (
            "Lower --hyper.learning-rate, or give the critic time (--hyper.critic-warmup), and see what Health says.",
            "Look at the samples whose reward fell most: a reward that is wrong there cannot be learned.",
        )
    if reward.direction == 0 and not moved.happened:
        return ("Raise --hyper.learning-rate, or lower --hyper.kl-coef, until the KL leaves zero; then look again.",)
    if reward.direction == 0:
        many = f" (--held-out; {evidence.prompts} now)" if evidence.prompts else " (--held-out)"
        return (f"Train longer (--loop.updates), and evaluate on more prompts{many}.",)
    if any(found.direction < 0 for found in judges):
        return (
            "Raise --hyper.kl-coef or stop earlier: --loop.best-metric with a judge's name keeps the update that this "
            "judge likes best.",
            "Read the most changed samples below, and train the reward model on what it is fooled by.",
        )
    return ()


def _size(found: Gain) -> str:
    return f"{found.change:+.2f}" if found.in_std is None else f"{found.change:+.2f}, {found.in_std:+.2f} std"


def _sentence_list(items: Sequence[str]) -> str:
    return " and ".join(items)
