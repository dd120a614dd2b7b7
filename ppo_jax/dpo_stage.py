"""`ppo-jax dpo`: a policy from preference pairs alone, in one run directory (train.dpo is the method).

base --run_dpo--> policy                with the base as the reference, and no reward model in between
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ppo_jax import commands, rundir
from ppo_jax.data import EncodedPairs, PairBatch, PairRecord, TooLong, encode_pairs, pair_batches, read_pairs
from ppo_jax.display import Screen, progress
from ppo_jax.generate import check_room
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.runs import Model, load_model, run_writer
from ppo_jax.stages import MODEL, POLICY, export_model, save_role
from ppo_jax.train.dpo import DPOConfig, Preferences, evaluate, make_measure, train_dpo
from ppo_jax.train.state import key_stream
from ppo_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class DPOSettings:
    """Train a policy on preferences without a reward model; the result is RUN_DIR/export/model."""

    model: str
    """Base and reference: Hugging Face directory, name on the hub, or .gguf file."""
    pairs: Path
    """Preferences, a JSON object per line: {"chosen", "rejected"}, optionally "prompt". Margins are not used."""
    run_dir: Path = Path("runs/dpo")
    """Where all results go."""
    seed: int = 0
    """Of the order of the data and of initialisation."""
    max_length: int = 512
    """Longest text (prompt, answer and EOS), in tokens."""
    too_long: TooLong = "error"
    """What to do with pairs that have a longer one."""
    held_out: int = 200
    """Pairs kept apart to measure on, at most a fifth; where that is none, the training ones are used."""
    adapter: AdapterConfig = AdapterConfig()
    """Which parameters are trained."""
    dpo: DPOConfig = DPOConfig()
    """How, and for how long."""
    overwrite: bool = False
    """Delete the run in run_dir and start anew."""


class Pairs(NamedTuple):
    """Token rows of prompt + response + EOS, and where the responses start."""

    encoded: EncodedPairs
    starts: Int[np.ndarray, "N 2"]  # of the chosen and of the rejected row


class DPOResult(NamedTuple):
    model: Model  # the trained one, merged; saved at export/model
    before: dict[str, float]  # metrics of train.dpo.preference_loss on the held-out pairs
    after: dict[str, float]


def dpo(settings: DPOSettings) -> None:
    """`ppo-jax dpo`."""
    model = load_model(settings.model)
    records = commands.set_apart(read_pairs(settings.pairs), settings.held_out, settings.seed)
    train, held_out = (encode(part, model.tokenizer, settings.max_length, settings.too_long) for part in records)
    sides = (train.encoded.chosen, train.encoded.rejected, held_out.encoded.chosen, held_out.encoded.rejected)
    check_room(model, [row for side in sides for row in side])
    if settings.dpo.batch_size > len(train.starts):
        raise ValueError(
            commands.too_few("--dpo.batch-size", settings.dpo.batch_size, len(train.starts), settings.pairs)
        )
    directory = commands.open_directory(settings)
    with progress("ppo-jax dpo") as screen:
        long = train.encoded.too_long + held_out.encoded.too_long
        commands.say_long(screen, long, settings.max_length, settings.too_long)
        result = run_dpo(directory, model, settings.adapter, train, held_out, settings.dpo, settings.seed, screen)
        screen.message(
            f"held-out pairs in the right order {100 * result.before['accuracy']:.1f} % -> "
            f"{100 * result.after['accuracy']:.1f} %; the model is at {result.model.name}"
        )


def encode(records: Sequence[PairRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error") -> Pairs:
    """`data.encode_pairs` with EOS, and the first response token of each row.

    Raises:
      ValueError: as `encode_pairs`; also with "truncate_left" if a response alone is too long.
    """
    encoded = encode_pairs(records, tokenizer, max_length, too_long)
    for row, kept in enumerate(encoded.kept):
        if min(encoded.starts[row]) < 0:
            raise ValueError(f"{records[kept].where}: a response alone does not fit into {max_length} tokens")
    return Pairs(encoded, np.asarray(encoded.starts, np.int32).reshape(-1, 2))


def preferences(batch: PairBatch, starts: Int[np.ndarray, "N 2"]) -> Preferences:
    """The batch on the device, with the loss on its responses."""
    mask = np.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    loss_mask = mask & (np.arange(mask.shape[2]) >= starts[batch.index][..., None])
    return Preferences(*map(jnp.asarray, (np.stack([batch.chosen, batch.rejected], axis=1), mask, loss_mask)))


def run_dpo(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    train: Pairs,
    held_out: Pairs,
    dpo: DPOConfig,
    seed: int,
    screen: Screen,
) -> DPOResult:
    """Trains on pairs in an opened run directory; leaves export/policy and, merged, export/model.

    Raises ValueError when there are fewer pairs than a batch has.
    """
    batches = _batches(train, dpo.batch_size, seed, model.pad_id)
    steps = dpo.num_steps(len(train.starts))
    files = run_writer(directory, screen)

    def write(step: int, values: Any) -> None:
        files(step, "dpo", values)
        screen.update(phase="dpo", step=step, total=steps, values=values)

    tuned = init_adapter(key_stream(seed, "adapter"), model.params, model.config, adapter)
    run = make_measure(model.config, dpo)
    size = min(dpo.batch_size // dpo.accumulate, len(held_out.starts))

    def measure(step: int, tuned: PyTree) -> dict[str, float]:
        values = evaluate(run, tuned, model.params, in_order(held_out, size, model.pad_id))
        write(step, {f"heldout_{name}": values[name] for name in ("loss", "accuracy", "margin")})
        return values

    before = measure(0, tuned)
    data = partial(_at, batches, train)
    tuned = train_dpo(tuned, model.params, model.config, dpo, data, steps, write)
    after = measure(steps, tuned)
    export = directory / rundir.EXPORT
    save_role(export / POLICY, "policy", tuned, {}, model, meta={"steps": steps, "heldout": after})
    return DPOResult(export_model(export / MODEL, model, tuned), before, after)


def in_order(pairs: Pairs, batch_size: int, pad_id: int) -> Iterator[Preferences]:
    """All pairs once, in batches of one shape: the last one is filled up with pairs whose loss mask is empty."""
    rows = _batches(pairs, len(pairs.starts), 0, pad_id)[0]
    count = len(pairs.starts)
    whole = preferences(rows, pairs.starts)
    for start in range(0, count, batch_size):
        index = np.arange(start, start + batch_size)
        piece = Preferences(*(x[np.minimum(index, count - 1)] for x in whole))
        yield piece._replace(loss_mask=piece.loss_mask & (index < count)[:, None, None])


def _at(batches: Any, pairs: Pairs, step: int) -> Preferences:
    return preferences(batches[step], pairs.starts)


def _batches(pairs: Pairs, batch_size: int, seed: int, pad_id: int) -> Any:
    encoded = pairs.encoded
    return pair_batches(encoded.chosen, encoded.rejected, encoded.margins, batch_size, seed, pad_id)
