"""Supervised fine-tuning in one run directory, and what the stages have in common.

    base --run_sft--> fine-tuned base --reward_stage.run_reward--> reward on that base --runs.run_ppo--> policy

The fine-tuned base is merged into one model: it is the reference of PPO and what the reward model's adapter sits on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ppo_jax import artifacts, processes, rundir
from ppo_jax.artifacts import MODEL, POLICY, REWARD
from ppo_jax.data import EncodedSFT, SFTBatch, sft_batches
from ppo_jax.display import Screen
from ppo_jax.models import hf
from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.runs import Model, run_writer
from ppo_jax.train.offline import in_order
from ppo_jax.train.sft import Demonstrations, SFTConfig, evaluate, make_sft_loss, train_sft
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree

PhaseWriter = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class StageResult:
    """A policy that was trained on fixed data."""

    base: Model
    adapter: PyTree
    path: Path  # of the model: both merged, a Hugging Face directory
    before: dict[str, float]  # what the stage measures on the held-out data
    after: dict[str, float]

    @functools.cached_property
    def model(self) -> Model:
        """The model at `path`, merged in memory; made when it is first asked for, by all processes together."""
        fresh = lambda params, adapter: merge(params, adapter, self.base.config)  # noqa: E731
        params = processes.created(fresh, self.base.params, self.adapter)
        fingerprint = processes.first_writes(lambda _: artifacts.fingerprint(self.path))
        return self.base._replace(name=str(self.path), params=params, fingerprint=fingerprint or "")


def run_sft(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    train: EncodedSFT,
    held_out: EncodedSFT,
    sft: SFTConfig,
    seed: int,
    screen: Screen,
) -> StageResult:
    """Fine-tunes on demonstrations in an opened run directory; leaves export/policy and, merged, export/model.

    It measures loss and perplexity (`train.sft.evaluate`). Raises ValueError when there are fewer demonstrations than a
    batch has rows.
    """
    batches = sft_batches(train.rows, train.starts, sft.batch_size, seed, model.pad_id)
    steps, size = sft.num_steps(len(train.rows)), filling(min(sft.micro_batch, len(held_out.rows)))
    unseen = _demonstrations(sft_batches(held_out.rows, held_out.starts, len(held_out.rows), 0, model.pad_id)[0])
    loss, base = make_sft_loss(model.config, sft.logprob_chunk), processes.laid_out(model.params)
    return run_offline(
        directory,
        model._replace(params=base),
        adapter,
        Phase("sft", steps, ("loss", "perplexity")),
        lambda tuned: evaluate(loss, tuned, base, in_order(unseen, size)),
        lambda tuned, write: train_sft(
            tuned, base, model.config, sft, lambda step: _demonstrations(batches[step]), steps, write
        ),
        seed,
        screen,
    )


class Phase(NamedTuple):
    """What a stage is called in the log, how long it is, and what of its measurements is written there."""

    name: str
    steps: int
    shown: tuple[str, ...]


def run_offline(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    phase: Phase,
    measure: Callable[[PyTree], dict[str, float]],
    train: Callable[[PyTree, PhaseWriter], PyTree],
    seed: int,
    screen: Screen,
) -> StageResult:
    """A fresh adapter, measured, trained, measured again, and saved: export/policy and, merged, export/model.

    On a mesh the adapter is born on its shards, every process takes part, and the first one writes.

    Args:
      measure: adapter -> what it is worth.
      train: (adapter, which it may donate; write) -> the trained adapter.
    """
    write = phase_writer(directory, screen, phase.name, phase.steps)

    def measured(step: int, tuned: PyTree) -> dict[str, float]:
        values = measure(tuned)
        write(step, {f"heldout_{name}": values[name] for name in phase.shown})
        return values

    key = key_stream(seed, "adapter")
    tuned = processes.created(lambda k, base: init_adapter(k, base, model.config, adapter), key, model.params)
    before = measured(0, tuned)
    tuned = train(tuned, write)
    after = measured(phase.steps, tuned)
    export = directory / rundir.EXPORT
    save_role(export / POLICY, "policy", tuned, {}, model, meta={"steps": phase.steps, "heldout": after})
    write_model(export / MODEL, model, tuned)
    return StageResult(model, tuned, export / MODEL, before, after)


def filling(rows: int) -> int:
    """`rows`, rounded up on a mesh to a multiple of the devices that cut the batch."""
    mesh = processes.current_mesh()
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // parts) * parts


def save_role(
    path: Path,
    kind: artifacts.Kind,
    adapter: PyTree,
    head: PyTree,
    model: Model,
    meta: dict,
    layers: int | None = None,
) -> None:
    """An artifact of this model, replacing the one that an interrupted run may have left. All processes call it."""
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


def write_model(path: Path, model: Model, adapter: PyTree) -> None:
    """Writes base and adapter, merged tensor by tensor, as a Hugging Face directory. All processes call it."""
    hf.save(path, model.config, model.params, model.tokenizer, adapter=adapter, overwrite=True)


def phase_writer(directory: Path, screen: Screen, phase: str, total: int) -> PhaseWriter:
    """write(step, values) of one phase, to the run's files and onto the screen."""
    files = run_writer(directory, screen)

    def write(step: int, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        screen.update(phase=phase, step=step, total=total, values=values)

    return write


def _demonstrations(batch: SFTBatch) -> Demonstrations:
    return Demonstrations(batch.tokens, batch.mask, batch.loss_mask)  # type: ignore[arg-type]  # numpy until it is fed
