"""What a base in 8 or 4 bits saves, costs and changes: memory, seconds, and how far its next tokens move.

    python -m experiments.benchmarks.quantised smollm2-135m int8
    python -m experiments.benchmarks.quantised gemma3-270m float32

One process for each base: float32, bfloat16, or float32 with its linear maps in int8 or int4. Rollouts of 32 responses
of 16 tokens behind openings of film reviews; one optimizer step of LoRA (rank 8, all layers) on them, in 4
micro-batches; and whole sentences of those reviews, read by this base and by the one in float32.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import movie_reviews
from experiments.benchmarks.ours import HYPER
from experiments.benchmarks.workloads import peak_mib
from ppo_jax.data import assets, gemma, left_pad
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.models.transformer import apply, logits, positions_from_mask
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.experience import share_prefix
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.ppo import collect, learn
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Frozen, Prompts, PyTree, Rollout, Scores

ROWS, PROMPT, RESPONSE, SENTENCES = 32, 8, 16, 64
MODELS = {"smollm2-135m": assets.smollm2, "gemma3-270m": gemma.gemma3}
KINDS = {"float32": ModelOptions(), "bfloat16": ModelOptions("bfloat16")} | {
    kind: ModelOptions(quantise=kind) for kind in ("int8", "int4")
}


def sentences(model: Model) -> list[list[int]]:
    """Token rows of film reviews that no reward model of the demo is trained on."""
    texts = [review.text for review in movie_reviews.load()][-2000:]
    rows = [list(model.tokenizer(text)["input_ids"])[:48] for text in texts]
    return [row for row in rows if len(row) > PROMPT][:SENTENCES]


def least(tries: int, work: Callable[..., Any], *inputs: Any) -> tuple[float, float]:
    """Seconds of a compiled function, of the wall and of this process' processors: the least of some tries."""
    jax.block_until_ready(work(*inputs))
    found = []
    for _ in range(tries):
        began = time.perf_counter(), time.process_time()
        jax.block_until_ready(work(*inputs))
        found.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, used = zip(*found, strict=True)
    return min(wall), min(used)


def measure(model: Model, rows: list[list[int]]) -> dict[str, float]:
    """Seconds of a decoding step and of an update (wall and processors), and bytes."""
    config, optimizer = model.config, make_optimizer()
    tokens = jnp.asarray(np.array([row[:PROMPT] for row in rows[:ROWS]], np.int32))
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.arange(ROWS))
    adapter = init_adapter(jax.random.key(0), model.params, config, AdapterConfig())
    state = init_state(jax.random.key(1), adapter, config, optimizer, 0.05)

    def draw(length: int) -> tuple[float, float]:
        sampling = Sampling(response_length=length)
        run = jax.jit(lambda base, policy, key: generate(base, policy, config, prompts, key, sampling))
        return least(2, run, model.params, state.policy, jax.random.key(2))

    wall, used = ((whole - first) / RESPONSE for whole, first in zip(draw(RESPONSE + 1), draw(1), strict=True))
    ppo = PPOConfig(sampling=Sampling(response_length=RESPONSE), epochs=1, num_minibatches=1, accumulate=4)
    algorithm, frozen = Algorithm(config, ppo, optimizer), Frozen(model.params, None)
    rollout = jax.jit(partial(collect, algorithm))(state, frozen, prompts, HYPER)
    scores = Scores(jnp.arange(ROWS) / ROWS, jnp.ones(ROWS, bool), {})

    def step(state: TrainState, frozen: Frozen, rollout: Rollout) -> TrainState:
        collected = share_prefix(algorithm, state.policy, frozen, rollout)
        return learn(algorithm, state, frozen, collected, scores, HYPER)[0]

    update = least(1, jax.jit(step), state, frozen, rollout)
    layers, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(t)) for t in (model.params["layers"], model.params))
    return {
        "layers_mib": layers / 2**20,
        "base_mib": whole / 2**20,
        "decode_ms": 1e3 * wall,
        "decode_cpu_ms": 1e3 * used,
        "update_s": update[0],
        "update_cpu_s": update[1],
        "peak_mib": peak_mib(),
    }


@partial(jax.jit, static_argnums=1)
def log_probs(params: PyTree, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Of every next token, over the whole vocabulary."""
    hidden = apply(params, {}, config, tokens, positions_from_mask(mask))
    return jax.nn.log_softmax(logits(params, {}, config, hidden).astype(jnp.float32), axis=-1)


def compare(model: Model, exact: Model, rows: list[list[int]]) -> dict[str, float]:
    """KL(this || float32) of next tokens, with its standard error over sentences; how often both prefer the same."""
    kls, same, worse = [], [], []
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        tokens, mask = (jnp.asarray(x) for x in left_pad(part, 48, 0))
        one, other = (log_probs(m.params, m.config, tokens, mask) for m in (model, exact))
        own = np.asarray(mask)
        kl = np.asarray(jnp.sum(jnp.exp(one) * (one - other), axis=-1))
        agree = np.asarray(jnp.argmax(one, -1) == jnp.argmax(other, -1))
        follows = own[:, :-1]  # the next slot holds the next token
        lost = np.asarray(jnp.take_along_axis((other - one)[:, :-1], tokens[:, 1:, None], axis=2, mode="clip")[..., 0])
        for i in range(len(part)):
            kls.append(kl[i][own[i]].mean())
            same.append(agree[i][own[i]].mean())
            worse.append(lost[i][follows[i]].mean())
    return {
        "kl": float(np.mean(kls)),
        "kl_error": float(np.std(kls, ddof=1) / np.sqrt(len(kls))),
        "agreement": float(np.mean(same)),
        "nats_lost": float(np.mean(worse)),  # cross-entropy of the sentences' own tokens, less that of float32
        "tokens": float(sum(map(len, rows))),
    }


def main() -> None:
    name, kind = sys.argv[1:3]
    file = MODELS[name]()
    model = load_model(file, KINDS[kind])
    rows = sentences(model)
    found: dict[str, Any] = {"model": name, "base": kind} | measure(model, rows)
    if kind != "float32":
        found |= compare(model, load_model(file), rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
