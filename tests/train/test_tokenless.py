"""Rows of the vocabulary without a token: a model with them is the model without them, in all that PPO computes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.transformer import apply, finish_logits, logits, positions_from_mask
from ppo_jax.ops.logprobs import entropy
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.offline import target_logprobs
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import KLConfig, PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Texts
from tests.train import toy

# Five rows more, behind the others and in between, whose logits are larger than any of a token.
ROWS = {"behind": [*range(11), *[-1] * 5], "between": [*range(6), -1, -1, *range(6, 11), -1]}
HYPER = toy.HYPER._replace(ptx_coef=0.3, entropy_coef=0.1, kl_coef=0.2)
FILTERED = dataclasses.replace(toy.SAMPLING, top_k=4, top_p=0.9)
ONCE = PPOConfig(sampling=toy.SAMPLING, epochs=1, num_minibatches=2)
CHOICES = {
    "full KL in the reward": dataclasses.replace(
        ONCE,
        kl=KLConfig(estimator="full"),
        behaviour="importance",
        sampling=dataclasses.replace(FILTERED, repetition_penalty=1.3),
    ),
}
MORE = {
    "default": ONCE,
    "full KL in the loss": dataclasses.replace(ONCE, kl=KLConfig(estimator="full", place="loss")),
    "filtered": dataclasses.replace(ONCE, behaviour="filtered", sampling=FILTERED),
}


def with_rows(kind: str) -> tuple[Any, Any, np.ndarray]:
    """(config, base, old id -> new id) of the toy model with rows that stand for no token."""
    rows = np.array(ROWS[kind])
    new, count = np.argsort(rows)[-11:], len(rows)
    free = [int(i) for i in np.flatnonzero(rows < 0)]
    ranges = tuple((i, i + 1) for i in free)
    config = dataclasses.replace(toy.CONFIG, vocab_size=count, tokenless=ranges)
    base = dict(toy.BASE)
    for name in ("embedding", "unembedding"):
        table = np.full((count, toy.CONFIG.hidden_size), 3.0, np.float32)
        table[new] = toy.BASE[name]
        base[name] = jnp.asarray(table)
    return config, base, new


def run(config: Any, base: Any, ppo: PPOConfig, ids: np.ndarray) -> tuple[Any, Any]:
    """Two iterations of a policy that has left the base; token i of the toy is ids[i]."""
    sampling = dataclasses.replace(ppo.sampling, stop_ids=(int(ids[toy.STOP]),), pad_id=int(ids[toy.PAD]))
    ppo, optimizer = dataclasses.replace(ppo, sampling=sampling), make_optimizer()
    place = np.zeros(config.vocab_size, np.int32)
    place[ids] = np.arange(len(ids))
    worth = jnp.where(jnp.isin(jnp.arange(config.vocab_size), ids), toy.WORTH[place], jnp.nan)
    iteration = make_iteration(config, ppo, optimizer, toy.worth)
    adapter = toy.noisy(toy.ADAPTERS["lora above a shared prefix"](), 1, 0.1)
    state = init_state(jax.random.key(0), adapter, config, optimizer, 0.05)
    texts = Texts(jnp.asarray(ids)[np.random.default_rng(1).integers(0, 11, (toy.B, 6))], jnp.ones((toy.B, 6), bool))
    for number in range(2):
        prompts = toy.prompts(number)
        prompts = prompts._replace(tokens=jnp.asarray(ids, jnp.int32)[prompts.tokens], pretrain=texts)
        state, metrics = iteration(state, Frozen(base, worth), prompts, HYPER)
    return state.policy, toy.numbers(metrics)


@pytest.mark.parametrize("choice", [*CHOICES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_an_iteration_is_that_of_the_model_without_them(choice: str) -> None:
    """Rollout, log-probs, entropy, KL of all kinds and the pretraining loss: policy and metrics are the same."""
    kind = "between" if choice in CHOICES else "behind"
    config, base, new = with_rows(kind)
    ppo = (CHOICES | MORE)[choice]
    policy, metrics = run(config, base, ppo, new)
    expected, others = run(toy.CONFIG, toy.BASE, ppo, np.arange(11))
    toy.assert_close(policy, expected, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == others.keys()
    for name, value in others.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_they_are_never_sampled(kind: str, temperature: float) -> None:
    config, base, new = with_rows(kind)
    sampling = Sampling(response_length=20)
    policy = toy.start().policy
    rollout = jax.jit(generate, static_argnums=(2, 5))(
        base, policy, config, toy.prompts(), jax.random.key(1), sampling, temperature
    )
    drawn = np.asarray(rollout.tokens)[:, toy.P :]
    assert np.isin(drawn, new).all() and np.isfinite(rollout.logprobs).all()
    plain = dataclasses.replace(config, tokenless=())
    rollout = jax.jit(generate, static_argnums=(2, 5))(
        base, policy, plain, toy.prompts(), jax.random.key(1), sampling, temperature
    )
    assert not np.isin(np.asarray(rollout.tokens)[:, toy.P :], new).all(), "without the rule they are"


def test_the_distribution_sums_to_1_over_the_tokens() -> None:
    config, base, new = with_rows("between")
    tokens = jnp.asarray(new, jnp.int32)[None, :8]
    mask = jnp.ones(tokens.shape, bool)
    hidden = apply(base, {}, config, tokens, positions_from_mask(mask))
    found = logits(base, {}, config, hidden)
    shares = np.asarray(jax.nn.softmax(found, axis=-1))
    assert shares[..., new].sum(-1) == pytest.approx(1.0, abs=1e-6)
    assert (np.delete(shares, new, axis=-1) == 0).all()
    assert np.asarray(entropy(found)).max() <= np.log(11) + 1e-5
    said = target_logprobs({}, base, config, tokens, mask, mask, 0)
    expected = np.log(np.take_along_axis(shares[:, :-1], np.asarray(tokens)[:, 1:, None], -1))[..., 0]
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-5)


def test_a_model_whose_rows_are_all_tokens_is_left_alone() -> None:
    raw = jnp.ones((2, 11))
    assert finish_logits(toy.CONFIG, raw) is raw
