"""Thirty small faults, one at a time, in a copy of the tree: do the tests of `make test` see them?

    python -m tests.mutants                  # all of them; prints a line each and the survivors
    python -m tests.mutants --only 3 17      # these; --folder keeps the copy and its compiled programs

Each fault is one line of arithmetic, a mask, a sign, a bound or an argument. The tests nearest to it run first, until
one fails; a fault that they let pass meets every quick test there is before it counts as a survivor.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KEPT = ("ppo_jax", "experiments", "tests", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
NEAR = {
    "ops": [["tests/ops"]],
    "train": [["tests/train/test_ppo_experience.py", "tests/train/test_ppo_update.py", "tests/train/test_ppo.py",
               "tests/train/test_adam.py", "tests/train/test_choices_of_steps.py"], ["tests/train"]],
    "rollout.py": [["tests/test_rollout.py"]],
    "rewards": [["tests/rewards/test_scores.py"], ["tests/rewards"]],
}  # fmt: skip
ALL = ["tests/ops", "tests/train", "tests/test_rollout.py", "tests/rewards", "tests/parity", "tests/test_defects.py"]
ALL += ["tests/models", "tests/runs"]


class Mutant(NamedTuple):
    """One place of a file, and what it becomes."""

    file: str
    right: str
    wrong: str


MUTANTS = [
    # -- ops -----------------------------------------------------------------------------------------------------------
    Mutant("ops/advantages.py", "reward + gamma * next_value - value", "reward + gamma * next_value + value"),
    Mutant("ops/advantages.py", "delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
    Mutant("ops/advantages.py", "jnp.where(valid, advantage, next_advantage))", "advantage)"),
    Mutant("ops/advantages.py", "jnp.maximum(count - 1, 1)", "jnp.maximum(count, 1)"),
    Mutant("ops/losses.py", "jnp.maximum(unclipped, clipped)\n    bound", "jnp.minimum(unclipped, clipped)\n    bound"),
    Mutant("ops/losses.py", "(ratio, 1 - clip_low, 1 + clip_high)\n", "(ratio, 1 - clip_high, 1 + clip_low)\n"),
    Mutant("ops/losses.py", "jnp.where(advantages < 0,", "jnp.where(advantages > 0,"),
    Mutant("ops/losses.py", "old_values - clip, old_values + clip", "returns - clip, returns + clip"),
    Mutant("ops/losses.py", "jnp.sum(jnp.where(mask, terms, 0)) / jnp", "jnp.sum(terms) / jnp"),
    Mutant("ops/kl.py", "jnp.expm1(-difference) + difference", "jnp.expm1(difference) - difference"),
    Mutant("ops/kl.py", "jnp.asarray(target, jnp.float32) - 1", "jnp.asarray(target, jnp.float32)"),
    Mutant("ops/rewards.py", "-kl_coef * penalty + ", "kl_coef * penalty + "),
    Mutant("ops/rewards.py", "(later == 1)", "(later == 2)"),
    Mutant("ops/rewards.py", "ends, axis=-1) - ends ", "ends, axis=-1) "),
    Mutant("ops/sampling.py", "tied & (before >= missing)", "tied & (before > missing)"),
    Mutant("ops/sampling.py", "jnp.where(logits > 0, logits / penalty", "jnp.where(logits < 0, logits / penalty"),
    Mutant("ops/logprobs.py", "jnp.exp(shifted - normaliser) * shifted", "jnp.exp(shifted) * shifted"),
    Mutant("ops/masked.py", "whitened + mean, 0)", "whitened - mean, 0)"),
    # -- train ---------------------------------------------------------------------------------------------------------
    Mutant("train/experience.py", "rollout.response_mask & scores.valid[:, None]", "rollout.response_mask"),
    Mutant("train/experience.py", "terminated, 0.0, after)", "terminated, after, 0.0)"),
    Mutant("train/experience.py", "jnp.exp(rollout.policy_logprobs - rollout.logprobs)", "jnp.exp(rollout.logprobs)"),
    Mutant("train/objective.py", "policy_loss - hyper.entropy_coef", "policy_loss + hyper.entropy_coef"),
    Mutant("train/objective.py", "loss += hyper.vf_coef * value_loss", "loss += value_loss"),
    Mutant("train/gradients.py", "kl <= hyper.target_kl", "kl >= hyper.target_kl"),
    Mutant("train/gradients.py", "hyper.learning_rate * hyper.critic_lr_scale", "hyper.learning_rate"),
    Mutant("train/optimizer.py", "b2 * v + (1 - b2) * jnp.square(g)", "b2 * v + (1 - b2) * g"),
    Mutant("train/ppo.py", "jax.random.fold_in(state.key, state.step))\n    asked", "state.key)\n    asked"),
    # -- rollout and rewards -------------------------------------------------------------------------------------------
    Mutant("rollout.py", "old.mask.at[:, t].set(alive)", "old.mask.at[:, t].set(True)"),
    Mutant("rollout.py", "(None, 0))(key, jnp.arange(batch))", "(None, 0))(key, jnp.zeros(batch, int))"),
    Mutant("rewards/scores.py", "good = good & xp.asarray(valid, bool)", "good = good | xp.asarray(valid, bool)"),
]  # fmt: skip


def find_killer(tree: Path, mutant: Mutant) -> str | None:
    """The first test that fails of the tree with this fault; None: all pass."""
    path = tree / "ppo_jax" / mutant.file
    text = path.read_text()
    if text.count(mutant.right) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.right)} places {mutant.right!r}; a mutant needs one")
    path.write_text(text.replace(mutant.right, mutant.wrong))
    try:
        for chosen in (*NEAR[mutant.file.split("/")[0]], ALL):
            words = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *chosen]
            done = subprocess.run(
                words, cwd=tree, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
            )
            if done.returncode:
                lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return lines[0].split()[1] if lines else f"exit code {done.returncode}"
        return None
    finally:
        path.write_text(text)


def main() -> None:
    """Try them all and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="Try only these numbers.")
    parser.add_argument("--folder", type=Path, help="Copy the tree to this folder; by default to a temporary one.")
    given = parser.parse_args()
    tree = given.folder or Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in KEPT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, tree / name, **({"dirs_exist_ok": True} if source.is_dir() else {}))
    chosen = given.only or range(1, len(MUTANTS) + 1)
    survivors = []
    for number in chosen:
        mutant, start = MUTANTS[number - 1], time.monotonic()
        killer = find_killer(tree, mutant)
        wrong = mutant.wrong.split("\n")[0]
        print(
            f"{number:2} {mutant.file:22} {wrong:58} {killer or 'SURVIVES'} ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        survivors += [] if killer else [number]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} are seen; survivors: {survivors or 'none'}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
