"""What the defaults of `ppo-jax ppo` are chosen by: the README's chain on a toy, with other rates, clips and scales.

    python -m experiments.defaults                  # every row of the table in docs/hyperparameters.md
    python -m experiments.defaults lora-1e-3 auto   # some of them

The base is the demo's random model of four layers, taught the toy language by SFT of all parameters; then come
`ppo-jax sft`, `reward` and, for each row, `ppo`, with their defaults but for what the row names.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.cli.demo.command import OPENINGS, comparisons, goodness, sentences
from ppo_jax.cli.demo.language import model
from ppo_jax.cli.main import COMMANDS
from ppo_jax.cli.parse import parse
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.exports import write_model

ROOT = Path("runs/defaults")
TAILS = (
    *("very", "really", "quite", "very great and", "very dull and", "quite lovely and", "really bad and"),
    *("very boring and", "really superb and", "quite a"),
)
LARGE = "experiments.defaults:count_times_20"  # a reward of another scale


def of(rate: str, *more: str) -> list[str]:
    """Options of a row: this rate, as 1e-3, and others."""
    return ["--hyper.learning-rate", rate, *more]


BEFORE = ["--hyper.value-clip", "0.2", "--ppo.score.normalise", "off"]  # the defaults until 2026-11-28, with rate 1e-4
TOP = ["--policy.kind", "top_k", "--policy.layers", "2"]
FULL = ["--policy.kind", "full"]
ROWS = {
    "auto": [],
    **{f"lora-{rate}": of(rate, *BEFORE) for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")},
    **{f"full-{rate}": of(rate, *BEFORE, *FULL) for rate in ("1e-5", "1e-4", "1e-3")},
    **{f"top_k-{rate}": of(rate, *BEFORE, *TOP) for rate in ("1e-4", "1e-3")},
    "x20-clip": of("1e-3", *BEFORE, "--reward", LARGE),
    "x20-no-clip": of("1e-3", *BEFORE[2:], "--hyper.value-clip", "off", "--reward", LARGE),
    "x20-auto": ["--reward", LARGE],
}


def count_times_20(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """Twenty times the good words less the bad ones."""
    return [20.0 * goodness(text) for text in responses]


def prepare() -> None:
    """Write the base and the files of the chain."""
    write_model(ROOT / "random", model(0), {})
    rng = np.random.default_rng(0)
    pairs = [{"prompt": r.prompt, "response": r.response} for r in sentences(rng, 600)]
    compared = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in comparisons(rng, 600)]
    prompts = [{"prompt": f"{opening} {tail}"} for opening in OPENINGS for tail in TAILS] * 4
    for name, rows in (("demonstrations", pairs), ("preferences", compared), ("prompts", prompts)):
        (ROOT / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(name: str, run: str, **options: Any) -> None:
    """Run `ppo-jax NAME` into a run directory, unless it has been."""
    if (ROOT / run / "export").exists():
        return
    words = [word for key, value in options.items() for word in (f"--{key}", str(value)) if key != "more"]
    words += ["--run-dir", str(ROOT / run), "--resume", "auto", *options.get("more", ())]
    COMMANDS[name].run(parse(COMMANDS[name].settings, words, prog=f"ppo-jax {name}"))


def describe(run: Path) -> str:
    """One row of the table."""
    records = read_jsonl(run / "metrics.jsonl")
    first, *_, last = [r for r in records if r["phase"] == "eval"]
    updates = [r for r in records if r["phase"] == "ppo"]
    clipped, explained = (np.mean([r[name] for r in updates[-10:]]) for name in ("clip_fraction", "explained_variance"))
    return (
        f"| {run.name} | {first['reward']:+.2f} | {last['reward']:+.2f} | {last['kl']:.2f} | {clipped:.3f} | "
        f"{explained:+.2f} | {updates[-1]['entropy']:.2f} |"
    )


def main(names: Sequence[str]) -> None:
    """Run the rows of these names, or all, and print the table."""
    if not (ROOT / "prompts.jsonl").exists():
        prepare()
    taught = ["--adapter.kind", "full", "--sft.learning-rate", "3e-3", "--sft.epochs", "4", "--sft.batch-size", "32"]
    texts, base = ROOT / "demonstrations.jsonl", ROOT / "sft" / "export" / "model"
    call("sft", "base", model=ROOT / "random", data=texts, more=taught)
    call("sft", "sft", model=ROOT / "base" / "export" / "model", data=texts)
    call("reward", "reward", model=base, pairs=ROOT / "preferences.jsonl")
    for name in names or ROWS:
        more = ROWS[name] if "--reward" in ROWS[name] else [*ROWS[name], "--reward", str(ROOT / "reward")]
        call("ppo", f"ppo/{name}", model=base, prompts=ROOT / "prompts.jsonl", more=more)
    print("| row | reward before | after | KL | clip fraction | explained variance | entropy |\n" + "|---" * 7 + "|")
    for name in names or ROWS:
        print(describe(ROOT / "ppo" / name))


if __name__ == "__main__":
    main(sys.argv[1:])
