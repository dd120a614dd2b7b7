"""What the defaults of `ppo-jax ppo` are chosen by: the README's chain with other rates, clips and scales.

    python -m experiments.defaults toy                    # every row of the first table in docs/hyperparameters.md
    python -m experiments.defaults toy lora-1e-3 auto     # some of them
    python -m experiments.defaults smollm2 auto           # SmolLM2-135M on sentences of film reviews that people rated
    python -m experiments.defaults small auto full-auto   # the papers' language model of width 256 on the same

The toy is the demo's random model of four layers, taught the toy language by SFT of all parameters. Then come
`ppo-jax sft`, `reward` and, for each row, `ppo`, with their defaults but for what the row names.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import movie_reviews
from experiments.papers.language import Recipe
from ppo_jax.cli.demo.command import OPENINGS, comparisons, goodness, sentences
from ppo_jax.cli.demo.language import model
from ppo_jax.cli.main import COMMANDS
from ppo_jax.cli.parse import parse
from ppo_jax.data import assets
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files.artifacts import EXPORT, MODEL
from ppo_jax.runs.exports import write_model

ROOT = Path("runs/defaults")
TITLE = "Film review:"
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
    "full-auto": FULL,
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


def toy_files() -> dict[str, list[dict[str, Any]]]:
    """The chain's files in the toy language."""
    rng = np.random.default_rng(0)
    pairs = [{"prompt": r.prompt, "response": r.response} for r in sentences(rng, 600)]
    compared = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in comparisons(rng, 600)]
    prompts = [{"prompt": f"{opening} {tail}"} for opening in OPENINGS for tail in TAILS] * 4
    return {"demonstrations": pairs, "preferences": compared, "prompts": prompts}


def review_files() -> dict[str, list[dict[str, Any]]]:
    """The chain's files of rated sentences: four words are the prompt; of two sentences the better is chosen."""
    splits = movie_reviews.splits(movie_reviews.load())
    texts = [f"{TITLE} {review.text}" for review in splits.judge_train[:480]]
    pairs = [
        {"prompt": " ".join(words[:6]), "response": " " + " ".join(words[6:])}
        for words in map(str.split, texts)
        if len(words) > 8
    ]
    rated = splits.reward_train[: 2 * 1500]
    halves = [sorted(two, key=lambda review: review.rating) for two in zip(rated[::2], rated[1::2], strict=True)]
    compared = [
        {"prompt": TITLE, "chosen": f" {better.text}", "rejected": f" {worse.text}"}
        for worse, better in halves
        if better.rating - worse.rating > 1
    ]
    prompts = [{"prompt": " ".join(f"{TITLE} {review.text}".split()[:6])} for review in splits.prompts[:512]]
    return {"demonstrations": pairs, "preferences": compared, "prompts": prompts}


def prepare(root: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    """Write the files of the chain."""
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_toy(root: Path) -> Path:
    """The model that has been taught the toy language."""
    if not (root / "random").exists():
        write_model(root / "random", model(0), {})
    taught = ["--adapter.kind", "full", "--sft.learning-rate", "3e-3", "--sft.epochs", "4", "--sft.batch-size", "32"]
    call("sft", root / "base", model=root / "random", data=root / "demonstrations.jsonl", more=taught)
    return root / "base" / EXPORT / MODEL


def call(name: str, run: Path, **options: Any) -> None:
    """Run `ppo-jax NAME` into a run directory, unless it has been."""
    if (run / EXPORT).exists():
        return
    words = [word for key, value in options.items() for word in (f"--{key}", str(value)) if key != "more"]
    words += ["--run-dir", str(run), "--resume", "auto", *options.get("more", ())]
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


def main(arguments: Sequence[str]) -> None:
    """Run the rows of these names, or all, on a base, and print the table."""
    if not arguments or arguments[0] not in BASES or set(arguments[1:]) - set(ROWS):
        raise SystemExit(f"say toy, small or smollm2, then names of rows: {', '.join(ROWS)}")
    name, names = arguments[0], arguments[1:] or list(ROWS)
    files, make_base = BASES[name]
    root = ROOT / name
    if not (root / "prompts.jsonl").exists():
        prepare(root, files())
    call("sft", root / "sft", model=make_base(root), data=root / "demonstrations.jsonl")
    base = root / "sft" / EXPORT / MODEL
    call("reward", root / "reward", model=base, pairs=root / "preferences.jsonl")
    for row in names:
        more = ROWS[row] if "--reward" in ROWS[row] else [*ROWS[row], "--reward", str(root / "reward")]
        call("ppo", root / "ppo" / row, model=base, prompts=root / "prompts.jsonl", more=more)
    print("| row | reward before | after | KL | clip fraction | explained variance | entropy |\n" + "|---" * 7 + "|")
    for row in names:
        print(describe(root / "ppo" / row))


BASES: dict[str, tuple[Callable[[], dict[str, list[dict[str, Any]]]], Callable[[Path], Path]]] = {
    "toy": (toy_files, make_toy),
    "small": (review_files, lambda root: Recipe().where / EXPORT / MODEL),
    "smollm2": (review_files, lambda root: assets.smollm2()),
}

if __name__ == "__main__":
    main(sys.argv[1:])
