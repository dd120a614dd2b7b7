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
# # 6. Over-optimisation: best-of-n and PPO against proxies from few labels
#
# **Paper.** Gao, Schulman and Hilton 2022, *Scaling Laws for Reward Model Overoptimization*: figure 1 (proxy rises, gold
# peaks), eq. 1 (gold = d (a - b d) for best-of-n, d = sqrt(KL)), figure on the amount of labels. KL of best-of-n is
# log n - (n - 1) / n, as there.
#
# **Question.** Does the gold score of the best of n, as a proxy chooses it, rise and then fall? Does the peak move outward
# with more labels, and does d (a - b d) describe the curves?
#
# **What differs from the paper.** There the gold score is a reward model of 6B, proxies have 3M to 3B parameters and 100 to
# 100,000 labels. Here responses are sentences of a language of 24 words; gold
# = good words less bad ones less the squares of repetitions, the proxy a logistic regression on the words' counts, which
# cannot see repetition. So the proxy is wrong in a way that more labels do not mend. The paper fits a and b per proxy size and
# prints no table for them. n goes to 10,000 (KL 8.2 nats); the paper's to 60,000.
#
# ## Criterion, written before the run (100, 300, 1,000 and 2,000 labels, 5 proxies each)
#
# 1. The proxy's own score rises monotonically with KL, for every proxy.
# 2. The gold score peaks before the largest KL for every number of labels: the mean at the end is below the mean at the peak of
#    the mean curve by more than one standard deviation of this difference over proxies.
# 3. The peak's KL is larger with 2,000 labels than with 100 (mean curves), and so is the gold score at the peak.
# 4. d (a - b d) fits the mean gold curve with R² > .95, for every number of labels.
# 5. *The cell that you may change*: with a gold score that has no term for repetitions, the proxy is of the right family, and at
#    2,000 labels the gold score does not peak before the largest KL.
#
# ## Criterion for PPO, written after best-of-n had been run and before PPO was
#
# The same 20 proxies; the policy is the four-layer model that has learnt the language, 150 updates of 128 responses without a KL penalty;
# curves over d = sqrt(KL) with KL the mean log-ratio of a response, scores in standard deviations of the reference's responses, smoothed
# over 5 updates. The paper: gold = d (a - b log d) for RL (eq. 2 there), and RL uses more KL than best-of-n for the same proxy score.
#
# 6. The proxy's score is higher in the last 10 updates than in the first 10, for every proxy.
# 7. The gold score peaks: for every number of labels the end of the mean curve is below its peak by more than one standard deviation
#    of this difference over proxies.
# 8. The gold score at the peak is higher with 2,000 labels than with 100.
# 9. d (a - b log d) fits the mean gold curve with R² > .9, for every number of labels.
# 10. At the KL where best-of-n's gold score peaks, PPO's proxy score is below best-of-n's, for every number of labels.
#
# *Second attempt, written after the first and before its run*: the same criterion at a learning rate of 1e-4 in place of 1e-3, 120 updates.
# At the first the policy was 26 nats away after 15 updates, so that hardly a point of its curves lay where the gold score turns. Its
# records stay, and both verdicts are printed.

# %%
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers import overoptimisation as study
from experiments.papers.notebook import STYLES, draw_band, keep_picture, obtain_records, print_verdict, select
from experiments.papers.words import WORTH

records = obtain_records("overoptimisation")
by_ppo, first_ppo = {}, {}  # labels -> curves; those of the first attempt name no learning rate
for record in obtain_records("overoptimisation_ppo"):
    (by_ppo if "rate" in record["setting"] else first_ppo)[record["setting"]["labels"]] = record["result"]
labels = sorted({record["setting"]["labels"] for record in records})

# %%
kl = np.array(records[0]["result"]["kl"])
d = np.sqrt(kl)
gold, proxy = ({n: np.array([r["result"][key] for r in select(records, labels=n)]) for n in labels} for key in ("gold", "proxy"))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
fits = {}
for number, n in enumerate(labels):
    accuracy = np.mean([r["result"]["accuracy"] for r in select(records, labels=n)])
    draw_band(left, d, proxy[n], f"{n} labels", number)
    draw_band(right, d, gold[n], f"{n} labels ({accuracy:.1%} of pairs)", number)
    mean = gold[n].mean(0)
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), mean, rcond=None)
    r2 = 1 - ((mean - d * (a - b * d)) ** 2).sum() / ((mean - mean.mean()) ** 2).sum()
    fits[n] = (a, b, r2)
    right.plot(d, d * (a - b * d), color="black", linewidth=0.7)
    print(f"{n:5} labels: gold = d ({a:.3f} - {b:.3f} d), R2 {r2:.3f}; peak of the curve at KL {kl[mean.argmax()]:.2f} nats, "
          f"gold {mean.max():.2f}, at the end {mean[-1]:.2f}")  # fmt: skip
left.set(xlabel="d = sqrt(KL), KL in nats", ylabel="proxy score (std of the reference)", title="What the proxy says")
right.set(xlabel="d = sqrt(KL), KL in nats", ylabel="gold score (std of the reference)",
          title="What is true; thin: d (a - b d)")  # fmt: skip
left.legend()
right.legend()
keep_picture(figure, "06_overoptimisation")

# %% [markdown]
# ## The same proxies under PPO

# %%
def smooth(values):
    """Means of 5 updates in a row."""
    return np.apply_along_axis(lambda row: np.convolve(row, np.ones(5) / 5, mode="valid"), 1, np.array(values, float))


def judge_ppo(found_by_labels, attempt):
    """The claims 6 to 10 of one attempt."""
    rises, tops, drops, fits, lead = {}, {}, {}, {}, {}
    for n, raw in found_by_labels.items():
        found = {name: smooth(values) for name, values in raw.items()}
        x, mean = found["kl"].mean(0), found["gold"].mean(0)
        rises[n] = (found["proxy"][:, -6:].mean(1) > found["proxy"][:, :6].mean(1)).all()
        difference = found["gold"][:, mean.argmax()] - found["gold"][:, -1]
        tops[n], drops[n] = mean.max(), (difference.mean(), difference.std(ddof=1))
        away, where = np.sqrt(np.maximum(x, 1e-3)), gold[n].mean(0).argmax()
        (a, b), *_ = np.linalg.lstsq(np.stack([away, -away * np.log(away)], axis=1), mean, rcond=None)
        fits[n] = 1 - ((mean - away * (a - b * np.log(away))) ** 2).sum() / ((mean - mean.mean()) ** 2).sum()
        order = np.argsort(x)
        lead[n] = np.interp(kl[where], x[order], found["proxy"].mean(0)[order]) - proxy[n].mean(0)[where]
        print(f"{attempt}, {n:5} labels: gold = d ({a:.3f} - {b:.3f} log d), R2 {fits[n]:.3f}; peak at KL {x[mean.argmax()]:.2f} nats, gold "
              f"{mean.max():.2f}; at the end KL {x[-1]:.2f} nats, gold {mean[-1]:.2f}, proxy {found['proxy'].mean(0)[-1]:.2f}")  # fmt: skip
    few, many = min(tops), max(tops)
    return [
        (f"6 PPO, {attempt}: the proxy's score rises", all(rises.values()), "every proxy"),
        (f"7 PPO, {attempt}: the gold score peaks", all(mean > spread for mean, spread in drops.values()),
         ", ".join(f"{n}: {mean:.2f} ± {spread:.2f} below" for n, (mean, spread) in drops.items())),
        (f"8 PPO, {attempt}: a higher peak with more labels", tops[many] > tops[few], ", ".join(f"{n}: {top:.2f}" for n, top in tops.items())),
        (f"9 PPO, {attempt}: d (a - b log d) fits", min(fits.values()) > 0.9, ", ".join(f"{n}: {r2:.3f}" for n, r2 in fits.items())),
        (f"10 PPO, {attempt}: less proxy score at the same KL", max(lead.values()) < 0, ", ".join(f"{n}: {value:+.2f}" for n, value in lead.items())),
    ]  # fmt: skip


attempts = {"first attempt": first_ppo, "second attempt": by_ppo}
ppo_claims = [claim for attempt, found in attempts.items() if found for claim in judge_ppo(found, attempt)]
curves = {n: {name: smooth(values) for name, values in found.items()} for n, found in by_ppo.items()}
mean_kl = {n: found["kl"].mean(0) for n, found in curves.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for number, (n, found) in enumerate(curves.items()):
    x = np.sqrt(np.maximum(mean_kl[n], 1e-3))
    draw_band(left, x, found["proxy"], f"PPO, {n} labels", number)
    draw_band(right, x, found["gold"], f"PPO, {n} labels", number)
    if n in gold:
        left.plot(d, proxy[n].mean(0), color=STYLES[number]["color"], linewidth=0.7)
        right.plot(d, gold[n].mean(0), color=STYLES[number]["color"], linewidth=0.7)
left.set(xlabel="d = sqrt(KL), KL in nats", ylabel="proxy score (std of the reference)", title="What the proxy says; thin: best-of-n")
right.set(xlabel="d = sqrt(KL), KL in nats", ylabel="gold score (std of the reference)", xlim=(0, 3.2), ylim=(-4, 1.5),
          title="What is true, where it turns; thin: best-of-n")  # fmt: skip
left.legend()
right.legend(loc="lower left")
keep_picture(figure, "06_overoptimisation_ppo")

# %% [markdown]
# ## Change a formula: the gold score
# Without the term for repetitions the proxy is of the gold score's own family.

# %%
counts, _ = study.draw_responses(records[0]["setting"]["responses"])
mine = counts @ WORTH[1:]  # <- the formula: study.draw_responses subtracts the squares of repetitions
ends, highest = [], []
for seed in range(3):
    rng = np.random.default_rng(seed)
    found = counts @ study.fit_proxy(*study.draw_labels(counts, mine, 2000, rng))
    order = np.argsort(found)
    curve = np.array([study.best_of(n, mine[order]) for n in records[0]["result"]["n"]])
    ends.append(curve[-1])
    highest.append(curve.max())
print("at the largest n:", np.round(ends, 3), "highest:", np.round(highest, 3))

# %% [markdown]
# ## Verdict

# %%
peaks, falls = {}, {}
for n in labels:
    top = gold[n].mean(0).argmax()
    difference = gold[n][:, top] - gold[n][:, -1]
    peaks[n] = (kl[top], gold[n].mean(0)[top])
    falls[n] = (difference.mean(), difference.std(ddof=1))
few, many = labels[0], labels[-1]
print_verdict([
    ("1 the proxy's score rises", all((np.diff(curve, axis=1) >= -1e-6).all() for curve in proxy.values()), "every proxy"),
    ("2 the gold score peaks", all(mean > spread for mean, spread in falls.values()),
     ", ".join(f"{n}: {mean:.2f} ± {spread:.2f} below" for n, (mean, spread) in falls.items())),
    ("3 the peak moves outward and up with labels", peaks[many][0] > peaks[few][0] and peaks[many][1] > peaks[few][1],
     ", ".join(f"{n}: {top:.2f} at {where:.2f} nats" for n, (where, top) in peaks.items())),
    ("4 d (a - b d) fits", min(fit[2] for fit in fits.values()) > 0.95, ", ".join(f"{n}: {f[2]:.3f}" for n, f in fits.items())),
    ("5 no peak where the proxy is of the right family", np.mean(ends) >= np.mean(highest) - 1e-3,
     f"{np.mean(ends):.3f} at the largest n, highest {np.mean(highest):.3f}"),
    *ppo_claims,
])  # fmt: skip

# %% [markdown]
# **What binds.** The gold score and the proxy's blind spot were chosen by hand; that there is a peak follows from the choice, where
# it is does not.
#
# Under PPO there is no mercy: the policy turns towards the blind spot within a nat or two, and without a penalty nothing stops it; at the end
# it repeats the few words that the proxy likes best. The KL of PPO's curves is estimated on 128 responses.
