"""A worker: PPO iterations of TRL's newest trainer (`trl.experimental.ppo`; its critic is a model of its own).

    python -m experiments.benchmarks.peers.trl_new T-critic 6

Its loop is one function; a callback takes the time after every iteration, and generation is timed inside.
"""

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from experiments.benchmarks.peers.torch_models import config_of, prompts_of, tokenizer_of
from experiments.benchmarks.workloads import Clock, find_workload, peak_mib, report


class Times(TrainerCallback):
    """Closes an iteration of the clock: what was not generation is put down as the rest."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.last = clock, (time.perf_counter(), time.process_time())
        clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        generated = self.clock.iterations[-1].get("generate", [0.0, 0.0])
        rest = [after - before - part for after, before, part in zip(now, self.last, generated, strict=True)]
        self.clock.iterations[-1]["score and update"] = rest
        self.clock.begin()
        self.last = now


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    work, clock = find_workload(name), Clock()
    torch.manual_seed(0)
    config = config_of(work)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            learning_rate=1e-5,
            per_device_train_batch_size=work.batch // work.micro_batches,
            gradient_accumulation_steps=work.micro_batches,
            num_mini_batches=1,
            num_ppo_epochs=work.epochs,
            local_rollout_forward_batch_size=work.batch,
            total_episodes=work.batch * count,
            response_length=work.response,
            temperature=1.0,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        rows = Dataset.from_dict({"input_ids": prompts_of(work).repeat(count, 1).tolist()})
        policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
        reward, critic = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer_of(work),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=rows,
            eval_dataset=rows.select(range(work.batch)),
            callbacks=[],
        )
        whole = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = lambda *given: clock.time("generate", whole, *given)
        trainer.add_callback(Times(clock))
        trainer.train()
    clock.iterations.pop()  # opened after the last one
    report(clock, peak_mib())


if __name__ == "__main__":
    main()
