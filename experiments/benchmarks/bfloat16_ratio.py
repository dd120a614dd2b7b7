"""How far from 1 the ratio of a fresh rollout is in bfloat16, and what float32 mends of it.

    python -m experiments.benchmarks.bfloat16_ratio

The sampler decodes token by token with a cache, the loss reads whole rows; in exact arithmetic both give a token the
same log-prob. SmolLM2-135M samples 32 tokens behind each of 16 prompts; then the same tokens are fed to both again, and
exp of the difference is what the first minibatch of PPO has as its ratio.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.data import assets, left_pad
from ppo_jax.models.adapters import unembedding
from ppo_jax.models.cache import init_cache
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.heads import ValueHead
from ppo_jax.models.pretrained import load_model
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.rollout import Sampling, generate
from ppo_jax.types import Policy, Prompts, PyTree

ROWS, LENGTH = 16, 32
WORDS = ("The film", "A story about", "In the beginning", "It was late and", "What I liked", "She said that")


def logprobs(params: PyTree, hidden: jax.Array, actions: jax.Array, wide: bool) -> jax.Array:
    """Log-probs of the next tokens. Products are summed in float32 either way; `wide`: of float32 factors."""
    table = unembedding(params, {})
    if wide:
        hidden, table = hidden.astype(jnp.float32), table.astype(jnp.float32)
    logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return token_logprobs(logits, actions)


@partial(jax.jit, static_argnums=(1, 4))
def read_whole(params: PyTree, config: ModelConfig, tokens: jax.Array, mask: jax.Array, wide: bool) -> jax.Array:
    """As the loss does: whole rows in one pass."""
    hidden = apply(params, {}, config, tokens, positions_from_mask(mask))
    return logprobs(params, hidden[:, -LENGTH - 1 : -1], tokens[:, -LENGTH:], wide)


@partial(jax.jit, static_argnums=(1, 4))
def decode(params: PyTree, config: ModelConfig, tokens: jax.Array, mask: jax.Array, wide: bool) -> jax.Array:
    """As the sampler does: the prompt, then token by token with a cache."""
    positions, start = positions_from_mask(mask), tokens.shape[1] - LENGTH
    cache = init_cache(config, *tokens.shape)
    hidden, cache = apply(params, {}, config, tokens[:, :start], positions[:, :start], cache=cache, fresh=True)

    def step(cache: PyTree, at: jax.Array) -> tuple[PyTree, jax.Array]:
        token, position = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1) for x in (tokens, positions))
        state, cache = apply(params, {}, config, token, position, cache=cache)
        return cache, state[:, 0]

    _, states = jax.lax.scan(step, cache, jnp.arange(start, tokens.shape[1] - 1))
    hidden = jnp.concatenate([hidden[:, -1:], states.swapaxes(0, 1)], axis=1)
    return logprobs(params, hidden, tokens[:, start:], wide)


def main() -> None:
    model = load_model(assets.smollm2(), ModelOptions(dtype="bfloat16"))
    rows = [model.tokenizer(WORDS[i % len(WORDS)])["input_ids"] for i in range(ROWS)]
    tokens, mask = left_pad(rows, max(map(len, rows)), model.pad_id)
    head = ValueHead().init(jax.random.key(0), jnp.zeros((1, model.config.hidden_size)))["params"]
    narrow, wide = (dataclasses.replace(model.config, dtype=name) for name in ("bfloat16", "float32"))
    sampling = Sampling(response_length=LENGTH, pad_id=model.pad_id)
    draw = jax.jit(partial(generate, config=narrow, sampling=sampling))
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(ROWS))
    rollout = draw(model.params, Policy({}, head), prompts=prompts, key=jax.random.key(0))
    drawn, real = rollout.tokens, jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)

    def show(name: str, old: jax.Array, new: jax.Array) -> None:
        ratio = np.exp(np.asarray(new - old, np.float64))
        outside = np.mean(np.abs(ratio - 1) > 0.05)
        print(f"| {name} | {ratio.min():.4f} | {ratio.max():.4f} | {np.abs(ratio - 1).mean():.5f} | {outside:.1%} |")

    print(
        "| decoding / loss | least ratio | largest | mean distance from 1 | further than 0.05 |\n|---|---|---|---|---|"
    )
    whole = read_whole(model.params, narrow, drawn, real, False)
    show("bfloat16 / bfloat16, the sampler's own", rollout.logprobs, whole)
    show("bfloat16 / bfloat16", decode(model.params, narrow, drawn, real, False), whole)
    last = decode(model.params, narrow, drawn, real, True)
    show("the same, logits of float32 factors", last, read_whole(model.params, narrow, drawn, real, True))
    exact = decode(model.params, wide, drawn, real, True)
    show("float32 activations / bfloat16", exact, whole)
    show("float32 activations / the same", exact, read_whole(model.params, wide, drawn, real, True))


if __name__ == "__main__":
    main()
