"""Supervised fine-tuning in one run directory, the first of the classic stages.

    base --run_sft--> fine-tuned base --runs.reward.run_reward--> reward on that base --runs.ppo.run_ppo--> policy

The fine-tuned base is merged into one model: it is the reference of PPO and what the reward model's adapter sits on.
"""

from functools import partial
from pathlib import Path

from ppo_jax.data import SFTBatch, sft_batches
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.parallel.mesh import round_up_to_devices
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.offline import PassOn, StageResult, Work, export_policy, init_policy, train_offline
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.train.offline import in_order
from ppo_jax.train.sft import Demonstrations, bind_sft_step, evaluate, make_sft_loss
from ppo_jax.types import PyTree


def run_sft(directory: Path, setup: OfflineSetup, screen: Screen, resume: bool | Resume = "no") -> StageResult:
    """Fine-tune on demonstrations in an opened run directory; leave export/policy and, merged, export/model.

    It measures loss and perplexity (`train.sft.evaluate`). Raises ValueError when there are fewer demonstrations than a
    batch has rows, and else as `runs.offline.train_offline`.

    Args:
      setup: with an SFTConfig, and EncodedSFT or EncodedTurns as data.
    """
    model, sft, train, held_out = setup.model, setup.options, setup.train, setup.held_out
    masks, unseen_masks = (getattr(part, "masks", None) for part in (train, held_out))  # `EncodedTurns` has some
    batches = sft_batches(train.rows, train.starts, sft.batch_size, setup.seed, model.pad_id, masks, setup.mix)
    steps, size = sft.num_steps(len(train.rows)), round_up_to_devices(min(sft.micro_batch, len(held_out.rows)))
    whole = sft_batches(held_out.rows, held_out.starts, len(held_out.rows), 0, model.pad_id, unseen_masks)
    unseen = _demonstrations(whole[0])
    loss, base = make_sft_loss(model.config, sft.logprob_chunk), place_on_mesh(model.params)
    setup = setup._replace(model=model._replace(params=base))

    def measure(done: int, tuned: PyTree, pass_on: PassOn) -> dict[str, float]:
        return evaluate(loss, tuned, base, pass_on(in_order(unseen, size)))

    work = Work(
        phase="sft",
        steps=steps,
        params=init_policy(setup),
        bind_step=partial(bind_sft_step, base, model.config, sft),
        batches=lambda step: _demonstrations(batches[step]),
        measure=measure,
    )
    trained = train_offline(directory, setup, work, screen, resume)
    return export_policy(directory, setup, steps, trained, screen)


def _demonstrations(batch: SFTBatch) -> Demonstrations:
    return Demonstrations(batch.tokens, batch.mask, batch.loss_mask)  # type: ignore[arg-type]  # numpy until it is fed
