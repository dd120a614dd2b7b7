"""What the metrics of a run say is wrong with it: a sentence, and the option to turn.

A check is a pure function of the records of metrics.jsonl so far and of what is known of the run beside them; it gives
a `Finding` where something is wrong and None where not, or where it is too early to tell. `examine` asks all of them:
the report does so for its health box, and `watch` while the run goes on. Thresholds are rules of thumb.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.output.series import EVALUATED, NO_LABELS, Labels, Records, finite, judge_names, series
from ppo_jax.runs.output.writers import Writer

FEW_PROMPTS = 32  # held-out prompts below which a gain of half a standard deviation is lost in its error


class Known(NamedTuple):
    """What the checks know beside the records; None where nobody said."""

    held_out: int | None = None  # prompts of an evaluation
    judges: Labels = NO_LABELS
    reward_accuracy: float | None = None  # held-out pairwise accuracy of the reward model
    reward_mean: float | None = None  # of its scores on the texts that it was normalised or measured on
    reward_std: float | None = None
    measured_on: str = EVALUATED  # what the prompts of an evaluation are


NOTHING_KNOWN = Known()


class Finding(NamedTuple):
    """Something that is wrong."""

    check: str  # the check's name
    text: str  # what is seen, a sentence with its numbers
    advice: str  # what to turn


def known_from(facts: Mapping[str, Any]) -> Known:
    """What run.json, or another mapping with these names, says."""
    return Known(
        **{name: finite(facts, name) for name in ("reward_accuracy", "reward_mean", "reward_std")},
        held_out=facts.get("held_out"),
        measured_on=facts.get("measured_on") or EVALUATED,
        judges=facts.get("judges") or NO_LABELS,
    )


def examine(records: Records, known: Known = NOTHING_KNOWN) -> list[Finding]:
    """The findings of all checks, in the order of `CHECKS`."""
    answers = ((check.__name__, check(records, known)) for check in CHECKS)
    return [Finding(name, *answer) for name, answer in answers if answer is not None]


def watch(known: Known, say: Callable[[str], None], earlier: Records = ()) -> Writer:
    """A writer that says each finding when it first holds; not again those of the `earlier` records."""
    records = list(earlier)
    said = {finding.check for finding in examine(records, known)}

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        records.append({"step": step, "phase": phase, **values})
        if phase != "eval" and len(records) % (1 + len(records) // 100):
            return  # a long run is not asked after every update
        for finding in examine(records, known):
            if finding.check not in said:
                said.add(finding.check)
                say(f"health: {finding.text} {finding.advice}")

    return write


def watch_run(directory: Path, facts: Mapping[str, Any], screen: Screen) -> Writer:
    """Leave the facts in run.json for the report; `watch` on the screen, after what an earlier process has recorded."""
    with contextlib.suppress(OSError):  # a full disk is no reason to end the run
        rundir.add_facts(directory, **facts)
    return watch(known_from(facts), screen.message, read_jsonl(directory / rundir.METRICS))


# -- checks: (what is seen, what to turn), or None ---------------------------------------------------------------------

Answer = tuple[str, str] | None


def all_rewards_fail(records: Records, known: Known) -> Answer:
    """Not one response of the newest batch or evaluation has a score."""
    measured = [record for record in records if finite(record, "invalid_scores") is not None]
    if not measured or measured[-1]["invalid_scores"] < 1:
        return None
    where = _place(measured[-1])
    return f"Every reward of {where} failed, so nothing is learned.", "Mend the reward: log.txt names the causes."


def constant_reward(records: Records, known: Known) -> Answer:
    """All responses get one score, three batches in a row or over an evaluation: there is nothing to prefer."""
    for phase, count in (("ppo", 3), ("eval", 1)):
        newest = [r for r in records if r.get("phase") == phase and finite(r, "reward") is not None][-count:]
        spreads = [finite(r, "reward_std") for r in newest]
        same = [s is not None and s <= 1e-6 * abs(r["reward"]) for s, r in zip(spreads, newest, strict=True)]
        if len(newest) == count and all(same):
            return (
                f"Every response of {_place(newest[-1])} has the same score, {newest[-1]['reward']:.4g}.",
                "A reward that does not tell responses apart teaches nothing: look at it, or give prompts that it can "
                "tell apart.",
            )
    return None


def reward_at_chance(records: Records, known: Known) -> Answer:
    """The reward model orders held-out pairs hardly better than a coin."""
    accuracies = series(records, "reward", "heldout_accuracy")[1]
    accuracy = accuracies[-1] if accuracies else known.reward_accuracy
    if accuracy is None or accuracy > 0.55:
        return None
    return (
        f"The reward model orders {accuracy:.1%} of the pairs that it is measured on rightly, and chance is 50%.",
        "Train it longer (--reward.epochs), with more layers (--reward.lora-layers) or on more pairs before PPO.",
    )


def scores_far_from_known(records: Records, known: Known) -> Answer:
    """The first scores lie where the reward model has never been."""
    first = next((finite(r, "reward") for r in records if r.get("phase") == "eval" and r.get("step") == 0), None)
    if first is None or known.reward_mean is None or not known.reward_std:
        return None
    distance = abs(first - known.reward_mean) / known.reward_std
    if distance <= 5:
        return None
    return (
        f"The initial policy scores {first:.2f}, {distance:.0f} standard deviations from the texts that the reward "
        f"model knows ({known.reward_mean:.2f} ± {known.reward_std:.2f}).",
        "Train it on responses like the policy's: the same prompts, template and length; --reference of "
        "`ppo-jax reward` puts their scores at 0 ± 1.",
    )


def few_prompts(records: Records, known: Known) -> Answer:
    """Too few held-out prompts for the changes that one looks for."""
    spreads = series(records, "eval", "reward_std")[1]
    if known.held_out is None or known.held_out >= FEW_PROMPTS or not spreads or not spreads[0]:
        return None
    error = spreads[0] / math.sqrt(known.held_out)
    return (
        f"Evaluations are on {known.held_out} {known.measured_on} only: the standard error of their mean reward is "
        f"{error:.2g}, {error / spreads[0]:.0%} of its spread.",
        f"Keep at least {FEW_PROMPTS} apart (--held-out, at most a fifth of the prompts that differ), of more "
        "prompts or of a file of their own (--dataset.held-out-file).",
    )


def exploded(records: Records, known: Known) -> Answer:
    """A loss or a gradient far beyond what it was, or optimizer steps that were left out because one was not finite."""
    skipped = [r for r in records if (finite(r, "nonfinite_updates") or 0) > 0]
    lower = "Lower the learning rate or --hyper.max-grad-norm, or bring the scores to 0 ± 1 (--ppo.score.normalise)."
    if skipped:
        return f"Optimizer steps of {_place(skipped[-1])} were left out: loss or gradient was not finite.", lower
    for phase in ("ppo", "sft", "reward", "dpo"):
        for name, what in (("grad_norm", "gradient's norm"), ("loss", "loss"), ("value_loss", "value loss")):
            steps, values = series(records, phase, name)
            usual = median(map(abs, values)) if values else 0.0
            worst = max(range(len(values)), key=lambda i: abs(values[i]), default=0)
            if worst >= 3 and abs(values[worst]) > max(1000.0 if name == "grad_norm" else 10.0, 100 * usual):
                size = f"{values[worst]:,.0f}" if abs(values[worst]) >= 1000 else f"{values[worst]:.3g}"
                text = f"At step {steps[worst]} of {phase} the {what} was {size} (usually {usual:.2g})."
                return text, lower
    return None


def nothing_moves(records: Records, known: Known) -> Answer:
    """Clip fraction 0 and KL 0: the updates do not change the policy."""
    clipped, kls = series(records, "ppo", "clip_fraction")[1], series(records, "ppo", "kl")[1]
    moved = max(map(abs, kls[-5:]), default=1.0)
    if len(clipped) < 5 or len(kls) < 5 or max(clipped[-5:]) > 1e-4 or moved > 0.02:
        return None
    return (
        f"After {len(kls)} updates nothing has moved: clip fraction {clipped[-1]:.2g}, KL from the reference "
        f"{max(kls[-1], 0):.2g} nats.",
        f"Raise --hyper.learning-rate{_rate(records)}, tenfold to begin with.",
    )


def critic_dead(records: Records, known: Known) -> Answer:
    """The critic foresees nothing of the returns after ten updates."""
    explained = series(records, "ppo", "explained_variance")[1]
    if len(explained) < 10 or fmean(explained[-5:]) > 0.03 or nothing_moves(records, known):
        return None
    clipped = series(records, "ppo", "value_clip_fraction")[1][-5:]
    spread = series(records, "ppo", "return_std")[1][-5:]
    text = (
        f"The critic is dead: after {len(explained)} updates it explains nothing of the returns (explained variance "
        f"{fmean(explained[-5:]):.2f})."
    )
    if clipped and fmean(clipped) > 0.2:
        scale = f", whose standard deviation is {fmean(spread):.2g}" if spread else ""
        return (
            f"{text[:-1]}, and {fmean(clipped):.0%} of its tokens are at the value clip.",
            f"Raise --hyper.value-clip: it is in units of the return{scale}; or normalise the scores "
            "(--ppo.score.normalise scale).",
        )
    return text, (
        "Raise --hyper.vf-coef or --hyper.critic-lr-scale, give the critic its own adapter (--ppo.critic.own), or go "
        "without one (--ppo.advantage rloo --ppo.group-size 4)."
    )


def policy_dead(records: Records, known: Known) -> Answer:
    """Two evaluations in a row are the same in every number (the KL to a thousandth), though there were updates."""
    last = [r for r in records if r.get("phase") == "eval" and finite(r, "reward") is not None][-2:]
    seen = [
        [finite(r, n) for n in ("reward", "reward_std", "response_length")] + [round(finite(r, "kl") or 0, 3)]
        for r in last
    ]
    if len(last) < 2 or last[0]["step"] == last[1]["step"] or seen[0] != seen[1] or nothing_moves(records, known):
        return None
    return (
        f"The evaluations of updates {last[0]['step']} and {last[1]['step']} are identical: the policy no longer "
        "changes.",
        f"Raise --hyper.learning-rate{_rate(records)} if it never moved; if it did, it has collapsed: go back to an "
        "earlier checkpoint with a lower rate and a higher --hyper.kl-coef.",
    )


def kl_explodes(records: Records, known: Known) -> Answer:
    """The policy has left the reference: more than a nat per token, and more than 20 per response."""
    newest = [r for r in records if finite(r, "kl") is not None and finite(r, "kl_per_token") is not None][-1:]
    if not newest or newest[0]["kl"] < 20 or newest[0]["kl_per_token"] < 1:
        return None
    coefficient = series(records, "ppo", "kl_coef")[1]
    now = f" (now {coefficient[-1]:.3g})" if coefficient else ""
    return (
        f"At {_place(newest[0])} the policy is {newest[0]['kl']:.3g} nats per response from the reference, "
        f"{newest[0]['kl_per_token']:.2g} per token.",
        f"Raise --hyper.kl-coef{now}, steer it (--ppo.kl.control adaptive), or lower --hyper.learning-rate"
        f"{_rate(records)}; --loop.max-kl stops a run there.",
    )


def entropy_collapses(records: Records, known: Known) -> Answer:
    """The policy has become nearly sure of every token."""
    entropies = series(records, "ppo", "entropy")[1]
    if len(entropies) < 6:
        return None
    first, last = fmean(entropies[:3]), fmean(entropies[-3:])
    if last > 0.15 * first:
        return None
    return (
        f"The entropy fell from {first:.2g} to {last:.2g} nats per token: the policy hardly varies what it writes.",
        "Raise --hyper.kl-coef or --hyper.entropy-coef, or lower --hyper.learning-rate.",
    )


def responses_shrink(records: Records, known: Known) -> Answer:
    """Responses are less than half as long as at first."""
    lengths = series(records, "ppo", "response_length")[1]
    if len(lengths) < 6:
        return None
    first, last = fmean(lengths[:3]), fmean(lengths[-3:])
    if last > 0.4 * first:
        return None
    return (
        f"Responses shrank from {first:.1f} to {last:.1f} tokens.",
        "See whether the reward likes short texts for their own sake; raise --hyper.kl-coef, or lower "
        "--hyper.length-penalty.",
    )


def responses_all_cut(records: Records, known: Known) -> Answer:
    """No response ends by itself."""
    rates, lengths = series(records, "ppo", "eos_rate")[1][-3:], series(records, "ppo", "response_length")[1][-1:]
    if len(rates) < 3 or max(rates) > 0.01 or not lengths:
        return None
    return (
        f"No response ends by itself: all are cut at {lengths[0]:.0f} tokens.",
        "Give them room (--ppo.sampling.response-length), check --ppo.sampling.stop-ids, or make ending worth "
        "something (--ppo.score.missing-eos subtract).",
    )


def gamed(records: Records, known: Known) -> Answer:
    """The reward is up, and every judge is down, each by more than its standard error."""
    evaluations = [r for r in records if r.get("phase") == "eval" and finite(r, "reward") is not None]
    names = judge_names({name for r in evaluations for name in r}, known.judges)
    if len(evaluations) < 2 or not names:
        return None
    changes = [_change(evaluations, name, known.held_out) for name in ("reward", *names)]
    if None in changes or changes[0] < 2 or max(changes[1:]) > -1:  # type: ignore[operator, type-var]
        return None
    told = " and ".join(known.judges.get(name, name) for name in names)
    return (
        f"The reward rose, and what it never sees fell: {told}. The policy games the reward model.",
        f"Raise --hyper.kl-coef, stop earlier (--loop.best-metric {names[0]} keeps the update that a judge likes "
        "best), or train the reward model on what the policy writes now.",
    )


CHECKS: Sequence[Callable[[Records, Known], Answer]] = (
    all_rewards_fail,
    constant_reward,
    reward_at_chance,
    scores_far_from_known,
    exploded,
    nothing_moves,
    policy_dead,
    kl_explodes,
    entropy_collapses,
    responses_shrink,
    responses_all_cut,
    critic_dead,
    gamed,
    few_prompts,
)


# -- parts -------------------------------------------------------------------------------------------------------------


def _place(record: Mapping[str, Any]) -> str:
    if record.get("phase") == "eval":
        return f"the evaluation at update {record['step']}"
    return f"update {record['step']}" if record.get("phase") == "ppo" else f"step {record['step']}"


def _rate(records: Records) -> str:
    rates = series(records, "ppo", "learning_rate")[1]
    return f" (at most {max(rates):.2g} so far)" if rates else ""


def _change(evaluations: Records, name: str, count: int | None) -> float | None:
    """Last less first, in standard errors of independent samples; without a count in standard deviations."""
    first, last = finite(evaluations[0], name), finite(evaluations[-1], name)
    spreads = [finite(evaluations[i], f"{name}_std") for i in (0, -1)]
    if first is None or last is None or None in spreads:
        return None
    error = math.hypot(*spreads) / math.sqrt(count or 1)  # type: ignore[arg-type]
    return (last - first) / error if error else math.inf * (last - first) if last != first else 0.0
