"""Which algorithms reach rho(y) exp(r(y) / beta) / Z, on a language model that can be enumerated.

python -m experiments.papers.optimum
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import enumerable
from experiments.papers.enumerable import CONFIG, RESPONSES, T, World, list_rows, make_world, optimum, total_variation
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.models.adapters import init_full
from ppo_jax.rollout import Sampling
from ppo_jax.train.dpo import DPOConfig, DPOScalars, Preferences, make_dpo_step
from ppo_jax.train.optimizer import descend, make_optimizer
from ppo_jax.train.options import Algorithm, KLConfig, PPOConfig
from ppo_jax.train.population import make_members, stack_hypers, stack_prompts
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Hyper, PyTree, Rollout, Scores

BETA, ROWS, ITERATIONS, STEPS, GROUP = 0.7, 256, 120, 4, 8  # steps of the optimizer per iteration
SEEDS, PROMPT = [0, 1, 2, 3, 4], (0, 3)
SAMPLING = Sampling(response_length=T, stop_ids=(enumerable.STOP,))
SAME: dict[str, Any] = {"sampling": SAMPLING, "epochs": 2, "num_minibatches": 2, "whiten_advantages": False}
GROUPED: dict[str, Any] = SAME | {"group_size": GROUP}
METHODS = {
    "PPO": PPOConfig(**SAME),
    "RLOO": PPOConfig(**GROUPED, advantage="rloo"),
    "GRPO, k1 in the reward": PPOConfig(**GROUPED, advantage="grpo"),
    "GRPO as published, k3 in the loss": PPOConfig(**GROUPED, advantage="grpo", kl=KLConfig("k3", "loss")),
    "Dr. GRPO, k2 of responses in the loss": PPOConfig(
        **GROUPED, advantage="dr_grpo", aggregation="constant", kl=KLConfig("k2", "loss", "response")
    ),
}
EXACT = "exact gradient, no samples"
RATES = {"DPO": 1e-3}  # the others learn at 3e-3


def settings(toy: bool) -> list[Setting]:
    """One for each method; all seeds of it are one population."""
    size = {"rows": 64, "iterations": 6} if toy else {"rows": ROWS, "iterations": ITERATIONS}
    same = {"beta": BETA, "prompt": list(PROMPT), "seeds": SEEDS[:2] if toy else SEEDS, **size}
    methods = ["PPO", "GRPO as published, k3 in the loss", "DPO"] if toy else [*METHODS, "DPO", EXACT]
    return [{"method": method, **same} for method in methods]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Total variation to the optimum over training: one curve for each seed."""
    base = make_world(2).base  # a population has one base, so seeds differ in their rewards and in what is sampled
    worlds = [World(base, make_world(seed).rewards) for seed in setting["seeds"]]
    targets = np.stack([optimum(world, setting["beta"], PROMPT) for world in worlds])
    start = np.stack([np.asarray(enumerable.probabilities(world.base, {}, PROMPT)) for world in worlds])
    train = {"DPO": train_dpo, EXACT: train_exactly}.get(setting["method"], train_population)
    steps, policies = train(setting, worlds)
    return rounded(
        {
            "iteration": [0, *steps],
            "distance": np.stack([total_variation(p, targets) for p in [start, *policies]], axis=1),
            "responses": setting["rows"] * setting["iterations"],
            "final": policies[-1],
            "target": targets,
            "reference": start,
        }
    )


def rate(setting: Setting, share: float) -> float:
    """The learning rate falls to 0 by a cosine."""
    return float(RATES.get(setting["method"], 3e-3) * 0.5 * (1 + np.cos(np.pi * share)))


def measured(iterations: int) -> set[int]:
    """After these iterations the policy is written out: about 30 of them."""
    return {*np.unique(np.linspace(1, iterations, min(iterations, 30)).astype(int)).tolist()}


_probabilities = jax.jit(partial(enumerable.probabilities, prompt=PROMPT))
_chances = jax.jit(jax.vmap(partial(enumerable.probabilities, prompt=PROMPT)))


def reward(frozen: Frozen, rollout: Rollout, prefix: jax.Array | None, prefix_layers: int) -> Scores:
    """A device reward of a population: the world of a member is that of its prompts' index."""
    own = frozen.reward[rollout.index[0]]
    return enumerable.reward(frozen._replace(reward=own), rollout, prefix, prefix_layers)


def train_population(setting: Setting, worlds: list[World]) -> tuple[list[int], list[np.ndarray]]:
    """All seeds at once; each member has a reward of its own."""
    ppo, rows, iterations = METHODS[setting["method"]], setting["rows"], setting["iterations"]
    members = make_members(Algorithm(CONFIG, ppo, make_optimizer(), reward))
    base = worlds[0].base
    alone = [init_state(jax.random.key(s), init_full(base), CONFIG, make_optimizer(), BETA) for s in setting["seeds"]]
    states = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    asked = [enumerable.prompts(rows // ppo.group_size, PROMPT) for _ in worlds]
    asked = [p._replace(index=jnp.full(p.index.shape, place)) for place, p in enumerate(asked)]
    prompts = stack_prompts(asked)
    frozen = Frozen(base, jnp.stack([world.rewards for world in worlds]))
    critic = {"lam": 1.0, "value_clip": 1e6, "vf_coef": 0.3} if ppo.has_critic else {}
    hyper = Hyper(temperature=1.0, kl_coef=setting["beta"], **critic)
    active = jnp.ones(len(worlds), bool)
    steps, found = [], []
    for step in range(iterations):
        hypers = stack_hypers([hyper._replace(learning_rate=rate(setting, step / iterations))] * len(worlds))
        states, _ = members(states, frozen, prompts, hypers, active)
        if step + 1 in measured(iterations):
            steps.append(step + 1)
            bases = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(worlds), *x.shape)), base)
            found.append(np.asarray(_chances(bases, states.policy.adapter)))
    return steps, found


def train_dpo(setting: Setting, worlds: list[World]) -> tuple[list[int], list[np.ndarray]]:
    """DPO on pairs of the reference, labelled by r with Bradley-Terry's noise: as many responses as the others draw."""
    iterations, pairs = setting["iterations"], setting["rows"] // (2 * STEPS)
    dpo = DPOConfig(batch_size=pairs, beta=setting["beta"])
    step = make_dpo_step(CONFIG, dpo, make_optimizer())
    found = []
    for seed, world in zip(setting["seeds"], worlds, strict=True):
        adapter, draw = init_full(worlds[0].base), pair_drawer(worlds[0].base, world, seed)
        state, curve = make_optimizer().init(adapter), []
        for number in range(iterations * STEPS):
            scalars = DPOScalars(rate(setting, number / (iterations * STEPS)), 1.0, setting["beta"], 0.0)
            adapter, state, _ = step(adapter, state, worlds[0].base, draw(pairs), scalars)
            if number % STEPS == STEPS - 1 and number // STEPS + 1 in measured(iterations):
                curve.append(np.asarray(_probabilities(worlds[0].base, adapter)))
        found.append(curve)
    return sorted(measured(iterations)), list(np.stack(found, axis=1))


def pair_drawer(base: PyTree, world: World, seed: int) -> Callable[[int], Preferences]:
    """draw(pairs): two responses of the reference, the better one first with probability sigmoid(r1 - r2)."""
    rng, rows = np.random.default_rng(seed), list_rows(PROMPT)
    chances = np.asarray(enumerable.probabilities(base, {}, PROMPT), np.float64)
    rewards, prompt = np.asarray(world.rewards), rows.mask.shape[1] - T
    loss_mask = np.asarray(rows.mask) & (np.arange(rows.mask.shape[1]) >= prompt)

    def draw(pairs: int) -> Preferences:
        both = rng.choice(len(RESPONSES), size=(pairs, 2), p=chances / chances.sum())
        margin = rewards[both[:, 0]] - rewards[both[:, 1]]
        swapped = rng.random(pairs) > 1 / (1 + np.exp(-margin))
        both[swapped] = both[swapped][:, ::-1]
        tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
        return Preferences(*(jnp.asarray(x[both]) for x in (tokens, mask, loss_mask)))

    return draw


def train_exactly(setting: Setting, worlds: list[World]) -> tuple[list[int], list[np.ndarray]]:
    """Adam on the objective itself, a sum over all responses: what this model and number of steps can reach at all."""
    iterations, optimizer, beta = setting["iterations"], make_optimizer(), setting["beta"]

    @jax.jit
    def move(adapter: PyTree, state: Any, world: World, rate: float) -> tuple[PyTree, Any]:
        def loss(adapter: PyTree) -> jax.Array:
            logprobs = jnp.sum(enumerable.token_logprobs(world.base, adapter, PROMPT), axis=1)
            reference = jnp.sum(enumerable.token_logprobs(world.base, {}, PROMPT), axis=1)
            return -jnp.sum(jnp.exp(logprobs) * (world.rewards - beta * (logprobs - reference)))

        return descend(adapter, jax.grad(loss)(adapter), state, optimizer, rate, 1.0)[:2]

    found = []
    for world in worlds:
        adapter, curve = init_full(world.base), []
        state = optimizer.init(adapter)
        for number in range(iterations * STEPS):
            adapter, state = move(adapter, state, world, rate(setting, number / (iterations * STEPS)))
            if number % STEPS == STEPS - 1 and number // STEPS + 1 in measured(iterations):
                curve.append(np.asarray(_probabilities(world.base, adapter)))
        found.append(curve)
    return sorted(measured(iterations)), list(np.stack(found, axis=1))


STUDY = Study("optimum", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
