"""`ppo-jax dpo`: a policy from preference pairs alone, in one run directory (train.dpo is the method).

base --run_dpo--> policy                with the base as the reference, and no reward model in between
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ppo_jax import commands, distributed, processes
from ppo_jax.data import EncodedPairs, PairBatch, PairRecord, TooLong, encode_pairs, pair_batches, read_pairs
from ppo_jax.display import Screen, progress
from ppo_jax.generate import check_room
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.processes import is_first
from ppo_jax.runs import Model, load_model
from ppo_jax.settings import DPOSettings
from ppo_jax.stages import Phase, StageResult, filling, run_offline
from ppo_jax.train import offline
from ppo_jax.train.dpo import DPOConfig, Preferences, evaluate, make_measure, train_dpo


class Pairs(NamedTuple):
    """Token rows of prompt + response + EOS, and where the responses start."""

    encoded: EncodedPairs
    starts: Int[np.ndarray, "N 2"]  # of the chosen and of the rejected row


def dpo(settings: DPOSettings) -> None:
    """`ppo-jax dpo`."""
    with commands.on_mesh(settings, *commands.micro_batch("dpo", settings.dpo)):
        _dpo(settings)


def _dpo(settings: DPOSettings) -> None:
    model = load_model(settings.model, settings.compute)
    records = commands.set_apart(read_pairs(settings.pairs), settings.held_out, settings.seed)
    train, held_out = (encode(part, model.tokenizer, settings.max_length, settings.too_long) for part in records)
    sides = (train.encoded.chosen, train.encoded.rejected, held_out.encoded.chosen, held_out.encoded.rejected)
    check_room(model, [row for side in sides for row in side])
    if settings.dpo.batch_size > len(train.starts):
        raise ValueError(
            commands.too_few("--dpo.batch-size", settings.dpo.batch_size, len(train.starts), settings.pairs)
        )
    directory = distributed.run_directory(settings.run_dir, lambda: commands.open_directory(settings))
    with progress("ppo-jax dpo", is_first()) as screen:
        long = train.encoded.too_long + held_out.encoded.too_long
        commands.say_long(screen, long, settings.max_length, settings.too_long)
        result = run_dpo(directory, model, settings.adapter, train, held_out, settings.dpo, settings.seed, screen)
        screen.message(
            f"held-out pairs in the right order {100 * result.before['accuracy']:.1f} % -> "
            f"{100 * result.after['accuracy']:.1f} %; the model is at {result.path}"
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
    """The batch, still the host's, with the loss on its responses."""
    mask = np.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    loss_mask = mask & (np.arange(mask.shape[2]) >= starts[batch.index][..., None])
    tokens = np.stack([batch.chosen, batch.rejected], axis=1)
    return Preferences(tokens, mask, loss_mask)  # type: ignore[arg-type]  # numpy until it is fed


def run_dpo(
    directory: Path,
    model: Model,
    adapter: AdapterConfig,
    train: Pairs,
    held_out: Pairs,
    dpo: DPOConfig,
    seed: int,
    screen: Screen,
) -> StageResult:
    """Trains on pairs in an opened run directory; leaves export/policy and, merged, export/model.

    It measures the metrics of `train.dpo.preference_loss`. Raises ValueError when there are fewer pairs than a batch
    has.
    """
    batches = _batches(train, dpo.batch_size, seed, model.pad_id)
    steps, size = dpo.num_steps(len(train.starts)), filling(min(dpo.micro_batch, len(held_out.starts)))
    run, base = make_measure(model.config, dpo), processes.laid_out(model.params)
    return run_offline(
        directory,
        model._replace(params=base),
        adapter,
        Phase("dpo", steps, ("loss", "accuracy", "margin")),
        lambda tuned: evaluate(run, tuned, base, in_order(held_out, size, model.pad_id)),
        lambda tuned, write: train_dpo(
            tuned, base, model.config, dpo, lambda step: preferences(batches[step], train.starts), steps, write
        ),
        seed,
        screen,
    )


def in_order(pairs: Pairs, batch_size: int, pad_id: int) -> Iterator[Preferences]:
    """All pairs once, in batches of one shape: the last one is filled up with pairs whose loss mask is empty."""
    rows = _batches(pairs, len(pairs.starts), 0, pad_id)[0]
    return offline.in_order(preferences(rows, pairs.starts), batch_size)


def _batches(pairs: Pairs, batch_size: int, seed: int, pad_id: int) -> Any:
    encoded = pairs.encoded
    return pair_batches(encoded.chosen, encoded.rejected, encoded.margins, batch_size, seed, pad_id)
