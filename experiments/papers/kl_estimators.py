"""Schulman's KL estimators: their bias and spread, and their gradients on a language model that can be enumerated.

python -m experiments.papers.kl_estimators
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.papers import enumerable
from experiments.papers.enumerable import CONFIG, list_rows, make_world, token_logprobs
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.models.adapters import init_full
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.ops.advantages import rewards_to_go
from ppo_jax.ops.kl import kl_penalty
from ppo_jax.rollout import Sampling
from ppo_jax.train.objective import Counts, ppo_loss
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, KLConfig, PPOConfig
from ppo_jax.train.state import zero_value_head
from ppo_jax.types import Frozen, Hyper, Minibatch, Policy, PyTree

KINDS = ("k1", "k2", "k3")
SHIFTS = (0.1, 1.0)  # p = N(shift, 1), q = N(0, 1)
# How the KL enters the gradient; the first two and the last two are the pairs that should agree.
PLACES = ("k1 in reward", "k2 of responses in loss", "k3 in loss", "k1 in loss", "k2 in loss", "full in loss")


def settings(toy: bool) -> list[Setting]:
    """The table once exactly, the same by sampling, and gradients at several distances from the reference."""
    seeds = range(2 if toy else 5)
    table: list[Setting] = [{"part": "exact", "shift": shift} for shift in SHIFTS]
    table += [
        {"part": "sampled", "shift": shift, "seed": seed, "samples": 10**4 if toy else 10**6}
        for shift in SHIFTS
        for seed in seeds
    ]
    sizes = [100, 1000] if toy else [100, 1000, 10_000, 100_000, 1_000_000]
    distances = (0.1,) if toy else (0.01, 0.1, 1.0)
    return table + [{"part": "gradients", "kl": kl, "seed": seed, "sizes": sizes} for kl in distances for seed in seeds]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """One setting."""
    if setting["part"] == "exact":
        return rounded(exact_moments(setting["shift"]), 8)
    if setting["part"] == "sampled":
        return rounded(sampled_moments(setting["shift"], setting["samples"], setting["seed"]), 8)
    return rounded(compare_gradients(setting["kl"], setting["seed"], setting["sizes"]))


# -- the table ---------------------------------------------------------------------------------------------------------


def estimates(x: np.ndarray, shift: float, kind: Any) -> np.ndarray:
    """`ops.kl.kl_penalty` at draws x of q = N(0, 1), against p = N(shift, 1)."""
    x = np.asarray(x, np.float32)
    log_q, log_p = -0.5 * x**2, -0.5 * (x - np.float32(shift)) ** 2
    return np.asarray(kl_penalty(jnp.asarray(log_q), jnp.asarray(log_p), kind), np.float64)


def exact_moments(shift: float) -> dict[str, dict[str, float]]:
    """Bias and standard deviation over the true KL, shift^2 / 2, by quadrature over 40,001 points."""
    x = np.linspace(-10, 10, 40_001)
    weights = np.exp(-0.5 * x**2)
    weights /= weights.sum()
    true, found = 0.5 * shift**2, {}
    for kind in KINDS:
        k = estimates(x, shift, kind)
        mean = (weights * k).sum()
        found[kind] = {"bias": mean / true - 1, "std": np.sqrt((weights * (k - mean) ** 2).sum()) / true}
    return found


def sampled_moments(shift: float, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """The same from random draws, as Schulman did it."""
    x, true, found = np.random.default_rng(seed).normal(size=samples), 0.5 * shift**2, {}
    for kind in KINDS:
        k = estimates(x, shift, kind)
        found[kind] = {"bias": k.mean() / true - 1, "std": k.std() / true}
    return found


# -- gradients ---------------------------------------------------------------------------------------------------------


def move_away(base: PyTree, kl: float, seed: int) -> PyTree:
    """A policy in a random direction from the reference, at this KL of whole responses."""
    rng = np.random.default_rng(1000 + seed)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), base)
    low, high = 0.0, 0.05
    while float(true_kl(base, _step(base, direction, high))) < kl:
        low, high = high, 2 * high
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(true_kl(base, _step(base, direction, middle))) < kl else (low, middle)
    return _step(base, direction, high)


@jax.jit
def _step(base: PyTree, direction: PyTree, size: float) -> PyTree:
    return jax.tree.map(lambda x, d: x + size * d, init_full(base), direction)


@jax.jit
def true_kl(base: PyTree, adapter: PyTree) -> Float[Array, ""]:
    """KL(pi || rho) of whole responses, summed over all of them."""
    logprobs = jnp.sum(token_logprobs(base, adapter), axis=1)
    reference = jnp.sum(token_logprobs(base, {}), axis=1)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))


def choose(place: str) -> PPOConfig:
    """The options that put the KL there."""
    kl = {
        "k2 of responses in loss": KLConfig("k2", "loss", "response"),
        "k2 in loss": KLConfig("k2", "loss"),
        "k3 in loss": KLConfig("k3", "loss"),
        "full in loss": KLConfig("full", "loss"),
    }.get(place, KLConfig())
    return PPOConfig(sampling=Sampling(response_length=enumerable.T), advantage="reinforce", kl=kl)


@partial(jax.jit, static_argnums=0)
def expected_gradient(place: str, base: PyTree, adapter: PyTree, weights: Float[Array, " R"]) -> Float[Array, " N"]:
    """The gradient of `train.objective.ppo_loss` when response y is drawn with probability weights[y]."""
    rows, ppo = list_rows(), choose(place)
    logprobs, reference = token_logprobs(base, adapter), token_logprobs(base, {})
    penalties = jnp.where(rows.response_mask, kl_penalty(logprobs, reference, "k1"), 0.0)
    zeros = jnp.zeros(rows.response_mask.shape)
    batch = Minibatch(
        tokens=rows.tokens,
        mask=rows.mask,
        prefix=None,
        loss_mask=rows.response_mask,
        logprobs=logprobs,
        values=zeros,
        advantages=rewards_to_go(-penalties, rows.response_mask, 1.0) if place == "k1 in reward" else zeros,
        returns=zeros,
        ref_logprobs=reference,
        ref_hidden=before_response(role_hidden(base, {}, CONFIG, rows.tokens, rows.mask), enumerable.T),
        weights=jnp.broadcast_to(weights[:, None], zeros.shape),
    )
    algorithm = Algorithm(CONFIG, ppo, make_optimizer(), None)

    def loss(adapter: PyTree) -> Float[Array, ""]:
        if place == "k1 in loss":  # the options refuse it
            k1 = kl_penalty(token_logprobs(base, adapter), reference, "k1")
            return jnp.sum(weights[:, None] * jnp.where(rows.response_mask, k1, 0.0))
        policy, hyper = Policy(adapter, zero_value_head(CONFIG)), Hyper(temperature=1.0, kl_coef=1.0)
        return ppo_loss(policy, algorithm, Frozen(base), batch, Counts(jnp.ones(())), hyper)[0]

    return flatten(jax.grad(loss)(adapter))


def flatten(tree: PyTree) -> Float[Array, " N"]:
    """All numbers of a tree in one row."""
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def compare_gradients(kl: float, seed: int, sizes: list[int]) -> dict[str, Any]:
    """Expected gradients against the exact one, and those of finite samples."""
    base = make_world(seed).base
    policy = move_away(base, kl, seed)
    exact = np.asarray(flatten(jax.grad(true_kl, argnums=1)(base, policy)), np.float64)
    chances = np.asarray(enumerable.probabilities(base, policy), np.float64)
    rng, found = np.random.default_rng(seed), {}
    draws = {size: rng.multinomial(size, chances / chances.sum()) / size for size in sizes}
    for place in PLACES:
        weights = [chances, *(draws[size] for size in sizes)]
        mean, *sampled = (
            np.asarray(expected_gradient(place, base, policy, jnp.asarray(w, jnp.float32)), np.float64) for w in weights
        )
        found[place] = compare(mean, exact) | {"sampled_errors": [compare(g, exact)["error"] for g in sampled]}
    return {"exact_norm": float(np.linalg.norm(exact)), "places": found}


def compare(found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """|found - exact| / |exact|, the cosine between the two, and |found| / |exact|."""
    size, norm = float(np.linalg.norm(found)), float(np.linalg.norm(exact))
    cosine = float(found @ exact / max(size * norm, 1e-30))
    return {"error": float(np.linalg.norm(found - exact)) / norm, "cosine": cosine, "norm": size / norm}


STUDY = Study("kl_estimators", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
