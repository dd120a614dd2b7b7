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
# # 8. PPO, RLOO, GRPO, Dr. GRPO, REINFORCE++ with equal samples
#
# **Papers.** Ahmadian et al. 2024, *Back to Basics*, table 1 (RLOO against PPO); Liu et al. 2025, *Understanding
# R1-Zero-Like Training*, section 3 (GRPO's length bias, Dr. GRPO); Hu 2025, *REINFORCE++*.
#
# **Question.** With the same number of responses and the same tuning for each, which ends with the highest objective? And do
# wrong responses grow longer under GRPO, and not under Dr. GRPO?
#
# **What differs from the papers.** Ahmadian et al. train Pythia 6.9B and Llama 7B, Liu et al. Qwen2.5 1.5B to 7B on
# mathematics; here four layers of width 32 speak 24 words. The win rate on TL;DR in Ahmadian et al. is 77.9 % for RLOO
# (k = 4) and 67.6 % for PPO (as remembered; the paper was not at hand when this was written); Liu et al. give curves.
# All five here have k1 in the reward, beta .1, so that the advantages and the weights of tokens are all that differs;
# GRPO as published has k3 in the loss (notebook 7 shows what that does).
#
# ## Criterion, written before the run
#
# 6,400 responses each (100 updates of 64, groups of 4); learning rates 1e-4, 3e-4, 1e-3, 3e-3, 1e-2 with 2 tuning seeds
# each, then 5 fresh seeds at the best. The objective is score - beta KL, per response, mean of the last 10 updates.
#
# 1. RLOO is not below PPO: its mean is at least PPO's less the bands (sum of the standard deviations over seeds).
# 2. All five reach at least 80 % of the best one's objective.
# 3. GRPO and Dr. GRPO differ by less than the bands on this task.
# 4. *Length.* Where the score is that of the first word and beta is 0, responses that score -1 are longer under GRPO than
#    under Dr. GRPO after training, for at least 4 of 5 seeds, and under GRPO longer than the reference's in the mean.
#    *Second attempt, written after the first failed and before its run*: the same after 10 updates. After 100, hardly a wrong
#    response was left, and under both methods responses went on to the limit of 12 tokens, where no difference can show.
# 5. *The cell that you may change*: GRPO without its division, by `make_iteration(..., advantage=my_advantage)`, is Dr.
#    GRPO's advantage: both take the same first update (difference below 1e-5 of it).

# %%
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers.notebook import (
    STYLES,
    draw_band,
    keep_picture,
    mean_and_spread,
    obtain_records,
    print_verdict,
    select,
)

records = obtain_records("algorithms")
worth = {record["setting"]["method"]: record["result"] for record in select(records, task="worth")}
length = {record["setting"]["method"]: record["result"] for record in select(records, task="first word", updates=100)}
few = [r for r in select(records, task="first word") if r["setting"]["updates"] < 100]
early = {record["setting"]["method"]: record["result"] for record in few}

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
last = {}
for number, (method, found) in enumerate(worth.items()):
    curve = np.array(found["shaped_reward"])
    last[method] = curve[:, -10:].mean(1)
    draw_band(left, np.arange(1, curve.shape[1] + 1), curve, method, number)
    middle.plot(found["rates"], np.mean(found["sweep"], axis=0), label=method, **STYLES[number])
left.set(xlabel="updates (64 responses each)", ylabel="objective: score - beta KL (per response)",
         title="5 fresh seeds at the best rate")  # fmt: skip
middle.set(xlabel="learning rate", xscale="log", ylabel="objective, last 10 updates",
           title="The same sweep for each: mean of 2 seeds")  # fmt: skip
left.legend()
for number, (method, found) in enumerate(early.items()):
    values, x = np.array(found["lengths"], float), np.arange(3) + 0.08 * number
    spread = np.nanstd(values, 0, ddof=1)
    right.errorbar(x, np.nanmean(values, 0), spread, label=method, capsize=4, **STYLES[number])
right.plot(np.arange(3) - 0.08, next(iter(early.values()))["reference_lengths"], "kx", label="reference")
right.set_xticks(range(3), ["-1 (bad)", "0", "+1 (good)"])
right.set(xlabel="score: that of the first word", ylabel="tokens per response",
          title="Length of responses after 10 updates, beta 0")  # fmt: skip
right.legend()
keep_picture(figure, "08_algorithms")
for method, found in worth.items():
    print(f"{method:12} objective {mean_and_spread(last[method]):18} best rate {found['best']:g}; "
          f"KL {mean_and_spread(np.array(found['kl'])[:, -10:].mean(1))}")  # fmt: skip

# %% [markdown]
# ## Change a formula: GRPO without the division

# %%
import dataclasses

import jax
import jax.numpy as jnp

from experiments.papers import algorithms, words
from ppo_jax import Frozen, Hyper, init_state, make_iteration, make_optimizer
from ppo_jax.models.adapters import init_full
from ppo_jax.train.experience import response_totals


def my_advantage(algorithm, outcome, hyper):
    totals = response_totals(outcome.rewards, outcome.mask)
    groups = totals.reshape(-1, algorithm.ppo.group_size)
    relative = groups - groups.mean(axis=1, keepdims=True)  # <- the formula: GRPO divides this by the group's std
    return jnp.where(outcome.mask, relative.reshape(-1, 1), 0.0), outcome.rewards


language, adapters = words.learn_language(), {}
grpo = algorithms.METHODS["GRPO"]
choices = {"mine": (grpo, my_advantage), "Dr. GRPO": (dataclasses.replace(grpo, advantage="dr_grpo"), None)}
frozen, prompts = Frozen(language.base, words.reference_score(language, 1.0)), words.draw_prompts(
    language, 16, np.random.default_rng(0)
)
for name, (ppo, mine) in choices.items():
    iteration = make_iteration(language.config, ppo, make_optimizer(), words.reward, advantage=mine)
    state = init_state(jax.random.key(0), init_full(language.base), language.config, make_optimizer(), 0.1)
    state, _ = iteration(state, frozen, prompts, Hyper(learning_rate=1e-3, temperature=1.0, kl_coef=0.1))
    adapters[name] = state.policy.adapter


def size(left, right):
    return np.sqrt(sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right))))


difference = size(adapters["mine"], adapters["Dr. GRPO"]) / size(adapters["Dr. GRPO"], language.base)
print(f"difference of the two updates: {difference:.1e} of the update")


# %% [markdown]
# ## Verdict

# %%
def apart(left, right):
    return left.mean() - right.mean(), left.std(ddof=1) + right.std(ddof=1)


best = max(values.mean() for values in last.values())
claims = [("2 all reach 80 % of the best", min(v.mean() for v in last.values()) >= 0.8 * best,
           ", ".join(f"{m} {v.mean() / best:.0%}" for m, v in last.items()))]  # fmt: skip
if "RLOO" in last:
    gap, band = apart(last["RLOO"], last["PPO"])
    claims.insert(0, ("1 RLOO is not below PPO", gap > -band, f"{gap:+.3f} (bands {band:.3f})"))
if "Dr. GRPO" in last:
    gap, band = apart(last["GRPO"], last["Dr. GRPO"])
    claims.append(("3 GRPO and Dr. GRPO alike", abs(gap) < band, f"{gap:+.3f} (bands {band:.3f})"))
for found, when in ((length, "after 100 updates"), (early, "second attempt, after 10 updates")):
    if "Dr. GRPO" not in found:
        continue
    wrong = {method: np.array(one["lengths"], float)[:, 0] for method, one in found.items()}
    reference = found["GRPO"]["reference_lengths"][0]
    longer = int((wrong["GRPO"] > wrong["Dr. GRPO"]).sum())
    claims.append((f"4 GRPO lengthens wrong responses, {when}", longer >= 4 and np.nanmean(wrong["GRPO"]) > reference,
                   f"longer for {longer} of 5 seeds: GRPO {mean_and_spread(wrong['GRPO'])}, "
                   f"Dr. GRPO {mean_and_spread(wrong['Dr. GRPO'])}, reference {reference:.2f}"))  # fmt: skip
claims.append(("5 GRPO without the division is Dr. GRPO's advantage", difference < 1e-5, f"{difference:.1e}"))
print_verdict(claims)

# %% [markdown]
# **What binds.** The sweep's grid (half a decade), 24 words, an exact score, responses of at most 12 tokens. A critic that
# shares a trunk of width 32 is not the critic of a 7B model; the paper's gap between RLOO and PPO need not show here.
