"""A worker of `experiments.benchmarks.side_by_side`: PPO iterations of ppo_jax on a workload, phase by phase.

    python -m experiments.benchmarks.ours T 6

Random weights of the workload's shape: seconds do not depend on their values.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.workloads import Clock, Workload, find_workload, peak_mib, report
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.layout import init_params
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.model import FullReward, model_reward
from ppo_jax.rollout import Sampling, generate
from ppo_jax.runs.memory import trim_after_compiling
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import CriticConfig, PPOConfig
from ppo_jax.train.ppo import make_host_iteration
from ppo_jax.train.state import Collect, Learn, TrainState, init_state
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, PyTree, Rollout, Scores

HYPER = Hyper(learning_rate=1e-5, temperature=1.0)


def model_of(work: Workload) -> ModelConfig:
    shape = work.shape
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_width,
    )


def options_of(work: Workload) -> PPOConfig:
    whole = AdapterConfig(kind="full")
    return PPOConfig(
        sampling=Sampling(response_length=work.response, stop_ids=tuple(range(work.stops)), slots=work.slots),
        epochs=work.epochs,
        num_minibatches=1,
        accumulate=work.micro_batches,
        length_buckets=work.length_buckets,
        logprob_chunk=work.logprob_chunk,
        critic=CriticConfig(own=True, adapter=whole) if work.own_critic else CriticConfig(),
    )


def start(work: Workload, config: ModelConfig, base: PyTree) -> tuple[TrainState, Frozen]:
    """A fresh state, and what it reads."""
    key = jax.random.key(1)
    whole = AdapterConfig(kind="full")
    lora = AdapterConfig(kind="lora", rank=work.rank, layers=work.layers)
    adapter = init_adapter(key, base, config, whole if work.adapter == "full" else lora)
    critic = init_adapter(key, base, config, whole) if work.own_critic else None
    state = init_state(key, adapter, config, make_optimizer(), 0.05, critic=critic)
    head = RewardHead().init(key, jnp.zeros((1, config.hidden_size)))["params"]
    if work.reward == "lora":
        return state, Frozen(base, RewardRole(init_adapter(key, base, config, lora), head))
    return state, Frozen(base, FullReward(base, head) if work.reward == "model" else None)


def prompts_of(work: Workload) -> Prompts:
    tokens = np.random.default_rng(0).integers(work.stops, work.shape.vocabulary, (work.batch, work.prompt))
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool), jnp.arange(work.batch))


def scorer_of(work: Workload, config: ModelConfig) -> Any:
    """(frozen, rollout) -> scores, compiled; of a LoRA reward nothing, since the update scores on the shared prefix."""
    if work.reward == "model":
        reward = model_reward(config, ())
        return jax.jit(lambda frozen, rollout: reward(frozen, rollout, None, 0))

    def rule(frozen: Frozen, rollout: Rollout) -> Scores:
        odd = rollout.tokens % 2 * (work.reward == "rule")
        score = jnp.sum(odd * rollout.mask, axis=1) / jnp.sum(rollout.mask, axis=1)
        return Scores(score.astype(jnp.float32), jnp.ones(score.shape, bool), {})

    return jax.jit(rule)


def halves_of(work: Workload, config: ModelConfig) -> tuple[Collect, Learn]:
    """Rollout and update, compiled; a LoRA reward is part of the update."""
    reward = adapter_reward(config, ()) if work.reward == "lora" else None
    return make_host_iteration(config, options_of(work), make_optimizer(), reward)


def iterate(work: Workload, count: int, clock: Clock) -> None:
    """So many PPO iterations under the clock; the first one compiles."""
    config = model_of(work)
    base = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    state, frozen = start(work, config, base)
    collect, learn = halves_of(work, config)
    score, prompts = scorer_of(work, config), prompts_of(work)

    def finish(step: Any, *inputs: Any) -> Any:
        return jax.block_until_ready(step(*inputs))

    for _ in range(count):
        clock.begin()
        rollout = clock.time("generate", finish, collect, state, frozen, prompts, HYPER)
        scores = clock.time("score", finish, score, frozen, rollout)
        state, _ = clock.time("update", finish, learn, state, frozen, rollout, scores, HYPER)
        lengths = np.asarray(rollout.response_mask).sum(axis=1)
        print(f"response lengths {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}", file=sys.stderr)


def least_seconds(work: Any, *inputs: Any, tries: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of a compiled function."""
    jax.block_until_ready(work(*inputs))
    found = []
    for _ in range(tries):
        began = clock()
        jax.block_until_ready(work(*inputs))
        found.append(clock() - began)
    return min(found)


def median_seconds(calls: Sequence[Callable[[], Any]], tries: int, clock: Callable[[], float]) -> list[float]:
    """Of each, in turns, so that all have the same neighbours on the machine; the first turn compiles."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(tries + 1):
        for call, seconds in zip(calls, found, strict=True):
            began = clock()
            jax.block_until_ready(call())
            seconds.append(clock() - began)
    return [float(np.median(seconds[1:])) for seconds in found]


def product_rate(size: int = 1536) -> float:
    """Multiplications and additions per second of a product of square matrices: the peak, as XLA reaches it."""
    square = jnp.ones((size, size))
    return 2 * size**3 / least_seconds(jax.jit(jnp.matmul), square, square)


def decode_step(
    work: Workload, rows: int, steps: int = 16, tries: int = 5, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of a decoding step, and those of its products alone, one layer after another with nothing in between."""
    config = model_of(work)
    base = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    policy = Policy({}, start(work, config, base)[0].policy.value_head)
    tokens = jnp.ones((rows, work.prompt), jnp.int32)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.arange(rows))

    def draw(length: int) -> Callable[[], Any]:
        sampling = Sampling(response_length=length)
        function = jax.jit(lambda base, policy, key: generate(base, policy, config, prompts, key, sampling))
        return lambda: function(base, policy, jax.random.key(0))

    layers = [{name: stack[i] for name, stack in base["layers"].items()} for i in range(config.num_layers)]

    def products(layers: list[PyTree], table: jax.Array, x: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            for layer in layers:
                q, k, v = (x @ layer[name] for name in ("q", "k", "v"))
                x += q @ layer["o"] + 0 * (k.sum() + v.sum())
                x += ((x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
            return x + 0 * (x @ table.T).sum(axis=-1, keepdims=True)

        return jax.lax.fori_loop(0, steps, step, x)

    start_at = jnp.full((rows, config.hidden_size), 1e-9)
    products_alone = jax.jit(products)
    calls = draw(1), draw(steps + 1), lambda: products_alone(layers, base["embedding"], start_at)
    first, all_steps, floor = median_seconds(calls, tries, clock)
    return (all_steps - first) / steps, floor / steps


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    work, clock = find_workload(name), Clock()
    trim_after_compiling()  # as every run does
    iterate(work, count, clock)
    peak, more = peak_mib(), {}
    if "machine" in sys.argv:
        seconds, floor = decode_step(work, work.batch)
        more = {"product_gflops": product_rate() / 1e9, "decode_ms": 1e3 * seconds, "decode_floor_ms": 1e3 * floor}
    report(clock, peak, **more)


if __name__ == "__main__":
    main()
