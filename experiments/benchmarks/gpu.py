"""The parts of gpu.sh: python -m experiments.benchmarks.gpu PART [tiny]. Each prints one line of JSON per figure.

    agree       one PPO iteration and decoding on the accelerator against the CPU's; cuDNN attention against XLA's
    decode      tokens per second of a model of 1B in bfloat16 at 1, 64, 256 rows, and the share of the bound by bytes
    update      an epoch of a model of 0.5B (all weights) and of 4B (LoRA): share of the peak
    iteration   a whole PPO iteration of 0.5B: 256 prompts, 239 tokens each, by phase
    population  8 runs in one program against one

`tiny` rehearses with shapes that a CPU does at once. Random weights; no network.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.ours import HYPER, least_seconds, model_of, options_of, prompts_of, scorer_of, start
from experiments.benchmarks.workloads import Clock, Shape, Workload
from ppo_jax.models.attention import attend_cached, flash
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import init_params
from ppo_jax.models.transformer import apply, init_cache, logits, positions_from_mask, unstack, unstacked
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.ppo import make_host_iteration
from ppo_jax.types import PyTree, Rollout, Scores

# name in `device_kind` -> bytes of memory and (dense) bfloat16 operations per second, by the vendors' sheets
PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}
LITTLE = Shape(vocabulary=256, width=64, layers=2, heads=2, kv_heads=1, mlp=128)
ONE = Shape(vocabulary=128_256, width=2048, layers=16, heads=32, kv_heads=8, mlp=8192)
HALF = Shape(vocabulary=151_936, width=896, layers=24, heads=14, kv_heads=2, mlp=4864)
FOUR = Shape(vocabulary=151_936, width=2560, layers=36, heads=40, kv_heads=8, mlp=9728)


def say(part: str, **figures: Any) -> None:
    print(json.dumps({"part": part, "device": jax.devices()[0].device_kind} | figures), flush=True)


def peaks() -> tuple[float, float]:
    """(bytes, operations) per second; NaN for what is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((both for name, both in PEAKS.items() if name in kind), (np.nan, np.nan))


def in_bfloat16(work: Workload) -> ModelConfig:
    return dataclasses.replace(model_of(work), dtype="bfloat16", remat="full")


def params_of(config: ModelConfig) -> PyTree:
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)


def agree(tiny: bool) -> None:
    """In float32 with products of full precision, so that what differs is the order of sums."""
    work = Workload(LITTLE, batch=8, prompt=8, response=12, epochs=2, reward="rule")
    config, found = model_of(work), []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            state, frozen = start(work, config, params_of(config))
            collect, learn = make_host_iteration(config, options_of(work), make_optimizer())
            rollout = collect(state, frozen, prompts_of(work), HYPER)
            state, metrics = learn(state, frozen, rollout, scorer_of(work, config)(frozen, rollout), HYPER)
            found.append(jax.device_get((rollout.tokens, rollout.logprobs, state.policy, metrics["loss"])))
    (tokens, logprobs, policy, loss), (tokens2, logprobs2, policy2, loss2) = found
    say(
        "agree",
        same_tokens=float(np.mean(tokens == tokens2)),
        logprobs=float(np.abs(logprobs - logprobs2).max()),
        parameters=max(
            float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (policy, policy2)), strict=True)
        ),
        loss=float(abs(loss[0] / loss[1] - loss2[0] / loss2[1])),
    )
    if jax.default_backend() == "gpu":
        q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 8, 64), jnp.bfloat16) for i in range(3))
        positions = jnp.where(jnp.arange(256) >= jnp.array([[0], [37]]), jnp.arange(256) - jnp.array([[0], [37]]), -1)
        ours = attend_cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, positions)
        difference = jnp.where((positions >= 0)[..., None, None], flash(q, k, v, positions) - ours, 0)
        say("agree", cudnn_against_xla=float(jnp.abs(difference).max()))


def decode(tiny: bool) -> None:
    """Greedy steps behind a prompt: layers in the stack, and apart (taken out of it once before the loop)."""
    shape, prompt, steps = (LITTLE, 8, 8) if tiny else (ONE, 128, 128)
    for rows in (1, 64, 256):
        work = Workload(shape, rows, prompt, steps, 1)
        config = in_bfloat16(work)
        base, tokens = params_of(config), jnp.ones((rows, prompt), jnp.int32)
        size = sum(x.nbytes for x in jax.tree.leaves(base))
        cache = 2 * 2 * shape.layers * rows * shape.kv_heads * shape.head_width * (prompt + steps)  # bfloat16
        for way in ("stack", "apart"):
            seconds = [least_seconds(jax.jit(partial(draw, config, way, n)), base, tokens, tries=3) for n in (1, steps)]
            step = (seconds[1] - seconds[0]) / (steps - 1)
            bound = (size + cache) / peaks()[0]
            say("decode", rows=rows, way=way, step_ms=1e3 * step, tokens_per_second=rows / step, of_bound=bound / step)


def draw(config: ModelConfig, way: str, steps: int, base: PyTree, tokens: jax.Array) -> jax.Array:
    """The last token of so many greedy steps."""
    rows, length = tokens.shape
    cache = init_cache(config, rows, length + steps if way == "stack" else length)
    positions = positions_from_mask(jnp.ones(tokens.shape, bool))
    hidden, cache = apply(base, {}, config, tokens, positions, cache=cache, fresh=True)
    decoder: tuple[PyTree, PyTree] = (base, {})
    if way == "apart":
        decoder, cache = unstack(base, {}, config), unstacked(cache, length + steps)

    def choose(hidden: jax.Array) -> jax.Array:
        return jnp.argmax(logits(base, {}, config, hidden[:, -1]), axis=-1).astype(jnp.int32)

    def step(t: jax.Array, carry: tuple) -> tuple:
        token, cache = carry
        at = jnp.full((rows, 1), length, jnp.int32) + t
        hidden, cache = apply(*decoder, config, token[:, None], at, cache=cache)
        return choose(hidden), cache

    return jax.lax.fori_loop(0, steps - 1, step, (choose(hidden), cache))[0]


def update(tiny: bool) -> None:
    """One epoch of `learn` on an invented rollout: the reference pass and one optimizer step."""
    cases: tuple[tuple[str, Shape, Literal["full", "lora"], int, int], ...] = (
        ("0.5B full, 16k tokens", HALF, "full", 32, 4),
        ("0.5B full, 65k tokens", HALF, "full", 128, 16),
        ("4B LoRA, 16k tokens", FOUR, "lora", 32, 8),
    )
    for name, shape, adapter, rows, pieces in cases:
        size = (pieces, 4, 6) if tiny else (rows, 256, 256)
        work = Workload(
            LITTLE if tiny else shape, *size, epochs=1, micro_batches=pieces, adapter=adapter, reward="rule"
        )
        config = in_bfloat16(work)
        options = dataclasses.replace(options_of(work), logprob_chunk=1024)
        state, frozen = start(work, config, params_of(config))
        _, learn = make_host_iteration(config, options, make_optimizer())
        rollout, scores = invented(work)
        seconds = []
        for _ in range(4):  # the first one compiles
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(learn(state, frozen, rollout, scores, HYPER))
            seconds.append(time.perf_counter() - began)
        best = min(seconds[1:])
        say(
            "update",
            work=name,
            seconds=best,
            compiled_in=seconds[0] - best,
            mfu=work.update_flops() / best / peaks()[1],
        )


def invented(work: Workload) -> tuple[Rollout, Scores]:
    prompts, mask = prompts_of(work), jnp.ones((work.batch, work.response), bool)
    tokens = jnp.concatenate([prompts.tokens, jnp.ones(mask.shape, jnp.int32)], axis=1)
    nothing, never = jnp.zeros(mask.shape), jnp.zeros(work.batch, bool)
    rollout = Rollout(tokens, prompts.mask, mask, nothing - 5, nothing - 5, nothing, never, prompts.index)
    return rollout, Scores(jnp.arange(work.batch) / work.batch, ~never, {})


def iteration(tiny: bool) -> None:
    size = (8, 4, 6) if tiny else (256, 128, 239)
    work = Workload(LITTLE if tiny else HALF, *size, epochs=1, micro_batches=8, reward="rule")
    config, clock = in_bfloat16(work), Clock()
    options = dataclasses.replace(options_of(work), logprob_chunk=1024, num_minibatches=1)
    state, frozen = start(work, config, params_of(config))
    collect, learn = make_host_iteration(config, options, make_optimizer())
    score, prompts = scorer_of(work, config), prompts_of(work)

    def finish(step: Callable[..., Any], *inputs: Any) -> Any:
        return jax.block_until_ready(step(*inputs))

    for _ in range(3):
        clock.begin()
        rollout = clock.time("generate", finish, collect, state, frozen, prompts, HYPER)
        scores = clock.time("score", finish, score, frozen, rollout)
        state, _ = clock.time("update", finish, learn, state, frozen, rollout, scores, HYPER)
    first, *_, last = ({name: spent[0] for name, spent in one.items()} for one in clock.iterations)
    say("iteration", seconds=last, whole=sum(last.values()), first=sum(first.values()))


def population(tiny: bool) -> None:
    from experiments.benchmarks.population import Benchmark, make_alone, make_population

    settings = Benchmark(model="tiny", count=8, batch=8, updates=4 if tiny else 50)
    for way, make, runs in (("population", make_population, 8), ("alone", make_alone, 1)):
        step = make(settings)
        step(0)
        began = time.perf_counter()
        for number in range(1, settings.updates):
            step(number)
        rate = runs * (settings.updates - 1) / (time.perf_counter() - began)
        say("population", way=way, runs=runs, updates_per_second=rate)


PARTS = {part.__name__: part for part in (agree, decode, update, iteration, population)}

if __name__ == "__main__":
    PARTS[sys.argv[1]]("tiny" in sys.argv[2:])
