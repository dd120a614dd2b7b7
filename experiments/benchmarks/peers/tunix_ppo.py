"""A worker: PPO iterations of Tunix's PPOLearner (its critic is a model of its own; the reward a rule).

    python -m experiments.benchmarks.peers.tunix_ppo T-rule 6

Its Qwen2 stands in (a Llama but for the biases of q, k and v): in 0.1.7 the Llama does not take what PPO gives it. Its
loop is one function: an iteration lasts from one batch of prompts to the next; generation is timed inside.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import create_critic_model

from experiments.benchmarks.workloads import Clock, Workload, find_workload, peak_mib, report


def model_of(work: Workload) -> Qwen2:
    shape = work.shape
    config = ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocabulary,
        embed_dim=shape.width,
        hidden_dim=shape.mlp,
        num_heads=shape.heads,
        head_dim=shape.head_width,
        num_kv_heads=shape.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        use_tied_embedding=False,  # the critic's head takes the place of this one
    )
    return Qwen2(config, rngs=nnx.Rngs(0))


def tokenizer_of(work: Workload) -> Any:
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(work.shape.vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", bos_token="w2")


def cluster_of(work: Workload, count: int, folder: str) -> RLCluster:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        actor_optimizer=optax.adam(1e-5),
        critic_optimizer=optax.adam(1e-5),
        mini_batch_size=work.batch,
        train_micro_batch_size=work.batch // work.micro_batches,
        rollout_micro_batch_size=work.batch,
        eval_every_n_steps=10**9,
        max_steps=work.epochs * count,
        checkpoint_root_directory=None,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=work.response,
        max_prompt_length=work.prompt,
        kv_cache_size=2 * work.prompt + work.response + 8,  # it may take prompts for longer than they are
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[work.shape.vocabulary - 1] if not work.stops else list(range(work.stops)),
    )
    roles = {role: mesh for role in (Role.ACTOR, Role.CRITIC, Role.REFERENCE, Role.ROLLOUT)}
    actor = model_of(work)
    return RLCluster(
        actor=actor,
        critic=create_critic_model(actor),
        reference=model_of(work),
        tokenizer=tokenizer_of(work),
        cluster_config=ClusterConfig(role_to_mesh=roles, training_config=training, rollout_config=rollout),
    )


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    work, clock = find_workload(name), Clock()
    rng = np.random.default_rng(0)
    marks: list[tuple[float, float]] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(count):
            marks.append((time.perf_counter(), time.process_time()))
            clock.begin()
            rows = rng.integers(3, work.shape.vocabulary, (work.batch, work.prompt - 1))  # a BOS comes before
            yield {"prompts": np.array([" ".join(f"w{i}" for i in row) for row in rows])}

    def rule(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [len(text) % 7 / 7 for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        cluster = cluster_of(work, count, folder)
        whole = cluster.generate
        cluster.generate = lambda *given, **named: clock.time("generate", whole, *given, **named)
        learner = PPOLearner(cluster, PPOConfig(num_iterations=work.epochs), reward_fns=rule)
        learner.train(batches())
        marks.append((time.perf_counter(), time.process_time()))
    for iteration, before, after in zip(clock.iterations, marks, marks[1:], strict=False):
        spent = iteration.setdefault("generate", [0.0, 0.0])
        iteration["score and update"] = [b - a - part for a, b, part in zip(before, after, spent, strict=True)]
    report(clock, peak_mib())


if __name__ == "__main__":
    main()
