"""Supervised fine-tuning in one run directory, and what the stages have in common.

    base --run_sft--> fine-tuned base --reward_stage.run_reward--> reward on that base --runs.run_ppo--> policy

The fine-tuned base is merged into one model: it is the reference of PPO and what the reward model's adapter sits on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from ppo_jax import artifacts, rundir
from ppo_jax.data import EncodedSFT, sft_batches
from ppo_jax.display import Screen
from ppo_jax.models import hf
from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.runs import Model, run_writer
from ppo_jax.train.sft import Demonstrations, SFTConfig, evaluate, in_order, make_sft_loss, train_sft
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree

MODEL, POLICY, REWARD = "model", "policy", "reward"  # folders in a run's export/


class SFTResult(NamedTuple):
    model: Model  # the fine-tuned one, merged; saved at export/model
    before: dict[str, float]  # loss and perplexity on the held-out demonstrations
    after: dict[str, float]


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
    write = phase_writer(directory, screen, "sft", steps)
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


def phase_writer(directory: Path, screen: Screen, phase: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
    """write(step, values) of one phase, to the run's files and onto the screen."""
    files = run_writer(directory, screen)

    def write(step: int, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        screen.update(phase=phase, step=step, total=total, values=values)

    return write


def _demonstrations(batch: object) -> Demonstrations:
    return Demonstrations(*(jnp.asarray(getattr(batch, name)) for name in Demonstrations._fields))
