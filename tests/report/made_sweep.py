"""A sweep that nobody trained: a real study in a journal, and run directories with curves that look like PPO's."""

import json
import math
from pathlib import Path

import numpy as np

from ppo_jax.data.jsonl import append_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.sweep.plan import SweepConfig, make_plan, make_space
from ppo_jax.runs.sweep.ranges import Range
from ppo_jax.runs.sweep.results import write_about
from ppo_jax.runs.sweep.study import Claim, Study

UPDATES = 24
RANGES = {
    "hyper.learning_rate": Range("hyper.learning_rate", "log 1e-4..1e-2", (), 1e-4, 1e-2, log=True),
    "hyper.kl_coef": Range("hyper.kl_coef", "log 0.005..0.2", (), 0.005, 0.2, log=True),
    "policy.rank": Range("policy.rank", "4 8 16", (4, 8, 16)),
}
PROMPTS = ["The film", "Any performance by <b>her</b> & co.", "A plot that", "Two hours of", "The director"]


def make_sweep(directory: Path, trials: int, seeds: tuple[int, ...] = (0,)) -> None:
    """`trials` settings in all states that there are; the larger the sweep, the more of them."""
    directory.mkdir(parents=True, exist_ok=True)
    names = dict(list(RANGES.items())[: 2 if trials < 5 else 3])
    space = make_space(names | {"seed": Range("seed", "", seeds)}, 0, "random")
    plan = make_plan(space, SweepConfig(trials=trials, search="random", seed=3, prune="halving"), True)
    study = Study(directory, plan, directory.name, UPDATES, print)
    write_about(directory, "", directory.name, "ppo-jax ppo")
    for number in range(trials):
        claim = study.next()
        assert claim is not None
        rng = np.random.default_rng(number)
        done = UPDATES
        state = "finished"
        if trials > 5 and number >= trials - 2:
            state, done = "trains", 11
        elif trials > 5 and number % 5 == 3:
            state, done = "pruned", 8
        elif trials > 5 and number % 17 == 5:
            state, done = "stopped", 5
        ends = [write_run(directory / "trials" / name(claim, seed, seeds), claim, done, seed, rng) for seed in seeds]
        means = [sum(end) / len(end) for end in zip(*ends, strict=True)]
        for step in range(2, done + 1, 2):
            study.report(claim.trial, step, means[0] * step / UPDATES)
        spread = [float(np.std([end[i] for end in ends])) for i in range(1)]
        if state == "finished":
            study.finish(claim.trial, means[:1], {"updates": done, "spread": spread})
        elif state != "trains":
            far = f"update {done}: the KL of the policy to the reference is 612.3 nats, beyond --loop.max-kl 50"
            why = f"pruned after update {done}" if state == "pruned" else far
            study.stop(claim.trial, why, {"updates": done})
    study.close()


def name(claim: Claim, seed: int, seeds: tuple[int, ...]) -> str:
    return f"{claim.run:04d}" + (f"-seed{seed}" if len(seeds) > 1 else "")


def write_run(path: Path, claim: Claim, done: int, seed: int, rng: np.random.Generator) -> tuple[float, float]:
    """Reward that rises with the learning rate until it is too large, and KL that grows as its price falls."""
    path.mkdir(parents=True)
    rate, price = claim.values["hyper.learning_rate"], claim.values["hyper.kl_coef"]
    speed = math.exp(-((math.log10(rate) + 2.7) ** 2) * 2)
    height = 1.6 * speed / (1 + 4 * price) + 0.1 * rng.normal()
    records = []
    for step in range(done + 1):
        level = height * (1 - math.exp(-4 * step / UPDATES))
        kl = 18 * speed * (1 - math.exp(-3 * step / UPDATES)) * 0.05 / (0.05 + price)
        if step:
            noisy = {
                "reward": level + 0.12 * rng.normal(),
                "kl": max(0.0, kl + 0.4 * rng.normal()),
                "entropy": 3 - level,
            }
            records.append({"step": step, "phase": "ppo", "time": 0.0, "seconds": 2.0, **noisy})
        if step % 8 == 0:
            records.append({"step": step, "phase": "eval", "time": 0.0, "reward": level, "kl": kl, "reward_std": 0.9})
    append_jsonl(path / rundir.METRICS, records)
    words = ["moving", "tender", "a triumph", "strangely <i>flat</i>", "warm & wise", "long"]
    samples = [
        {"step": step, "index": i, "prompt": prompt, "response": " is " + ", ".join(rng.choice(words, 3)) + ".",
         "scores": {"reward": round(level + float(rng.normal()), 3)}}
        for step in (0, done) for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    append_jsonl(path / rundir.SAMPLES, samples)
    settings = {"model": "m", "seed": seed, "hyper": {"learning_rate": rate, "kl_coef": price, "gamma": 1.0}}
    (path / rundir.CONFIG).write_text(json.dumps(settings))  # YAML, too
    return float(level), float(kl)
