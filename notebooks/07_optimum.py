# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. The optimum of KL-regularised RL, and who reaches it
#
# **Papers.** Ziegler et al. 2019, eq. 2 (the objective); Korbak et al. 2022, *RL with KL penalties is better viewed as
# Bayesian inference*; Rafailov et al. 2023, *DPO*, eq. 4 (the optimum) and eq. 7 (the loss); Shao et al. 2024, eq. 3-4
# (GRPO's KL is k3, in the loss); Liu et al. 2025 (Dr. GRPO).
#
# **Question.** max E[r(y)] - beta KL(pi ‖ rho) has its maximum at pi*(y) = rho(y) exp(r(y)/beta) / Z. On a language model
# whose 40 responses can be listed, do PPO, RLOO, GRPO and DPO get there?
#
# **What differs from the papers.** They have no such figure, since Z cannot be summed for a real model: pi* is their
# theory, and here it is measured. One layer of width 48, one prompt, at most 3 of 4 tokens, beta .7, rewards N(0, .8).
#
# ## Criterion, written before the run
#
# 5 seeds (rewards and samples differ), the same number of responses (30,720) and optimizer steps (480) for all; total
# variation is half the sum of |pi - pi*|. It starts at .24 to .50.
#
# 1. PPO, RLOO, and Dr. GRPO with k2 of whole responses in the loss end below .05 in the mean over seeds.
# 2. GRPO with its penalty in the reward ends below .05, too: dividing by the group's std moves no fixed point.
# 3. GRPO as published (k3 per token in the loss, advantages over the std) ends above .05, and above PPO for every seed.
# 4. DPO on pairs of the reference ends below .10 in the mean (its labels are noisy: one bit for two responses).
# 5. Each of 1 and 2 is nearer to the optimum at beta than to those at 1.25 beta and at beta / 1.25.
# 6. *The cell that you may change*: with the clip left out of the loss, PPO still ends below .10 (3 seeds, half the
#    iterations).

# ## Second attempt, the same criterion
#
# At the first attempt 1, 2, 4, 5 and 6 failed (only 3 held; commit "Paper 7: executed; one of six claims holds"). The exact
# gradient of the objective, added then, ended at .075, too: the optimum was out of reach. The reason: behind the prompt "3", one
# layer of attention cannot tell 3 from 3 3 and 3 3 3, since it averages equal values. With the prompt "0 3" it can. Nothing else
# was changed, the criterion least of all; the first attempt's records stay in the file and are printed below.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers import enumerable, optimum
from experiments.papers.notebook import SMOKE, draw_band, keep_picture, mean_and_spread, obtain_records, print_verdict

saved = obtain_records("optimum")
records = {record["setting"]["method"]: record for record in saved if record["setting"].get("prompt")}
for record in saved:
    if not record["setting"].get("prompt"):
        ends = np.array(record["result"]["distance"])[:, -1]
        print(f"first attempt, {record['setting']['method']:40} {mean_and_spread(ends)}")

# %%
figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
for number, (method, record) in enumerate(records.items()):
    draw_band(axes, record["result"]["iteration"], record["result"]["distance"], method, number)
axes.axhline(0.05, color="black", linewidth=0.8)
axes.set(xlabel="iterations (256 responses and 4 optimizer steps each)", yscale="log", ylim=(0.005, 0.7),
         ylabel="total variation to rho exp(r / beta) / Z",
         title="Distance to the optimum: mean and standard deviation of 5 seeds")  # fmt: skip
axes.legend(fontsize=8)
keep_picture(figure, "07_optimum")


# %%
def tilted(reference, target, factor):
    """The optimum at factor * beta, from that at beta."""
    weights = reference * (target / reference) ** (1 / factor)
    return weights / weights.sum(axis=-1, keepdims=True)


last, nearest = {}, {}
print(f"{'method':40} total variation at the end    to the optimum at 0.8 beta    at 1.25 beta")
for method, record in records.items():
    final, target, reference = (np.array(record["result"][key]) for key in ("final", "target", "reference"))
    last[method] = np.array(record["result"]["distance"])[:, -1]
    others = [enumerable.total_variation(final, tilted(reference, target, f)) for f in (0.8, 1.25)]
    nearest[method] = last[method].mean() < min(other.mean() for other in others)
    print(f"{method:40} {mean_and_spread(last[method]):29} {mean_and_spread(others[0]):29} {mean_and_spread(others[1])}")

# %% [markdown]
# ## Change a formula: PPO without the clip
# The policy loss is the plain product of ratio and advantage; the value loss is left out, so that the advantage is RLOO's.

# %%
from ppo_jax import Frozen, Hyper, init_state, make_iteration, make_optimizer
from ppo_jax.models.adapters import init_full
from ppo_jax.train.objective import evaluate_policy


def my_loss(policy, algorithm, frozen, minibatch, counts, hyper):
    outputs = evaluate_policy(policy, algorithm, frozen, minibatch, hyper)
    ratio = jnp.exp(outputs.logprobs - minibatch.logprobs)
    terms = ratio * minibatch.advantages  # <- the formula
    return -jnp.sum(jnp.where(outputs.mask, terms, 0.0)) / counts.units, {}


ppo, iterations = optimum.METHODS["RLOO"], 4 if SMOKE else 60
iteration = make_iteration(enumerable.CONFIG, ppo, make_optimizer(), enumerable.reward, loss=my_loss)
base, unclipped = enumerable.make_world(2).base, []
for seed in range(3):
    world = enumerable.World(base, enumerable.make_world(seed).rewards)
    state = init_state(jax.random.key(seed), init_full(base), enumerable.CONFIG, make_optimizer(), optimum.BETA)
    for step in range(iterations):
        hyper = Hyper(learning_rate=1.5e-3 * (1 + np.cos(np.pi * step / iterations)), temperature=1.0, kl_coef=optimum.BETA)
        state, _ = iteration(state, Frozen(base, world.rewards), enumerable.prompts(256 // ppo.group_size, optimum.PROMPT), hyper)
    found = enumerable.probabilities(base, state.policy.adapter, optimum.PROMPT)
    unclipped.append(enumerable.total_variation(found, enumerable.optimum(world, optimum.BETA, optimum.PROMPT)))
print("without the clip:", mean_and_spread(unclipped))

# %% [markdown]
# ## Verdict

# %%
exact = [m for m in ("PPO", "RLOO", "Dr. GRPO, k2 of responses in the loss") if m in last]
inside, published = "GRPO, k1 in the reward", "GRPO as published, k3 in the loss"
claims = [
    ("1 PPO, RLOO, Dr. GRPO with k2 reach the optimum", all(last[m].mean() < 0.05 for m in exact),
     "; ".join(f"{m} {last[m].mean():.3f}" for m in exact)),
    ("3 GRPO as published does not", last[published].mean() > 0.05 and (last[published] > last["PPO"]).all(),
     f"{mean_and_spread(last[published])}, PPO {mean_and_spread(last['PPO'])}"),
    ("4 DPO below .10", last["DPO"].mean() < 0.10, mean_and_spread(last["DPO"])),
    ("5 nearer to beta than to 0.8 or 1.25 beta", all(nearest[m] for m in [*exact, inside] if m in last),
     ", ".join(m for m in [*exact, inside] if nearest.get(m)) or "none"),
    ("6 without the clip below .10", np.mean(unclipped) < 0.10, mean_and_spread(unclipped)),
]  # fmt: skip
if inside in last:
    claims.insert(1, ("2 GRPO with k1 in the reward reaches it", last[inside].mean() < 0.05, mean_and_spread(last[inside])))
print_verdict(claims)

if optimum.EXACT in last:
    floor = last[optimum.EXACT]
    print(f"what the model and 480 steps allow (exact gradient): {mean_and_spread(floor)}; above it, by seed:")
    for method, values in last.items():
        print(f"  {method:40} {np.round(values - floor, 3)}")

# %% [markdown]
# **What binds.** At the first attempt the model (see above); now the number of samples: the exact gradient says how much of the
# rest is theirs. One prompt and 40 responses: nothing here is about generalisation, and every algorithm sees every response many
# times. The learning rates (3e-3, DPO 1e-3, both falling by a cosine) were not tuned method by method.
