"""`ppo-jax dpo`: a policy from preference pairs alone, in one run directory (train.dpo is the method).

base --run_dpo--> policy                with the base as the reference, and no reward model in between
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ppo_jax.data import EncodedPairs, PairBatch, PairRecord, TooLong, encode_pairs, pair_batches
from ppo_jax.data.batches import Mixture
from ppo_jax.data.llamafactory.encoding import Encoder
from ppo_jax.data.llamafactory.rows import encode_preferences
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.parallel.mesh import round_up_to_devices
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.offline import PassOn, StageResult, Work, export_policy, init_policy, train_offline
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup, check_reference
from ppo_jax.train import offline
from ppo_jax.train.dpo import Preferences, bind_dpo_step, evaluate, make_measure
from ppo_jax.types import PyTree


class Pairs(NamedTuple):
    """Token rows of prompt + response + EOS, and where the responses start."""

    encoded: EncodedPairs
    starts: Int[np.ndarray, "N 2"]  # of the chosen and of the rejected row


def encode(
    records: Sequence[PairRecord], tokenizer: Any | Encoder, max_length: int, too_long: TooLong = "error"
) -> Pairs:
    """Encode pairs as `data.encode_pairs` does, with EOS, and find the first response token of each row.

    Args:
      tokenizer: or a template of LLaMA-Factory, which encodes them in its way.

    Raises:
      ValueError: as `encode_pairs`; also with "truncate_left" if a response alone is too long.
    """
    by_template = isinstance(tokenizer, Encoder)
    encoded = (encode_preferences if by_template else encode_pairs)(records, tokenizer, max_length, too_long)
    for row, kept in enumerate(encoded.kept):
        if min(encoded.starts[row]) < 0:
            raise ValueError(f"{records[kept].where}: a response alone does not fit into {max_length} tokens")
    return Pairs(encoded, np.asarray(encoded.starts, np.int32).reshape(-1, 2))


def preferences(batch: PairBatch, starts: Int[np.ndarray, "N 2"]) -> Preferences:
    """Give the batch, still the host's, the loss on its responses."""
    mask = np.stack([batch.chosen_mask, batch.rejected_mask], axis=1)
    loss_mask = mask & (np.arange(mask.shape[2]) >= starts[batch.index][..., None])
    tokens = np.stack([batch.chosen, batch.rejected], axis=1)
    return Preferences(tokens, mask, loss_mask)  # type: ignore[arg-type]  # numpy until it is fed


def run_dpo(directory: Path, setup: OfflineSetup, screen: Screen, resume: bool | Resume = "no") -> StageResult:
    """Train on pairs in an opened run directory; leave export/policy and, merged, export/model.

    It measures the metrics of `train.dpo.preference_loss`. Raises ValueError when there are fewer pairs than a batch
    has, and else as `runs.offline.train_offline`.

    Args:
      setup: with a DPOConfig, and `Pairs` as data.
    """
    check_reference(setup.options.reference, "--dpo.reference", setup.start)
    model, dpo, train, held_out = setup.model, setup.options, setup.train, setup.held_out
    batches = _batches(train, dpo.batch_size, setup.seed, model.pad_id, setup.mix)
    steps, size = dpo.num_steps(len(train.starts)), round_up_to_devices(min(dpo.micro_batch, len(held_out.starts)))
    run, base = make_measure(model.config, dpo), place_on_mesh(model.params)
    reference = place_on_mesh(setup.start) if dpo.reference == "start" else None
    setup = setup._replace(model=model._replace(params=base))

    def measure(done: int, tuned: PyTree, pass_on: PassOn) -> dict[str, float]:
        return evaluate(run, tuned, base, pass_on(batch_in_order(held_out, size, model.pad_id)), reference)

    work = Work(
        phase="dpo",
        steps=steps,
        params=init_policy(setup),
        bind_step=partial(bind_dpo_step, base, model.config, dpo, reference=reference),
        batches=lambda step: preferences(batches[step], train.starts),
        measure=measure,
    )
    trained = train_offline(directory, setup, work, screen, resume)
    return export_policy(directory, setup, steps, trained, screen)


def batch_in_order(pairs: Pairs, batch_size: int, pad_id: int) -> Iterator[Preferences]:
    """Yield all pairs once, in batches of one shape: the last one is filled up with pairs whose loss mask is empty."""
    rows = _batches(pairs, len(pairs.starts), 0, pad_id)[0]
    return offline.in_order(preferences(rows, pairs.starts), batch_size)


def _batches(pairs: Pairs, batch_size: int, seed: int, pad_id: int, mix: Mixture | None = None) -> Any:
    encoded = pairs.encoded
    return pair_batches(encoded.chosen, encoded.rejected, encoded.margins, batch_size, seed, pad_id, mix)
