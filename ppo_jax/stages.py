"""The two stages before PPO, each in one run directory: supervised fine-tuning and the reward model.

    base --run_sft--> fine-tuned base --run_reward--> reward on that base --runs.run_ppo--> policy

The fine-tuned base is merged into one model: it is the reference of PPO and what the reward model's adapter sits on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ppo_jax import artifacts, rundir
from ppo_jax.data import EncodedPairs, EncodedSFT, PairBatch, pair_batches, sft_batches
from ppo_jax.display import Screen
from ppo_jax.models import hf
from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.runs import Model, run_writer
from ppo_jax.train.loop import means
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward_model import (
    Comparisons,
    RewardConfig,
    bucket_texts,
    fit_head,
    head_scores,
    init_role,
    make_reward_step,
    normalise_head,
    text_features,
)
from ppo_jax.train.sft import Demonstrations, SFTConfig, evaluate, in_order, make_sft_loss, train_sft
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree

MODEL, POLICY, REWARD = "model", "policy", "reward"  # folders in a run's export/


class SFTResult(NamedTuple):
    model: Model  # the fine-tuned one, merged; saved at export/model
    before: dict[str, float]  # loss and perplexity on the held-out demonstrations
    after: dict[str, float]


class RewardResult(NamedTuple):
    role: RewardRole
    trunk: ModelConfig  # what the role reads of the base
    accuracy: float  # fraction of held-out pairs in the right order; ties count half


def run_sft(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    train: EncodedSFT,
    held_out: EncodedSFT,
    sft: SFTConfig,
    seed: int,
    screen: Screen,
) -> SFTResult:
    """Fine-tunes on demonstrations in an opened run directory; leaves export/policy and, merged, export/model.

    Raises ValueError when there are fewer demonstrations than a batch has rows.
    """
    batches = sft_batches(train.rows, train.starts, sft.batch_size, seed, model.pad_id)
    steps = sft.num_steps(len(train.rows))
    write = _writer(directory, screen, "sft", steps)
    tuned = init_adapter(key_stream(seed, "adapter"), model.params, model.config, adapter)
    loss = make_sft_loss(model.config, sft.logprob_chunk)
    held_batch = min(sft.batch_size // sft.accumulate, len(held_out.rows))
    all_held = sft_batches(held_out.rows, held_out.starts, len(held_out.rows), 0, model.pad_id)[0]

    def measure(step: int, tuned: PyTree) -> dict[str, float]:
        values = evaluate(loss, tuned, model.params, in_order(_demonstrations(all_held), held_batch))
        write(step, {f"heldout_{name}": values[name] for name in ("loss", "perplexity")})
        return values

    before = measure(0, tuned)
    tuned = train_sft(tuned, model.params, model.config, sft, lambda step: _demonstrations(batches[step]), steps, write)
    after = measure(steps, tuned)
    export = directory / rundir.EXPORT
    save_role(export / POLICY, "policy", tuned, {}, model, meta={"steps": steps, "heldout": after})
    return SFTResult(export_model(export / MODEL, model, tuned), before, after)


def run_reward(
    directory: Path,
    model: Model,
    reward: RewardConfig,
    train: EncodedPairs,
    held_out: EncodedPairs,
    seed: int,
    screen: Screen,
) -> RewardResult:
    """Trains a reward model on preference pairs in an opened run directory; leaves export/reward.

    The head is fitted on frozen features, then adapter and head together; scores have mean 0 and std 1 on the
    training texts. Raises ValueError when there are fewer pairs than a batch has.
    """
    trunk, count, per_batch = reward.trunk(model.config), len(train.chosen), reward.batch_size // 2
    if per_batch > count:
        raise ValueError(f"batch_size={reward.batch_size} texts are {per_batch} pairs, but there are {count}")
    steps = math.ceil(reward.epochs * count / per_batch) if reward.lora_layers else 0
    write = _writer(directory, screen, "reward", steps)
    role = init_role(key_stream(seed, "reward"), model.config, reward)

    screen.message(f"reward model: reading {2 * count} texts")
    features = _features(model, role, trunk, train, reward.batch_size)
    first = np.arange(count)
    margins = np.asarray(train.margins, np.float32)
    role = role._replace(head=fit_head(features, first, count + first, reward.head_l2, reward.head_steps, margins))
    accuracy = _accuracy(model, role, trunk, held_out, reward.batch_size)
    write(0, {"heldout_accuracy": accuracy})
    if steps:
        role = _train_role(model, role, trunk, reward, train, steps, seed, write)
        features = _features(model, role, trunk, train, reward.batch_size)
        accuracy = _accuracy(model, role, trunk, held_out, reward.batch_size)
        write(steps, {"heldout_accuracy": accuracy})
    role = role._replace(head=normalise_head(role.head, head_scores(role.head, features)))
    meta = {"accuracy": accuracy, "heldout_pairs": len(held_out.chosen), "pairs": count}
    path = directory / rundir.EXPORT / REWARD
    save_role(path, "reward", role.adapter, role.head, model, meta=meta, layers=trunk.num_layers)
    return RewardResult(role, trunk, accuracy)


def comparisons(batch: PairBatch) -> Comparisons:
    """Chosen texts in the first half of the rows, rejected in the second; row i is preferred to row B + i."""
    pairs, length = batch.chosen.shape
    better = np.zeros((2 * pairs, 2 * pairs), bool)
    margin = np.zeros(better.shape, np.float32)
    first = np.arange(pairs)
    better[first, pairs + first] = True
    margin[first, pairs + first] = batch.margin
    tokens = np.concatenate([batch.chosen, batch.rejected])
    mask = np.concatenate([batch.chosen_mask, batch.rejected_mask])
    return Comparisons(*map(jnp.asarray, (tokens, mask, better, margin)))


def save_role(
    path: Path,
    kind: artifacts.Kind,
    adapter: PyTree,
    head: PyTree,
    model: Model,
    meta: dict,
    layers: int | None = None,
) -> None:
    """An artifact of this model, replacing the one that an interrupted run may have left."""
    artifacts.save(
        path,
        kind,
        adapter,
        head,
        meta,
        config=model.config,
        base=model.name,
        base_fingerprint=model.fingerprint,
        layers=layers,
        overwrite=True,
    )


def export_model(path: Path, model: Model, adapter: PyTree) -> Model:
    """Writes base and adapter, merged, as a Hugging Face directory with tokenizer; returns that model."""
    params = merge(model.params, adapter, model.config)
    hf.save(path, model.config, params, model.tokenizer, overwrite=True)
    return model._replace(name=str(path), params=params, fingerprint=artifacts.fingerprint(path))


def _writer(directory: Path, screen: Screen, phase: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
    """write(step, values) of one phase, to the run's files and onto the screen."""
    files = run_writer(directory, screen)

    def write(step: int, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        screen.update(phase=phase, step=step, total=total, values=values)

    return write


def _demonstrations(batch: object) -> Demonstrations:
    return Demonstrations(*(jnp.asarray(getattr(batch, name)) for name in Demonstrations._fields))


def _train_role(
    model: Model,
    role: RewardRole,
    trunk: ModelConfig,
    reward: RewardConfig,
    train: EncodedPairs,
    steps: int,
    seed: int,
    write: Callable[[int, Mapping[str, float]], None],
) -> RewardRole:
    """Adapter and head together; Adam, its learning rate falling linearly to 0."""
    per_batch = reward.batch_size // 2
    batches = pair_batches(train.chosen, train.rejected, train.margins, per_batch, seed, model.pad_id)
    optimizer = make_optimizer()
    step, opt_state = make_reward_step(trunk, optimizer, reward.max_grad_norm), optimizer.init(role)
    for number in range(steps):
        rate = reward.learning_rate * (1 - number / steps)
        role, opt_state, measured = step(role, opt_state, model.params, comparisons(batches[number]), rate)
        values = means(measured)
        write(number + 1, values)
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"step {number + 1}: the loss is {values['loss']}; lower the learning rate")
    return role


def _features(
    model: Model, role: RewardRole, trunk: ModelConfig, pairs: EncodedPairs, batch_size: int
) -> Float[np.ndarray, "N D"]:
    """What the head reads of all chosen texts, then of all rejected ones."""
    rows: Sequence[Sequence[int]] = [*pairs.chosen, *pairs.rejected]
    longest = max(map(len, rows))
    lengths = sorted({-(-longest // 4), -(-longest // 2), longest})
    return text_features(model.params, role, trunk, bucket_texts(rows, lengths, model.pad_id), batch_size)


def _accuracy(model: Model, role: RewardRole, trunk: ModelConfig, pairs: EncodedPairs, batch_size: int) -> float:
    chosen, rejected = np.split(head_scores(role.head, _features(model, role, trunk, pairs, batch_size)), 2)
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))
