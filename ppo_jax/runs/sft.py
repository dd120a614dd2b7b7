"""Supervised fine-tuning in one run directory, and what the stages have in common.

    base --run_sft--> fine-tuned base --reward_stage.run_reward--> reward on that base --runs.run_ppo--> policy

The fine-tuned base is merged into one model: it is the reference of PPO and what the reward model's adapter sits on.
"""

from pathlib import Path

from ppo_jax.data import EncodedSFT, SFTBatch, sft_batches
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel.mesh import round_up_to_devices
from ppo_jax.runs.offline import Phase, StageResult, run_offline
from ppo_jax.runs.output.screen import Screen
from ppo_jax.train.offline import in_order
from ppo_jax.train.sft import Demonstrations, SFTConfig, evaluate, make_sft_loss, train_sft


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
    """Fine-tune on demonstrations in an opened run directory; leave export/policy and, merged, export/model.

    It measures loss and perplexity (`train.sft.evaluate`). Raises ValueError when there are fewer demonstrations than a
    batch has rows.
    """
    batches = sft_batches(train.rows, train.starts, sft.batch_size, seed, model.pad_id)
    steps, size = sft.num_steps(len(train.rows)), round_up_to_devices(min(sft.micro_batch, len(held_out.rows)))
    unseen = _demonstrations(sft_batches(held_out.rows, held_out.starts, len(held_out.rows), 0, model.pad_id)[0])
    loss, base = make_sft_loss(model.config, sft.logprob_chunk), place_on_mesh(model.params)
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


def _demonstrations(batch: SFTBatch) -> Demonstrations:
    return Demonstrations(batch.tokens, batch.mask, batch.loss_mask)  # type: ignore[arg-type]  # numpy until it is fed
