"""Evaluations of a run: the held-out prompts in pieces, rewards, judges, KL; records, samples, a table on screen."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from ppo_jax.data import left_pad
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.config import ModelConfig
from ppo_jax.parallel import processes
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rewards.combine import SplitReward, add_scores
from ppo_jax.rewards.scores import as_scores, only_finite
from ppo_jax.runs.output import rundir, writers
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import Setup, decode_responses, host_responses
from ppo_jax.train.evaluate import Evaluate, Evaluation, make_evaluate
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.state import RunState, key_stream
from ppo_jax.types import Frozen, Prompts

SAMPLES = 64  # held-out prompts whose responses are kept in samples.jsonl
SHOWN = 4  # of them in the table on screen

NOT_SCORES = ("valid", "tokens", "ended")

Responses = dict[int, str]  # by the index of the held-out prompt
Columns = dict[str, np.ndarray]  # one array per score, NaN where a reward failed


def make_evaluator(
    directory: Path,
    setup: Setup,
    frozen: Frozen,
    write: writers.Writer,
    put_evaluation: Callable[..., object],
    screen: Screen,
    evaluations: dict[int, dict[str, float]],
    stopping: Callable[[], bool] = lambda: False,
) -> Callable[[int, RunState], dict[str, float] | None]:
    """Return evaluate(step, state), which scores held-out prompts, writes samples and "eval", fills `evaluations`.

    The prompts go through the device in pieces of `loop.batch_size` rows; piece i samples with fold_in(key, i), the
    same at every step, so policies are compared on equal random numbers. Between two pieces `stopping` is asked: True
    ends the evaluation, with None and nothing written. `write` and `put_evaluation` (`rundir.write_evaluation`) let no
    failure of the disk through.
    """
    ppo = setup.ppo
    run = _compile_evaluate(setup.model.config, ppo, setup.reward.device)  # type: ignore[arg-type]  # by identity
    held_out = setup.held_out
    length = max(len(row) for row in [*held_out.rows, *setup.prompts.rows])
    tokens, mask = left_pad(held_out.rows, length, setup.model.pad_id)
    count = len(tokens)
    size = min(setup.loop.batch_size, count)
    key = key_stream(setup.seed, "evaluation")
    said: dict[int, Responses] = {}  # of the last evaluations, by step

    def evaluate(step: int, state: RunState) -> dict[str, float] | None:
        pieces: list[Columns] = []
        responses: list[str] = []
        for number, first in enumerate(range(0, count, size)):
            if stopping():
                return None
            # The last piece is filled up with rows seen before, so that one program serves; they are cut off again.
            rows = np.arange(first, first + size) % count
            used = min(size, count - first)
            prompts = processes.feed(Prompts(tokens[rows], mask[rows], rows.astype(np.int32)))  # type: ignore[arg-type]
            result = processes.fetch(run(state.policy, frozen, prompts, jax.random.fold_in(key, number), setup.hyper))
            result = jax.tree.map(lambda x, used=used: x[:used], result)
            texts = decode_responses(setup.model, setup.ppo.sampling, result.rollout)
            pieces.append(collect_columns(setup, result, rows[:used], texts))
            responses += texts
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        values = summarise(columns)
        before = earlier_responses(directory, step, said)
        said[step] = dict(enumerate(responses[:SAMPLES]))
        if (same := count_unchanged(before, said[step])) is not None:
            values["unchanged"] = same
        evaluations[step] = values
        # First the samples: where the record stands, the evaluation is whole.
        scores = [name for name in columns if name not in NOT_SCORES]
        listed = {name: column.tolist() for name, column in columns.items()}
        put_evaluation(directory, step, held_out.texts[:SAMPLES], responses[:SAMPLES], listed, scores)
        write(step, "eval", values)
        if step == setup.loop.updates:
            _show(directory, step, screen)
        return values

    return evaluate


@functools.lru_cache(maxsize=8)
def _compile_evaluate(config: ModelConfig, ppo: PPOConfig, reward: DeviceReward | None) -> Evaluate:
    """One program for all runs of this process that evaluate alike: the members of a population."""
    return make_evaluate(Algorithm(config, ppo, make_optimizer(ppo.optimizer), reward))


def earlier_evaluations(directory: Path, phase: str = "eval", prefix: str = "") -> dict[int, dict[str, float]]:
    """Read what an interrupted run had already evaluated: by step, the values of `phase` whose names begin so."""
    found: dict[int, dict[str, float]] = {}
    for record in read_jsonl(directory / rundir.METRICS):
        names = [name for name in record if name.startswith(prefix) and name not in writers.RESERVED]
        if record["phase"] == phase and names:
            found.setdefault(record["step"], {}).update({name.removeprefix(prefix): record[name] for name in names})
    return found


def earlier_responses(directory: Path, step: int, said: dict[int, Responses]) -> Responses:
    """Find the responses of the last evaluation before `step`: in `said`, whose older ones go, or in samples.jsonl.

    A run that goes on finds them in the file, which is not there yet while the disk is full.
    """
    for old in sorted(at for at in said if at < step)[:-1]:
        del said[old]
    if any(at < step for at in said):
        return said[min(said)]
    try:
        found = [(s["step"], s["index"], s["response"]) for s in read_jsonl(directory / rundir.SAMPLES)]
    except (OSError, ValueError, KeyError):
        return {}  # the failure to write them has been reported
    last = max((at for at, _, _ in found if at < step), default=None)
    return {index: response for at, index, response in found if at == last}


def count_unchanged(before: Responses, after: Responses) -> float | None:
    """Compute the fraction of the responses that are, letter by letter, those of the evaluation before; None: no such.

    Evaluations draw with the same random numbers, so 1 tells of a policy that updates do not move.
    """
    same = [before[index] == response for index, response in after.items() if index in before]
    return float(np.mean(same)) if same else None


def collect_columns(setup: Setup, result: Evaluation, rows: np.ndarray, responses: Sequence[str]) -> Columns:
    """Collect one number per response and score, for the held-out prompts `rows`."""
    prompts, from_host = [setup.held_out.texts[i] for i in rows], None
    if setup.reward.host is not None:
        read = host_responses(setup, result.rollout)
        given = SplitReward(setup.reward.host)(prompts, read, [setup.held_out.metadata[i] for i in rows])
        from_host = as_scores(given, len(responses))
    scores = only_finite(add_scores(result.scores, from_host))
    valid = np.asarray(scores.valid)
    columns = {"valid": valid, "reward": np.asarray(scores.reward)}
    columns |= {f"reward/{name}": np.where(valid, np.asarray(part), np.nan) for name, part in scores.parts.items()}
    columns |= {name: np.asarray(judge(result.rollout, prompts, responses)) for name, judge in setup.judges.items()}
    columns["kl"] = np.asarray(result.kl)
    columns["tokens"] = np.asarray(result.rollout.response_mask).sum(axis=1)
    columns["ended"] = np.asarray(result.rollout.terminated)
    return columns


def summarise(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compute means and deviations. Rewards and their parts are those of the rows that were scored. All else is of all
    rows: a KL or a judge that is not a number there is a defect, and shows as one."""
    valid = columns["valid"]
    scores = {
        name: column[valid] if name == "reward" or name.startswith("reward/") else column
        for name, column in columns.items()
        if name not in NOT_SCORES
    }
    values = {name: _mean(column) for name, column in scores.items()}
    values |= {f"{name}_std": _std(column) for name, column in scores.items()}
    tokens = columns["tokens"]
    values["invalid_scores"] = float((~valid).mean())
    values["kl_per_token"] = float(columns["kl"].sum(dtype=np.float64) / max(tokens.sum(), 1))
    values["response_length"] = float(tokens.mean())
    values["eos_rate"] = float(columns["ended"].mean())
    return values


def _mean(column: np.ndarray) -> float:
    """Take the mean; NaN where there is nothing, as where every reward failed."""
    return float(np.mean(column, dtype=np.float64)) if column.size else float("nan")


def _std(column: np.ndarray) -> float:
    return float(np.std(column, ddof=1, dtype=np.float64)) if column.size > 1 else float("nan")


def _show(directory: Path, step: int, screen: Screen) -> None:
    """Show samples before and after; read from the file, since an earlier process may have written the first."""
    try:
        found = read_jsonl(directory / rundir.SAMPLES)
    except (OSError, ValueError):
        return  # the failure to write them has been reported
    sides = [[s for s in found if s["step"] == when][:SHOWN] for when in (0, step)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
        return
    before, after = ([sample["response"] for sample in side] for side in sides)
    scores, after_scores = ([_number(sample["scores"].get("reward")) for sample in side] for side in sides)
    screen.sample([sample["prompt"] for sample in sides[0]], before, after, scores, after_scores)


def _number(value: object) -> float:
    return float("nan") if value is None else float(str(value))
