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
# # 4. Reward models: labels, and what is trained
#
# **Papers.** Stiennon et al. 2020, *Learning to summarize from human feedback*, section 4.3 and its figure of accuracy over data and model size
# (twice the labels: about +1.1 points of validation accuracy; twice the model: about +1.8), and Ziegler et al. 2019 (5,000 labels
# suffice for style). LoRA against full: Hu et al. 2021.
#
# **Question.** How does held-out pairwise accuracy grow with the number of labels, from 100 to 5,000, for a linear probe, LoRA and full
# fine-tuning; how far is that from one human rater, from bag of words and from a lexicon; and are the probabilities right?
#
# **What differs from the papers.** Summaries and 1.3B to 6.7B parameters there; here film-review sentences, each label the mean of about
# 20 people's ratings, and accuracy over all pairs of 1,500 held-out sentences with different ratings. SmolLM2-135M (the lower 18 of 30 layers)
# carries a probe and LoRA (rank 8, the last 4 of these layers). **Full fine-tuning of 135M for 3 seeds was not affordable on 2 shared
# cores**: full against LoRA against probe is shown on the small language model (four layers of width 256, which has seen these
# sentences, never their ratings, as text; the held-out ones not even that). Known from elsewhere on the same pairs: one human rater .886,
# bag-of-words ridge on all labels .728, VADER .666. Passes over the labels: 4 for up to 500, else 1; learning rates were not tuned per
# number of labels.
#
# ## Criterion, written before the run (3 seeds: which sentences have labels, and their order; bands: sum of the standard deviations)
#
# 1. *More labels help.* For each kind the mean accuracy rises with every step of 100, 500, 2,000, 5,000 labels.
# 2. *The order at 5,000.* SmolLM2's LoRA is not below its probe by more than the bands; both are above bag of words with the same
#    labels and above VADER; all stay below .886.
# 3. *Pretraining is worth labels.* SmolLM2's probe with 500 labels is above bag of words with 5,000.
# 4. *Full against LoRA against probe, small model.* At 5,000 labels full and LoRA are both above the probe by more than the bands; full and
#    LoRA differ by less than 2 points.
# 5. *Twice the labels.* The slope of SmolLM2's probe per doubling between 500 and 5,000 lies between .5 and 3 points (paper: 1.1).
# 6. *Calibration.* The expected calibration error of SmolLM2's probe falls with labels, from 100 to 5,000, and is below .05 at 5,000.
#
# **Added on 2026-11-28, before the rest of the small model and LoRA on SmolLM2 were run** (known then: of the small model the probe with up to
# 2,000 labels, full with 100 and one seed of 500, two seeds of LoRA with 100, all between .49 and .56; of SmolLM2 the probe):
#
# 7. *What is trained matters more with more labels.* On the small model the lead of full fine-tuning over the probe is larger at 5,000
#    labels than at 500.
# 8. *LoRA against full over labels.* On the small model LoRA is nowhere behind full by more than 2 points at 500, 2,000 and 5,000 labels.
# 9. *LoRA on SmolLM2 with 2,000 labels* (3 seeds) leads its probe with the same labels, and stays within 5 points of it.

# %%
import matplotlib.pyplot as plt
import numpy as np

from experiments.papers.notebook import STYLES, keep_picture, mean_and_spread, obtain_records, print_verdict, select

records = obtain_records("reward_models")
KINDS = {("SmolLM2", "LoRA"): "SmolLM2-135M, LoRA", ("SmolLM2", "probe"): "SmolLM2-135M, linear probe",
         ("small", "full"): "small model, full", ("small", "LoRA"): "small model, LoRA",
         ("small", "probe"): "small model, linear probe", ("words", "ridge"): "bag of words, ridge"}  # fmt: skip
HUMAN, WORDS, VADER = 0.886, 0.728, [r["result"]["accuracy"] for r in select(records, base="VADER")]


def of(kind, name):
    """{labels: values of the seeds}."""
    found = {}
    for record in select(records, base=kind[0], kind=kind[1]):
        found.setdefault(record["setting"]["labels"], []).append(record["result"][name])
    return {labels: np.array(found[labels]) for labels in sorted(found)}


accuracy = {kind: found for kind in KINDS if (found := of(kind, "accuracy"))}
error = {kind: found for kind in accuracy if kind[0] != "words" and (found := of(kind, "calibration_error"))}
columns = sorted({labels for found in accuracy.values() for labels in found})
print(f"{'accuracy over labels':28}" + "".join(f"{labels:>18}" for labels in columns))
for kind, found in accuracy.items():
    print(f"{KINDS[kind]:28}" + "".join(f"{mean_and_spread(found[n]) if n in found else '-':>18}" for n in columns))
    if any(len(values) < 3 for values in found.values()):
        print("   fewer than 3 seeds:", {labels: len(values) for labels, values in found.items() if len(values) < 3})
print("one human rater", HUMAN, "| bag-of-words ridge, all labels", WORDS, "| VADER", VADER)

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
for number, (kind, found) in enumerate(accuracy.items()):
    mean, spread = ([f(v) for v in found.values()] for f in (np.mean, lambda v: v.std(ddof=1) if len(v) > 1 else 0.0))
    left.errorbar(list(found), mean, spread, label=KINDS[kind], capsize=3, **STYLES[number])
    if kind in error:
        values = error[kind]
        spread = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values.values()]
        middle.errorbar(list(values), [v.mean() for v in values.values()], spread, label=KINDS[kind], capsize=3, **STYLES[number])
for value, name in ((HUMAN, "one human rater"), *((v, "VADER") for v in VADER)):
    left.axhline(value, color="black", linewidth=0.8)
    left.annotate(name, (columns[-1], value), ha="right", va="bottom", fontsize=8)
left.set(xlabel="labels (rated sentences)", ylabel="accuracy on held-out pairs", xscale="log", title="Accuracy", ylim=(0.36, 0.91))
middle.set(xlabel="labels (rated sentences)", ylabel="expected calibration error", xscale="log", title="Calibration")
left.legend(fontsize=7, loc="lower right")
for number, kind in enumerate(kind for kind in KINDS if kind in error):
    most = max(error[kind])
    tables = [r["result"]["calibration"] for r in select(records, base=kind[0], kind=kind[1], labels=most)]
    predicted, seen = np.mean(tables, axis=0).T
    right.plot(predicted, seen, label=f"{KINDS[kind]}, {most:,} labels", **STYLES[number])
right.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8)
right.set(xlabel="predicted: mean of sigmoid(score gap)", ylabel="share of pairs in the right order", title="Five groups of pairs by score gap")
right.legend(fontsize=7)
keep_picture(figure, "04_reward_models")

# %% [markdown]
# ## Change a formula: the loss of the probe
# A probe is convex, and its features are a matrix: here regression of the ratings themselves in place of the comparisons, on the
# toy language model (made in seconds).

# %%
from experiments.movie_reviews import all_pairs_accuracy
from experiments.papers import reward_models as study
from ppo_jax.train.comparisons import head_scores

corpus = study.read("small", True)
chosen = study.choose_labels(corpus.train, 60, seed=0)
x, y = corpus.features[chosen], study.rate(corpus, chosen)
z = (x - x.mean(0)) / (x.std(0) + 1e-6)
ridge = np.linalg.solve(z.T @ z + 10.0 * np.eye(z.shape[1]), z.T @ (y - y.mean()))  # <- the formula
mine = ((corpus.features[corpus.test] - x.mean(0)) / (x.std(0) + 1e-6)) @ ridge
role = study.fit(corpus, study.describe("small", "probe", 60), chosen, seed=0)
theirs, ratings = head_scores(role.head, corpus.features[corpus.test]), study.rate(corpus, corpus.test)
print(f"toy, 60 labels: regression {all_pairs_accuracy(mine, ratings):.3f}, comparisons {all_pairs_accuracy(theirs, ratings):.3f}")

# %% [markdown]
# ## Verdict

# %%
smol, probe, full, lora, small, ridge = (("SmolLM2", "LoRA"), ("SmolLM2", "probe"), ("small", "full"), ("small", "LoRA"),
                                         ("small", "probe"), ("words", "ridge"))  # fmt: skip
LABELS = study.LABELS
claims, missing = [], []


def apart(left, right):
    return left.mean() - right.mean(), left.std(ddof=1) + right.std(ddof=1)


def whole(*kinds, labels=LABELS):
    """Whether each of these was run with 3 seeds."""
    return all(len(accuracy.get(kind, {}).get(n, ())) >= 3 for kind in kinds for n in labels)


def claim(name, can, make):
    """Add a claim, or say that what it is about was not run with 3 seeds."""
    claims.append((name, *make())) if can else missing.append(name)


def rises():
    kinds = [kind for kind in accuracy if whole(kind)]
    rising = {KINDS[kind]: bool((np.diff([accuracy[kind][n].mean() for n in LABELS]) > 0).all()) for kind in kinds}
    return all(rising.values()), ", ".join(f"{name}: {'rises' if held else 'does not'}" for name, held in rising.items())


def order():
    gap, band = apart(accuracy[smol][5000], accuracy[probe][5000])
    lower, means = max(accuracy[ridge][5000].mean(), VADER[0]), [accuracy[kind][5000].mean() for kind in (smol, probe)]
    return gap > -band and lower < min(means) and max(means) < HUMAN, f"LoRA leads by {gap:+.3f} (bands {band:.3f}); words {lower:.3f}"


def small_model():
    gaps = [apart(accuracy[kind][5000], accuracy[small][5000]) for kind in (full, lora)]
    between = accuracy[full][5000].mean() - accuracy[lora][5000].mean()
    return (all(gap > band for gap, band in gaps) and abs(between) < 0.02,
            f"full {gaps[0][0]:+.3f} (bands {gaps[0][1]:.3f}), LoRA {gaps[1][0]:+.3f} (bands {gaps[1][1]:.3f}); full less LoRA {between:+.3f}")  # fmt: skip


def doubling():
    slope = (accuracy[probe][5000].mean() - accuracy[probe][500].mean()) / np.log2(10)
    return 0.005 <= slope <= 0.03, f"{100 * slope:.2f} points (paper 1.1)"


def calibrated():
    few, many = error[probe][100].mean(), error[probe][5000].mean()
    return many < few and many < 0.05, f"{few:.3f} with 100 labels, {many:.3f} with 5,000"


def leads():
    gaps = [accuracy[full][n].mean() - accuracy[small][n].mean() for n in (500, 5000)]
    return gaps[1] > gaps[0], f"{gaps[0]:+.3f} with 500, {gaps[1]:+.3f} with 5,000"


def keeps_up():
    gaps = {n: accuracy[lora][n].mean() - accuracy[full][n].mean() for n in (500, 2000, 5000)}
    return min(gaps.values()) > -0.02, "LoRA less full " + ", ".join(f"{gap:+.3f} with {n:,}" for n, gap in gaps.items())


def smol_lora():
    gap, band = apart(accuracy[smol][2000], accuracy[probe][2000])
    return 0 < gap < 0.05, f"{gap:+.3f} (bands {band:.3f})"


claim("1 more labels help, each kind that was run whole", any(whole(kind) for kind in accuracy), rises)
claim("2 the order at 5,000", whole(smol, probe, ridge, labels=[5000]), order)
claim("3 pretraining is worth labels", whole(probe, ridge), lambda: (
    accuracy[probe][500].mean() > accuracy[ridge][5000].mean(),
    f"probe with 500 {accuracy[probe][500].mean():.3f}, words with 5,000 {accuracy[ridge][5000].mean():.3f}"))  # fmt: skip
claim("4 full and LoRA lead the small model's probe", whole(full, lora, small, labels=[5000]), small_model)
claim("5 per doubling", whole(probe), doubling)
claim("6 calibration", whole(probe), calibrated)
claim("7 more labels, more lead of what is trained", whole(full, small, labels=[500, 5000]), leads)
claim("8 LoRA keeps up with full", whole(full, lora, labels=[500, 2000, 5000]), keeps_up)
claim("9 LoRA on SmolLM2 with 2,000 labels", whole(smol, probe, labels=[2000]), smol_lora)
print_verdict(claims)
for name in missing:
    print(f"NOT RUN with 3 seeds: {name}")

# %% [markdown]
# With 500 labels SmolLM2's probe is where bag of words is with 5,000, within a fraction of a point: the claim that it is above fails by a hair.
#
# The other two that failed, 4 and 8, fail for one reason: on the small model LoRA keeps up with full fine-tuning up to 2,000 labels and is
# three and a half points behind with 5,000, where two were allowed. What held says little for LoRA on SmolLM2: on the last four of 18 layers it adds
# next to nothing to the probe of the same layers, .002 with 2,000 labels (bands .006) and .005 with 5,000 (bands .005).
#
# **What binds.** The machine: 2 cores shared with some twenty other processes, so full fine-tuning of SmolLM2 is missing, as the criterion says,
# and nothing was tuned per number of labels: one pass from 2,000 labels on, one learning rate per kind. (Elsewhere in this repository, with one seed and
# the settings of the demo, LoRA on SmolLM2 has .776 with 2,000 labels and .812 with 5,000.) The small language model, which has seen
# 22,000 sentences twice (perplexity 109.9 per token of held-out ones), has next to nothing for a probe to read, .55 with 2,000 labels or 5,000: what
# the probe of SmolLM2 gains over it is pretraining. Full fine-tuning finds more, .61 with 5,000 labels, five points over the probe, and
# yet it is thirteen points below bag of words with the same labels: a model as small as this needs more labels than there are (or more
# than the one pass that 2,000 and more labels get) to learn which words matter. All pairs of few sentences are not independent labels, and
# a label here is the mean of twenty people: one person's would be noisier.
