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
# Two parts: a model whose responses can be listed (what the theorem is about), and the small real language model (what happens when both
# are trained).
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
# ## Criterion of the first part, written before the run (5 data sets for each number of pairs)
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
from experiments.papers.notebook import SMOKE, STYLES, draw_band, keep_picture, mean_and_spread, obtain_records, print_verdict, select

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
# ## Verdict of the first part

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
# **What binds in the first part.** The reward model. With 30 pairs the linear head's guesses for responses in no pair are wild, and the exact optimum at
# beta .3 goes where they are highest: it is over-optimised (notebook 6), and ends below the reference. The paper's theorem
# compares optima of the same reward class, unseen responses at their least favourable; the guess of a learnt head is
# another thing, and here a worse one than DPO's. With 300 pairs every response is in some pair (the empty panel), and the two
# are alike within their bands. That DPO's chosen responses become less likely, and that it was better earlier, is as in
# the paper. (Behind the prompt "3" this policy cannot reach every distribution, see notebook 7: that holds DPO back, and not the
# reward model's optimum.) Nothing here says anything of large models, where a reward model generalises by language and DPO is stopped
# after an epoch. The l2 of the head is the reward model's only prior, and stands for early stopping of a real one.

# %% [markdown]
# ## Second part: real language
#
# **Papers.** Xu et al. 2024, section 4.2 and 4.3 (DPO suffers where the model's outputs leave the distribution of the pairs; PPO with a
# reward model of the same pairs is ahead on real tasks), and Lin et al. 2024, *On the Limited Generalization Capability of the Implicit
# Reward Model Induced by Direct Preference Optimization* (out of distribution the implicit reward is 3 points less accurate than an explicit
# one in the mean, 7 at most).
#
# **Question.** From the same pairs and the same base, which way buys more of the labeller's reward, and more of a judge that
# labelled nothing, with the same KL, behind prompts like those of the pairs and behind others? Which of the two rewards, DPO's implicit one
# (beta log pi / rho) or the explicit model, orders unseen responses as the labeller does, and does the implicit one drift on what
# the policy itself comes to say?
#
# **What differs from the papers.** 7B models, people's pairs, GPT-4 or unit tests as judges there. Here: the base is the small language model
# (four layers of width 256, perplexity 110; it writes words and scraps of sentences). A seed is a set of 2,048 pairs of its own
# responses (12 tokens) to openings of film-review sentences; the labeller is notebook 10's reward model of film-review ratings (61 % of held-out
# pairs of people), with P = sigmoid(r1 - r2). DPO: two passes in steps of 32 pairs, learning rate 3e-4 falling to 0. PPO: a reward model of
# the same pairs (all parameters, two passes, 3e-4), then 24 updates of 32 responses, learning rate 5e-4; its scores are not
# normalised, so that both ways maximise E[r] - beta KL with the same beta, .1 as in Xu et al., or .3. Both train all parameters.
# Judges: the labeller's score (in standard deviations over its training sentences) and VADER, a lexicon that no way has seen. Out of distribution:
# openings of product reviews, tweets and editorials, which the base has read as text and no pair has. Each point: two responses to each of 256
# prompts of either kind. The learning rates were tried
# on one set of pairs (seed 99) that is not counted: PPO's was 17 nats away after 24 updates; DPO's, with 512 pairs and 32 steps, .2 nats with
# 1e-4 and 1.6 with 3e-4. There the reward model ordered .91 and .84 of unseen pairs as the labeller does, and DPO's chosen responses had become
# likelier; nothing else of what follows was known.
#
# ### Criterion, added on 2026-11-28 and written before the run (3 seeds; bands: sum of the standard deviations)
#
# At "the same KL": along each curve the score is interpolated at the first crossing of a KL (nats per response, in distribution for the
# prompts in, out for those out); the KL is the largest of 1, 2, 4, 8, 16 that all six runs of beta .1 reach on both kinds of prompts.
#
# 7. *PPO is ahead at the same KL, in distribution*: the mean of the labeller's score is above DPO's by more than the bands (beta .1).
# 8. *And out of distribution*, likewise; and its lead there is larger than in distribution (means).
# 9. *VADER agrees*: at that KL PPO's VADER score is above DPO's, in and out, in the means, and above the reference's by more than the bands in.
# 10. *The explicit reward generalises better*: on the base's unseen pairs the reward model orders more like the labeller than DPO's implicit
#     reward at its end (beta .1), in and out, for all seeds; and in the mean it loses fewer points from in to out.
# 11. *Drift*: on DPO's own responses at its end (in) its implicit reward orders at least 5 points fewer like the labeller than it does of the
#     base's, in the mean; the reward model on PPO's own responses loses less than that.
# 12. *Chosen responses become less likely*: DPO's mean log-ratio of the chosen responses (256 of its pairs) ends below 0 for at least 2 of 3 seeds,
#     while the margin over the rejected ones grows for all.
# 13. *Beta*: with .3 both ways end at a smaller KL than with .1, in the means.

# %%
from experiments.papers import dpo_ppo_small as small

records = obtain_records("dpo_ppo_small")
WAYS = ("DPO", "PPO")


def runs(way, beta):
    return [r["result"] for r in select(records, way=way, beta=beta)]


def along(result, kind, name):
    return np.array([at[kind][name] for at in result["curve"]])


def crossing(result, kind, name, level):
    """The value where KL first reaches a level, or nan."""
    kl, y = along(result, kind, "kl"), along(result, kind, name)
    for i in range(1, len(kl)):
        if kl[i] >= level:
            share = (level - kl[i - 1]) / (kl[i] - kl[i - 1])
            return y[i - 1] + share * (y[i] - y[i - 1])
    return np.nan


def same_kl(beta):
    """The largest level that all runs of a beta reach on both kinds of prompts; None: none."""
    reached = [along(r, kind, "kl").max() for way in WAYS for r in runs(way, beta) for kind in ("in", "out")]
    fit = [level for level in (1, 2, 4, 8, 16) if reached and min(reached) >= level]
    return fit[-1] if fit else None


def at_end(way, beta, kind, name):
    return np.array([along(r, kind, name)[-1] for r in runs(way, beta)])


KINDS = {"in": "film reviews (in)", "out": "other texts (out)"}
print(f"{'':18}" + " ".join(f"{name:>14}" for name in ("KL in", "labeller in", "labeller out", "VADER in", "VADER out", "length in")))
for beta in small.BETAS:
    for way in WAYS:
        if runs(way, beta):
            columns = (("in", "kl"), ("in", "reward"), ("out", "reward"), ("in", "vader"), ("out", "vader"), ("in", "length"))
            cells = [at_end(way, beta, *column) for column in columns]
            print(f"{way}, beta {beta:g}, end  " + " ".join(f"{mean_and_spread(c):>14}" for c in cells))

# %%
figure, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
for row, kind in zip(grid, KINDS):
    for axes, (name, label) in zip(row, (("reward", "labeller's score (its std)"), ("vader", "VADER (-1 to 1)"))):
        for number, (way, beta) in enumerate((way, beta) for way in WAYS for beta in small.BETAS):
            for seed, result in enumerate(runs(way, beta)):
                axes.plot(along(result, kind, "kl"), along(result, kind, name), markersize=4, linewidth=1,
                          label=f"{way}, beta {beta:g}" if seed == 0 else None, **STYLES[number])  # fmt: skip
        axes.set(xlabel="KL to the base (nats per response)", ylabel=label, title=KINDS[kind])
grid[0, 0].legend(fontsize=8)
axes = grid[0, 2]
for number, (way, name, label) in enumerate((
        ("DPO", "implicit on base", "implicit reward, the base's responses"), ("DPO", "implicit on own", "implicit reward, DPO's own"),
        ("PPO", "reward model on own", "reward model, PPO's own"))):  # fmt: skip
    if runs(way, small.BETAS[0]):
        curves_ = [along(r, "in", name) for r in runs(way, small.BETAS[0])]
        draw_band(axes, np.linspace(0, 1, len(curves_[0])), curves_, label, number)
if runs("DPO", small.BETAS[0]):
    explicit = np.mean([r["reward model on base"]["in"] for r in runs("DPO", small.BETAS[0])])
    axes.axhline(explicit, color="black", linewidth=0.8, label="reward model, the base's responses")
axes.set(xlabel="share of training", ylabel="share of pairs ordered as the labeller does", title="Film reviews, beta .1", ylim=(0.35, 1))
if records:
    axes.legend(fontsize=8, loc="lower right")
axes = grid[1, 2]
for number, (way, name) in enumerate((way, name) for way in WAYS for name in ("chosen", "rejected")):
    if runs(way, small.BETAS[0]):
        curves_ = [[at[name] for at in r["curve"]] for r in runs(way, small.BETAS[0])]
        draw_band(axes, np.linspace(0, 1, len(curves_[0])), curves_, f"{way}: {name}", number)
axes.axhline(0, color="black", linewidth=0.8)
axes.set(xlabel="share of training", ylabel="log-ratio to the base (nats)", title="The pairs that were learnt from, beta .1")
axes.legend(fontsize=8)
keep_picture(figure, "09_dpo_ppo_small")

# %% [markdown]
# What is said at the end (seed 0, beta .1) to the first two prompts of either kind:

# %%
for way in WAYS:
    for result in runs(way, small.BETAS[0])[:1]:
        for kind, texts in result["texts"].items():
            for text in texts:
                print(f"{way:4} {KINDS[kind]:18} {text!r}")

# %% [markdown]
# ### Verdict of the second part

# %%
beta, loose = small.BETAS[0], small.BETAS[-1]
level, claims = same_kl(beta), []


def there(kind, name):
    """At the same KL: DPO's and PPO's values."""
    return [np.array([crossing(r, kind, name, level) for r in runs(way, beta)]) for way in WAYS]


def lead(kind, name):
    dpo, ppo = there(kind, name)
    return ppo.mean() - dpo.mean(), ppo.std(ddof=1) + dpo.std(ddof=1)


def tell(kind, name):
    dpo, ppo = there(kind, name)
    return f"{kind}: PPO {mean_and_spread(ppo)}, DPO {mean_and_spread(dpo)}"


whole = all(len(runs(way, beta)) >= (2 if SMOKE else 3) for way in WAYS)
if whole and level:
    (gap, band), (gap_out, band_out) = lead("in", "reward"), lead("out", "reward")
    start = np.array([along(r, "in", "vader")[0] for r in runs("PPO", beta)])
    ppo = there("in", "vader")[1]
    claims += [
        (f"7 PPO is ahead at {level} nats, in distribution", gap > band, f"{tell('in', 'reward')}; bands {band:.3g}"),
        ("8 and out of it, and by more", gap_out > band_out and gap_out > gap, f"{tell('out', 'reward')}; bands {band_out:.3g}; lead {gap:+.3g} in, {gap_out:+.3g} out"),
        ("9 VADER agrees", lead("in", "vader")[0] > 0 and lead("out", "vader")[0] > 0 and ppo.mean() - start.mean() > ppo.std(ddof=1) + start.std(ddof=1),
         f"{tell('in', 'vader')}; {tell('out', 'vader')}; reference in {mean_and_spread(start)}"),
    ]  # fmt: skip
if whole:
    explicit = {kind: np.array([r["reward model on base"][kind] for r in runs("DPO", beta)]) for kind in KINDS}
    implicit = {kind: at_end("DPO", beta, kind, "implicit on base") for kind in KINDS}
    loss = {name: (at["in"] - at["out"]).mean() for name, at in (("explicit", explicit), ("implicit", implicit))}
    own, explicit_own = at_end("DPO", beta, "in", "implicit on own"), at_end("PPO", beta, "in", "reward model on own")
    fall, explicit_fall = (implicit["in"] - own).mean(), (explicit["in"] - explicit_own).mean()
    chosen, rejected = (np.array([r["curve"][-1][name] for r in runs("DPO", beta)]) for name in ("chosen", "rejected"))
    claims += [
        ("10 the explicit reward generalises better", all((explicit[k] > implicit[k]).all() for k in KINDS) and loss["explicit"] < loss["implicit"],
         "; ".join(f"{k}: explicit {mean_and_spread(explicit[k])}, implicit {mean_and_spread(implicit[k])}" for k in KINDS)
         + f"; lost from in to out {loss['explicit']:+.3f}, {loss['implicit']:+.3f}"),
        ("11 the implicit reward drifts", fall >= 0.05 and explicit_fall < fall,
         f"on own responses implicit {mean_and_spread(own)} (fell by {fall:+.3f}), explicit {mean_and_spread(explicit_own)} (fell by {explicit_fall:+.3f})"),
        ("12 chosen responses become less likely", (chosen < 0).sum() >= 2 and (chosen > rejected).all(),
         f"log-ratio of the chosen {mean_and_spread(chosen)}, of the rejected {mean_and_spread(rejected)}"),
    ]  # fmt: skip
if whole and all(len(runs(way, loose)) >= 3 for way in WAYS):
    ends = {(way, b): at_end(way, b, "in", "kl") for way in WAYS for b in small.BETAS}
    claims.append(("13 a larger beta stays nearer", all(ends[way, loose].mean() < ends[way, beta].mean() for way in WAYS),
                   "; ".join(f"{way} beta {b:g}: {mean_and_spread(x)} nats" for (way, b), x in ends.items())))  # fmt: skip
print({f"{way}, beta {b:g}": f"{len(runs(way, b))} seeds" for b in small.BETAS for way in WAYS}, "(nothing is claimed of fewer than 3)")
print_verdict(claims)
done = {name.split()[0] for name, _, _ in claims}
print("NOT RUN:", ", ".join(str(i) for i in range(7, 14) if str(i) not in done) or "nothing")

# %% [markdown]
# **What binds in the second part (written after the run).** With 2 nats DPO has more of the labeller's score than PPO, in distribution within the bands and
# out of it beyond them, against the paper. PPO passes 2 nats in its first updates, so that its value there is a straight line from the base; it
# is judged far from where it was steered to (18 nats with beta .1, 10 with .3, where DPO ends at 3.1 and 1.9, since its learning rate falls to 0), and there it has
# four times DPO's score. Neither moves VADER beyond the bands: the labeller is a reward model of a model that writes scraps of sentences, and
# what it likes is not what a lexicon likes (notebook 6). The clearest figure is the explicit reward model's .86 against the implicit reward's .54 of
# the base's unseen pairs, though DPO's learnt pairs are six nats apart: it has learnt those pairs and little else. Criterion 10 fails on its
# second half alone (neither loses anything out of distribution), 11 since the implicit reward has nothing to lose. Chosen
# responses become a little less likely, rejected ones much less.
