"""A worker: PPO iterations of TRL 0.11's PPOTrainer (policy and critic share a trunk) on a workload.

python -m experiments.benchmarks.peers.trl_0_11 T 6
"""

import sys
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from experiments.benchmarks.peers.torch_models import config_of, prompts_of, tokenizer_of
from experiments.benchmarks.workloads import Clock, Workload, find_workload, peak_mib, report


def trainer_of(work: Workload) -> Any:
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=linear, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_config(config_of(work))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        model, peft_config=lora if work.adapter == "lora" else None
    )
    config = PPOConfig(
        learning_rate=1e-5,
        batch_size=work.batch,
        mini_batch_size=work.batch // work.micro_batches,
        gradient_accumulation_steps=work.micro_batches,
        ppo_epochs=work.epochs,
        seed=0,
    )
    return PPOTrainer(config, model, None, tokenizer_of(work))


def cut(response: torch.Tensor, stops: int) -> torch.Tensor:
    """A response up to its first stop token, which belongs to it."""
    ends = (response < stops).nonzero()
    return response[: ends[0, 0] + 1] if len(ends) else response


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    work, clock = find_workload(name), Clock()
    torch.manual_seed(0)
    trainer = trainer_of(work)
    reward = AutoModelForSequenceClassification.from_config(config_of(work)).eval()
    prompts = list(prompts_of(work))

    def generate() -> list[torch.Tensor]:
        drawn = trainer.generate(
            prompts,
            batch_size=work.batch,
            return_prompt=False,
            remove_padding=False,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=work.response,
            eos_token_id=list(range(work.stops)) or None,
            pad_token_id=0,
        )
        return [cut(response, work.stops) for response in drawn]

    @torch.no_grad()
    def score(responses: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return list(reward(input_ids=padded, attention_mask=mask).logits[:, 0])

    for _ in range(count):
        clock.begin()
        responses = clock.time("generate", generate)
        scores = clock.time("score", score, responses)
        clock.time("update", trainer.step, prompts, responses, scores)
    report(clock, peak_mib())


if __name__ == "__main__":
    main()
