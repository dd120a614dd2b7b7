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
# # 10. InstructGPT's alignment tax: PPO against PPO-ptx
#
# **Paper.** Ouyang et al. 2022, *Training language models to follow instructions with human feedback*: eq. 2 (the objective with
# gamma E[log pi(x)] over the pretraining text) and the appendix's sweeps of the pretraining coefficient and of the KL coefficient.
# Its numbers: KL coefficient .02, gamma 27.8; the KL coefficient alone, up to 2.0 (100 times), did not mend the regressions on SQuADv2
# and DROP and cost reward, gamma of 20 and more did mend them.
#
# **Question.** How much does the loss on held-out pretraining text rise when PPO maximises a learnt reward, and do pretraining
# gradients buy it back at less reward than a larger KL coefficient does?
#
# **What differs from the paper.** 1.3B to 175B parameters, an SFT model first, and benchmarks there; here four layers of width 256
# with a vocabulary of 2,048 (`experiments.papers.language`) that has seen the 22,203 training sentences twice and no SFT, one reward model of
# film-review ratings, and as "tax" the rise of the loss on held-out sentences, in nats per token. The coefficient has another
# scale (ours weighs means over tokens; there are as many pretraining rows as responses): only "none, some, much" can be compared. All
# parameters are trained, 24 updates of 32 responses (12 tokens, temperature 1), 4 minibatches, 1 epoch, learning rate 5e-4.
#
# ## Criterion, written before the run (3 seeds; bands: sum of the standard deviations)
#
# 1. *There is a tax.* With ptx 0 (KL coefficient .02) the held-out loss is above the reference's by more than .05 nats and the bands.
# 2. *ptx pays it back.* The mean tax falls with every step of the coefficient (0, .1, .3, 1, 3), and at 3 is below a fifth of that
#    at 0.
# 3. *Cheaply.* Some coefficient has less than half of the tax and at least 80 % of the reward gained at ptx 0.
# 4. *A larger KL coefficient is no substitute.* With KL coefficient 2.0 (100 times, as in the paper) and ptx 0, the gain in
#    reward is less than half; and for each of .2 and 2.0 some ptx coefficient has a smaller tax and more reward.
# 5. *Not the reward model alone.* VADER, which nothing was trained on, rises with ptx 0 by more than the bands, and still rises
#    with the smallest coefficient that 3 names (if 3 fails, this fails).

# %%
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers import alignment_tax as study
from experiments.papers.notebook import SMOKE, STYLES, draw_band, keep_picture, mean_and_spread, obtain_records, print_verdict

records = {(r["setting"]["ptx"], r["setting"]["beta"]): r["result"] for r in obtain_records("alignment_tax")}
NONE = (None, None)


def end(key, name):
    return np.array([seed[name] for seed in records[key]["end"]])


tax = {key: end(key, "loss") - end(NONE, "loss").mean() for key in records if key != NONE}
gain = {key: end(key, "reward") - end(NONE, "reward").mean() for key in tax}
lean = {key: end(key, "vader") - end(NONE, "vader").mean() for key in tax}
print(f"reference: loss {end(NONE, 'loss').mean():.3f} nats per token on held-out sentences (perplexity "
      f"{np.exp(end(NONE, 'loss').mean()):.1f}), reward {mean_and_spread(end(NONE, 'reward'))}, VADER {mean_and_spread(end(NONE, 'vader'))}")  # fmt: skip
print(f"{'ptx':>5} {'KL coef':>8}  {'tax (nats per token)':22} {'gain in reward':16} {'gain in VADER':16} KL (nats per response)")
for ptx, beta in tax:
    key = (ptx, beta)
    print(f"{ptx:5g} {beta:8g}  {mean_and_spread(tax[key]):22} {mean_and_spread(gain[key]):16} {mean_and_spread(lean[key]):16} "
          f"{mean_and_spread(end(key, 'kl'))}")  # fmt: skip

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
labels = {key: f"ptx {key[0]:g}" if key[1] == study.BETA else f"KL coef. {key[1]:g}" for key in tax}
for number, (key, label) in enumerate(labels.items()):
    x, y = tax[key], gain[key]
    left.errorbar(x.mean(), y.mean(), y.std(ddof=1), x.std(ddof=1), label=label, capsize=3, markersize=7, **STYLES[number])
    updates = np.arange(1, len(records[key]["reward"][0]) + 1)
    draw_band(middle, updates, records[key]["reward"], label, number)
    draw_band(right, updates, records[key]["kl"], label, number)
left.axvline(0, color="black", linewidth=0.8)
left.set(xlabel="tax: rise of the held-out loss (nats per token)", ylabel="gain in reward (std of its training sentences)",
         title="Reward against the loss on pretraining text")  # fmt: skip
middle.set(xlabel="updates (32 responses each)", ylabel="reward of the responses", title="3 seeds: mean and std")
right.set(xlabel="updates (32 responses each)", ylabel="KL to the reference (nats per response)", title="Distance")
left.legend(fontsize=8)
keep_picture(figure, "10_alignment_tax")

# %% [markdown]
# What is said, at the end, to the first two held-out prompts (seed 0):

# %%
for key in (NONE, *tax):
    for text in records[key]["end"][0]["texts"]:
        print(f"{labels.get(key, 'reference'):12}  {text!r}")

# %% [markdown]
# ## Change a formula: the reference's own distribution in place of the text's tokens
# PPO-ptx learns the tokens of the text. One may ask instead that the policy keep the reference's whole next-token distribution on it:
# KL(reference, policy) at every position of the text. On the toy model (a two-layer model of a toy grammar, made in seconds).

# %%
import jax
import jax.numpy as jnp

from ppo_jax import Frozen, Hyper, apply, make_iteration
from ppo_jax.models.adapters import init_full, unembedding
from ppo_jax.train.objective import ppo_loss
from ppo_jax.train.state import init_state


def my_loss(policy, algorithm, frozen, minibatch, counts, hyper):
    loss, metrics = ppo_loss(policy, algorithm, frozen, minibatch, counts, hyper._replace(ptx_coef=0.0))
    texts, positions = minibatch.pretrain, jnp.cumsum(minibatch.pretrain.mask, axis=1) - 1

    def logprobs(adapter):
        hidden = apply(frozen.base, adapter, algorithm.model, texts.tokens, positions)
        return jax.nn.log_softmax(hidden @ unembedding(frozen.base, adapter).T)

    old, new = logprobs({}), logprobs(policy.adapter)
    kl = jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))  # <- the formula; PPO-ptx: -log pi of the text's tokens
    return loss + hyper.ptx_coef * kl, metrics | {"text_kl": (kl, jnp.ones(()))}


world, algorithm, rng = study.prepare(True), study.algorithm(True), np.random.default_rng(0)
iteration = make_iteration(algorithm.model, algorithm.ppo, algorithm.optimizer, algorithm.reward, loss=my_loss)
for coefficient in (0.0, 3.0):
    state = init_state(jax.random.key(0), init_full(world.model.params), algorithm.model, algorithm.optimizer, study.BETA)
    for update in range(2 if SMOKE else 20):
        hyper = Hyper(learning_rate=3e-3, temperature=1.0, kl_coef=study.BETA, ptx_coef=coefficient)
        state, metrics = iteration(state, Frozen(world.model.params, world.role), study.draw(world, 32, rng), hyper)
    shown = {name: float(metrics[name][0] / metrics[name][1]) for name in ("text_kl", "reward")}
    print(f"coefficient {coefficient:g}: after {update + 1} updates", ", ".join(f"{k} {v:.3f}" for k, v in shown.items()))

# %% [markdown]
# ## Verdict

# %%
plain, paper = (0.0, study.BETA), (0.0, study.BETAS[-1])
ptx = [(value, study.BETA) for value in study.PTX if (value, study.BETA) in tax]
claims, missing = [], []


def claim(name, can, make):
    """Add a claim, or say that what it is about was not run."""
    claims.append((name, *make())) if can else missing.append(name)


def is_taxed():
    band = tax[plain].std(ddof=1) + end(NONE, "loss").std(ddof=1)
    return tax[plain].mean() > max(0.05, band), f"{mean_and_spread(tax[plain])} nats per token"


def pays():
    means = [tax[key].mean() for key in ptx]
    return bool((np.diff(means) < 0).all()) and means[-1] < means[0] / 5, ", ".join(f"{k[0]:g}: {m:.3f}" for k, m in zip(ptx, means))


def share(key):
    return tax[key].mean() / tax[plain].mean(), gain[key].mean() / gain[plain].mean()


cheap = [key for key in ptx if key != plain and plain in tax and share(key)[0] < 0.5 and share(key)[1] >= 0.8]


def substitutes():
    better = {beta: [k[0] for k in ptx if k != plain and tax[k].mean() < tax[0.0, beta].mean() and gain[k].mean() > gain[0.0, beta].mean()]
              for beta in study.BETAS}  # fmt: skip
    return (share(paper)[1] < 0.5 and all(better.values()),
            ", ".join(f"{beta:g}: {share((0.0, beta))[1]:.0%} of the gain, {share((0.0, beta))[0]:.0%} of the tax, "
                      f"beaten on both by ptx {found or 'none'}" for beta, found in better.items()))  # fmt: skip


def leans():
    band = lean[plain].std(ddof=1) + end(NONE, "vader").std(ddof=1)
    text = f"; ptx {cheap[0][0]:g}: {lean[cheap[0]].mean():+.3f}" if cheap else ""
    return lean[plain].mean() > band and bool(cheap) and lean[cheap[0]].mean() > 0, f"{lean[plain].mean():+.3f} (bands {band:.3f}){text}"


claim("1 there is a tax", plain in tax, is_taxed)
claim("2 ptx pays it back", len(ptx) == len(study.PTX), pays)
claim("3 half of the tax for less than a fifth of the gain", len(ptx) > 1 and plain in tax, lambda: (
    bool(cheap), ", ".join(f"{k[0]:g}: {share(k)[0]:.0%} of the tax, {share(k)[1]:.0%} of the gain" for k in ptx if k != plain)))  # fmt: skip
claim("4 a larger KL coefficient is no substitute", all((0.0, beta) in tax for beta in study.BETAS) and plain in tax, substitutes)
claim("5 VADER rises, too", plain in tax, leans)
print_verdict(claims)
for name in missing:
    print(f"NOT RUN: {name}")

# %% [markdown]
# **What binds.** The reward model orders only 61 % of held-out pairs (its base has perplexity 110), so the reward that is gained is mostly the reward
# model's error: that VADER does not follow is over-optimisation (notebook 6), and a policy that is 32 nats away after 24 updates is nobody's
# InstructGPT. The tax is real, and pretraining gradients do pay most of it back, but here they also take most of the reward:
# between the two there is a trade, and no coefficient among these that keeps both. A KL coefficient of 2.0 is what the paper says it is: next
# to no reward is left, and yet more tax than with a ptx coefficient of 1, which leaves more reward; claim 4 fails at .2, whose reward no
# ptx coefficient reaches. The learning rate (5e-4, all parameters) is large,
# and the texts of ptx are those that the model has already seen twice. How much of that is the small model's doing cannot be told from here.
