"""The dump of the batch that training stopped at: arrays without pickle, and the texts to read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.data.disk import make_directory, publish
from ppo_jax.data.jsonl import append_jsonl
from ppo_jax.parallel import processes
from ppo_jax.rewards.combine import add_scores
from ppo_jax.rewards.scores import as_scores
from ppo_jax.runs.output import rundir
from ppo_jax.runs.setup import Setup, decode_responses, host_responses
from ppo_jax.train.experience import reference_logprobs, score_rollout, share_prefix
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm
from ppo_jax.train.ppo import collect
from ppo_jax.train.state import RunState, TrainState
from ppo_jax.types import Frozen, Hyper, Prompts, Rollout, Scores

Dump = Callable[[int, RunState, Hyper], str]


def dumper(directory: Path, setup: Setup, frozen: Frozen, prompts: Callable[[int], Prompts]) -> Dump:
    """Return dump(step, state, hyper), which samples the batch of iteration `step` again and writes it into `faults/`.

    All optimizer steps of that iteration were skipped, so the policy in `state` is the one that wrote the batch, and
    its key is fold_in(state.key, step): the tokens are the same. Two files per update: .npz with tokens, masks,
    log-probs of policy and reference, values and scores; .jsonl with the texts. Returns a sentence for the error.
    """

    def dump(step: int, state: RunState, hyper: Hyper) -> str:
        known: Any = state
        before = dataclasses.replace(known, step=jnp.asarray(step, state.step.dtype))
        rollout, reference, scores = processes.fetch(_again(setup)(before, frozen, prompts(step), hyper))
        texts = decode_responses(setup.model, setup.ppo.sampling, rollout)
        rows = [int(i) for i in rollout.index]
        asked = [setup.prompts.texts[i] for i in rows]
        scores = add_scores(scores, _host_scores(setup, asked, host_responses(setup, rollout), rows))
        path = directory / rundir.FAULTS / f"update-{step + 1}"
        arrays = {name: value for name, value in rollout._asdict().items() if value is not None}
        arrays |= {"ref_logprobs": reference, "reward": scores.reward, "valid": scores.valid}
        arrays |= {f"part {name}": part for name, part in scores.parts.items()}
        host = {name: np.asarray(value) for name, value in arrays.items()}
        finite = np.isfinite(host["policy_logprobs"] + host["ref_logprobs"] + host["values"]) | ~host["response_mask"]
        records = [
            {
                "prompt": asked[i],
                "response": texts[i],
                "reward": float(host["reward"][i]),
                "valid": bool(host["valid"][i]),
                "finite": bool(finite[i].all()),  # log-probs and values of this row
            }
            for i in range(len(rows))
        ]
        try:
            make_directory(path.parent)
            partial = path.with_suffix(".tmp")
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **host)
            publish(partial, path.with_suffix(".npz"))
            append_jsonl(partial, records)
            publish(partial, path.with_suffix(".jsonl"))
        except OSError as error:
            return f". The batch could not be written to {path}: {error}"
        return f". The batch is in {path}.npz and .jsonl"

    return dump


def _again(setup: Setup) -> Callable[..., tuple[Rollout, jax.Array, Scores | None]]:
    """Compile the first half of an iteration, with the reference's log-probs."""
    ppo = setup.ppo
    algorithm = Algorithm(setup.model.config, ppo, make_optimizer(ppo.optimizer), setup.reward.device)

    def run(
        state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper
    ) -> tuple[Rollout, jax.Array, Scores | None]:
        rollout = collect(algorithm, state, frozen, prompts, hyper)
        collected = share_prefix(algorithm, state.policy, frozen, rollout)
        reference = reference_logprobs(algorithm.model, frozen, collected, hyper, ppo.logprob_chunk)
        scores = None if algorithm.reward is None else score_rollout(algorithm.reward, frozen, collected)
        return rollout, reference, scores

    return jax.jit(run)


def _host_scores(setup: Setup, prompts: list[str], responses: list[str], rows: list[int]) -> Scores | None:
    """Ask the host's reward again; NaN where it fails altogether, since this must not hide why the run stopped."""
    if setup.reward.host is None:
        return None
    try:
        return as_scores(setup.reward.host(prompts, responses, [setup.prompts.metadata[i] for i in rows]), len(rows))
    except Exception:
        nothing = np.full(len(rows), np.nan, np.float32)
        return Scores(jnp.asarray(nothing), jnp.zeros(len(rows), bool), {})
