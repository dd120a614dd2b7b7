"""DPO against a reward model and its optimum, from the same few pairs, on a language model that can be enumerated.

    python -m experiments.papers.dpo_ppo

What PPO would converge to is known here (notebook 7), so the second way needs no training of a policy: a reward head on
the reference's features (`train.reward.fit_head`), and rho(y) exp(r(y) / beta) / Z.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import enumerable
from experiments.papers.enumerable import CONFIG, RESPONSES, T, World, list_rows, make_world
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.models.adapters import init_full
from ppo_jax.models.heads import last_token
from ppo_jax.models.roles import role_hidden
from ppo_jax.train.comparisons import head_scores
from ppo_jax.train.dpo import DPOConfig, DPOScalars, Preferences, make_dpo_step
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward import fit_head

BETA, BATCH, STEPS, RATE, L2 = 0.3, 32, 400, 1e-3, 1e-2
PAIRS, SEEDS = (30, 300), range(5)
STEP = make_dpo_step(CONFIG, DPOConfig(batch_size=BATCH, beta=BETA), make_optimizer())
_probabilities = jax.jit(enumerable.probabilities)


def settings(toy: bool) -> list[Setting]:
    """One data set each."""
    steps, seeds = (8, SEEDS[:2]) if toy else (STEPS, SEEDS)
    return [{"pairs": pairs, "seed": seed, "beta": BETA, "steps": steps} for pairs in PAIRS for seed in seeds]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Of DPO over its steps, and of the reward model's optimum: see `measure`."""
    base, seed = make_world(2).base, setting["seed"]
    world = World(base, make_world(seed).rewards)
    reference = np.asarray(_probabilities(base, {}), np.float64)
    both = draw_pairs(world, reference, setting["pairs"], np.random.default_rng(seed))
    seen = np.isin(np.arange(len(RESPONSES)), both)
    guessed = fit_rewards(base, both)
    best = reference * np.exp(guessed / BETA)
    curve = train_dpo(base, both, setting["steps"], seed)
    return rounded(
        {
            "step": [step for step, _ in curve],
            "dpo": [measure(policy, reference, world, seen, both) for _, policy in curve],
            "reward model": measure(best / best.sum(), reference, world, seen, both),
            "reference": measure(reference, reference, world, seen, both),
            "best possible": measure(enumerable.optimum(world, BETA), reference, world, seen, both),
            "seen": int(seen.sum()),
        }
    )


def draw_pairs(world: World, reference: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """[pairs, 2] responses of the reference, the preferred one first: P = sigmoid(r1 - r2)."""
    both = rng.choice(len(RESPONSES), size=(pairs, 2), p=reference / reference.sum())
    margin = np.asarray(world.rewards)[both[:, 0]] - np.asarray(world.rewards)[both[:, 1]]
    swapped = rng.random(pairs) > 1 / (1 + np.exp(-margin))
    both[swapped] = both[swapped][:, ::-1]
    return both


def fit_rewards(base: Any, both: np.ndarray) -> np.ndarray:
    """A linear head on the reference's last hidden states, fitted to the pairs: a score for every response."""
    rows = list_rows()
    features = np.asarray(last_token(role_hidden(base, {}, CONFIG, rows.tokens, rows.mask), rows.mask))
    return np.asarray(head_scores(fit_head(features, both[:, 0], both[:, 1], L2, 200), features), np.float64)


def train_dpo(base: Any, both: np.ndarray, steps: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """(step, pi) about twenty times, by `train.dpo.make_dpo_step` at a learning rate that falls linearly to 0."""
    rows, rng = list_rows(), np.random.default_rng(seed)
    loss_mask = np.asarray(rows.mask) & (np.arange(rows.mask.shape[1]) >= rows.mask.shape[1] - T)
    adapter = init_full(base)
    state, curve = make_optimizer().init(adapter), [(0, np.asarray(_probabilities(base, adapter), np.float64))]
    for step in range(1, steps + 1):
        chosen = both[rng.integers(0, len(both), BATCH)]
        batch = Preferences(*(jnp.asarray(np.asarray(x)[chosen]) for x in (rows.tokens, rows.mask, loss_mask)))
        scalars = DPOScalars(RATE * (1 - (step - 1) / steps), 1.0, BETA, 0.0)
        adapter, state, _ = STEP(adapter, state, base, batch, scalars)
        if step % max(steps // 20, 1) == 0:
            curve.append((step, np.asarray(_probabilities(base, adapter), np.float64)))
    return curve


def measure(
    policy: np.ndarray, reference: np.ndarray, world: World, seen: np.ndarray, both: np.ndarray
) -> dict[str, float]:
    """The true objective and its parts, the mass on responses that are in no pair, and log-ratios of the pairs."""
    ratio = np.log(np.maximum(policy, 1e-30)) - np.log(reference)
    reward, kl = float(policy @ np.asarray(world.rewards, np.float64)), float(policy @ ratio)
    return {
        "objective": reward - BETA * kl,
        "reward": reward,
        "kl": kl,
        "unseen": float(policy[~seen].sum()),
        "chosen": float(ratio[both[:, 0]].mean()),
        "rejected": float(ratio[both[:, 1]].mean()),
    }


STUDY = Study("dpo_ppo", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
