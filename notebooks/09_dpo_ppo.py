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
# # 9. DPO against a reward model and PPO, from the same pairs
#
# **Paper.** Xu et al. 2024, *Is DPO Superior to PPO for LLM Alignment? A Comprehensive Study*, section 4 (theorem 4.1 and the
# synthetic example: DPO's solutions may put their mass on responses that are in no pair; PPO's are a part of DPO's) and
# its real tasks, on which PPO is ahead.
#
# **Question.** From the same few pairs and the same reference: does DPO move mass to responses that no pair has, does the
# likelihood of chosen responses fall, and which of the two ends with the higher true objective E[r] - beta KL?
#
# **What differs from the paper.** Its synthetic example trains small networks on one-hot actions; its real tasks have 7B to 34B
# models, and its numbers (win rates, code contests) have no counterpart here. Here: the language model with 40 responses,
# beta .3, 30 or 300 pairs of the reference, labelled by sigmoid(r1 - r2). "PPO" is the optimum of the learnt reward, rho
# exp(r / beta) / Z, which notebook 7 says how closely PPO reaches; the reward is a linear head on the reference's last
# states (`fit_head`, l2 .01). DPO: 400 steps of 32 pairs, learning rate 1e-3 falling to 0.
#
# ## Criterion, written before the run (5 data sets for each number of pairs)
#
# 1. *Out of distribution.* With 30 pairs, DPO's mass on responses that are in no pair ends at more than 1.5 times the
#    reference's (mean over data sets), and higher than the reward model's optimum's for at least 4 of 5.
# 2. *Drift.* With 30 pairs the mean log-ratio of the chosen responses falls below 0 by the end for at least 3 of 5, while the
#    margin over the rejected ones grows.
# 3. *Objective.* With 30 pairs the reward model's optimum has the higher true objective for at least 4 of 5.
# 4. *More pairs.* With 300 pairs DPO's true objective is higher than with 30, and the gap to the reward model's optimum
#    smaller, in the mean.
# 5. *Early stopping.* With 30 pairs the best objective along DPO's training is above that at its end for at least 4 of 5.
# 6. *The cell that you may change*: with another loss in place of DPO's (IPO, Azar et al. 2024, eq. 17: (h - 1/2)² with h =
#    beta times the margin) KL at the end is smaller than DPO's, in the mean over 3 data sets of 30 pairs.

# %%
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers import dpo_ppo, enumerable
from experiments.papers.notebook import SMOKE, draw_band, keep_picture, mean_and_spread, obtain_records, print_verdict, select

records = obtain_records("dpo_ppo")


def curves(pairs, name):
    return np.array([[at[name] for at in r["result"]["dpo"]] for r in select(records, pairs=pairs)])


def single(pairs, way, name):
    return np.array([r["result"][way][name] for r in select(records, pairs=pairs)])


# %%
steps = records[0]["result"]["step"]
figure, grid = plt.subplots(2, 3, figsize=(14, 7), layout="constrained", sharex=True)
for row, pairs in zip(grid, dpo_ppo.PAIRS):
    for axes, name in zip(row, ("objective", "unseen")):
        draw_band(axes, steps, curves(pairs, name), "DPO", 0)
        for number, way in enumerate(("reward model", "reference", "best possible"), start=1):
            draw_band(axes, steps, np.repeat(single(pairs, way, name)[:, None], len(steps), 1), way, number)
    draw_band(row[2], steps, curves(pairs, "chosen"), "chosen", 0)
    draw_band(row[2], steps, curves(pairs, "rejected"), "rejected", 1)
    row[0].set(ylabel=f"true E[r] - beta KL (units of r), {pairs} pairs")
    row[1].set(ylabel="mass on responses in no pair", ylim=(-0.02, 1))
    row[2].set(ylabel="log-ratio to the reference (nats)")
for axes in grid[1]:
    axes.set(xlabel="DPO steps")
grid[0, 0].legend(fontsize=8)
grid[0, 2].legend(fontsize=8)
keep_picture(figure, "09_dpo_ppo")
for pairs in dpo_ppo.PAIRS:
    print(f"{pairs:4} pairs: objective DPO {mean_and_spread(curves(pairs, 'objective')[:, -1])}, reward model "
          f"{mean_and_spread(single(pairs, 'reward model', 'objective'))}, reference "
          f"{mean_and_spread(single(pairs, 'reference', 'objective'))}, best possible "
          f"{mean_and_spread(single(pairs, 'best possible', 'objective'))}; KL DPO {mean_and_spread(curves(pairs, 'kl')[:, -1])}, "
          f"reward model {mean_and_spread(single(pairs, 'reward model', 'kl'))}")  # fmt: skip

# %% [markdown]
# ## Change a formula: IPO in place of DPO
# The gradient is taken through `ppo_jax.train.dpo.response_logprobs`; the loss is the cell's own.

# %%
import jax
import jax.numpy as jnp

from ppo_jax import make_optimizer
from ppo_jax.models.adapters import init_full
from ppo_jax.train.dpo import Preferences, response_logprobs
from ppo_jax.train.optimizer import descend


def my_loss(adapter, base, batch):
    ratio = response_logprobs(adapter, base, batch, None, enumerable.CONFIG)
    ratio = ratio - response_logprobs({}, base, batch, None, enumerable.CONFIG)
    h = dpo_ppo.BETA * (ratio[:, 0] - ratio[:, 1])
    return jnp.mean((h - 0.5) ** 2)  # <- the formula; DPO: -jax.nn.log_sigmoid(h)


@jax.jit
def move(adapter, state, base, batch, rate):
    return descend(adapter, jax.grad(my_loss)(adapter, base, batch), state, make_optimizer(), rate, 1.0)[:2]


base, rows = enumerable.make_world(2).base, enumerable.list_rows()
loss_mask = rows.mask & (jnp.arange(rows.mask.shape[1]) >= rows.mask.shape[1] - enumerable.T)
reference, total, kls = np.asarray(enumerable.probabilities(base, {}), float), 8 if SMOKE else dpo_ppo.STEPS, []
for seed in range(3):
    rng = np.random.default_rng(seed)
    world = enumerable.World(base, enumerable.make_world(seed).rewards)
    both, adapter = dpo_ppo.draw_pairs(world, reference, 30, rng), init_full(base)
    state = make_optimizer().init(adapter)
    for step in range(total):
        chosen = both[rng.integers(0, 30, dpo_ppo.BATCH)]
        batch = Preferences(*(x[chosen] for x in (rows.tokens, rows.mask, loss_mask)))
        adapter, state = move(adapter, state, base, batch, dpo_ppo.RATE * (1 - step / total))
    policy = np.asarray(enumerable.probabilities(base, adapter), float)
    kls.append(float(policy @ np.log(policy / reference)))
print("KL at the end, IPO:", mean_and_spread(kls))

# %% [markdown]
# ## Verdict

# %%
few, many = dpo_ppo.PAIRS
unseen, model_unseen = curves(few, "unseen")[:, -1], single(few, "reward model", "unseen")
start = single(few, "reference", "unseen")
chosen, margin = curves(few, "chosen")[:, -1], (curves(few, "chosen") - curves(few, "rejected"))[:, -1]
last = {pairs: curves(pairs, "objective")[:, -1] for pairs in dpo_ppo.PAIRS}
model = {pairs: single(pairs, "reward model", "objective") for pairs in dpo_ppo.PAIRS}
gap = {pairs: (model[pairs] - last[pairs]).mean() for pairs in dpo_ppo.PAIRS}
top = curves(few, "objective").max(1)
dpo_kl = curves(few, "kl")[:3, -1].mean()
print_verdict([
    ("1 DPO moves mass to responses in no pair", unseen.mean() > 1.5 * start.mean() and (unseen > model_unseen).sum() >= 4,
     f"DPO {mean_and_spread(unseen)}, reference {mean_and_spread(start)}, reward model {mean_and_spread(model_unseen)}; "
     f"above it in {(unseen > model_unseen).sum()} of {len(unseen)}"),
    ("2 chosen responses become less likely while the margin grows", (chosen < 0).sum() >= 3 and (margin > 0).all(),
     f"log-ratio of the chosen {mean_and_spread(chosen)}, below 0 in {(chosen < 0).sum()} of {len(chosen)}; margin {mean_and_spread(margin)}"),
    ("3 the reward model's optimum is ahead with few pairs", (model[few] > last[few]).sum() >= 4,
     f"in {(model[few] > last[few]).sum()} of {len(last[few])}, by {gap[few]:.3f} in the mean"),
    ("4 more pairs help DPO and close the gap", last[many].mean() > last[few].mean() and gap[many] < gap[few],
     f"DPO {last[few].mean():.3f} -> {last[many].mean():.3f}, gap {gap[few]:.3f} -> {gap[many]:.3f}"),
    ("5 DPO was better earlier", (top > last[few] + 1e-6).sum() >= 4, f"in {(top > last[few] + 1e-6).sum()} of {len(top)}, by {(top - last[few]).mean():.3f}"),
    ("6 IPO stays nearer to the reference", np.mean(kls) < dpo_kl, f"KL {np.mean(kls):.3f}, DPO's {dpo_kl:.3f}"),
])  # fmt: skip

# %% [markdown]
# **What binds.** The reward model. With 30 pairs the linear head's guesses for responses in no pair are wild, and the exact optimum at
# beta .3 goes where they are highest: it is over-optimised (notebook 6), and ends below the reference. The paper's theorem
# compares optima of the same reward class, unseen responses at their least favourable; the guess of a learnt head is
# another thing, and here a worse one than DPO's. With 300 pairs every response is in some pair (the empty panel), and the two
# are alike within their bands. That DPO's chosen responses become less likely, and that it was better earlier, is as in
# the paper. (Behind the prompt "3" this policy cannot reach every distribution, see notebook 7: that holds DPO back, and not the
# reward model's optimum.) Nothing here says anything of large models, where a reward model generalises by language and DPO is stopped
# after an epoch. The l2 of the head is the reward model's only prior, and stands for early stopping of a real one.
