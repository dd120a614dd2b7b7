"""A small real language model: four layers of width 256, trained from scratch on 22,000 rated sentences.

    python -m experiments.papers.language            # took half an hour on 2 shared cores; goes on after a stop
    python -m experiments.papers.language --smoke    # a toy, in seconds

The package of VADER holds four sets of sentences that people rated (Hutto & Gilbert 2014): film reviews, product
reviews, tweets and newspaper editorials, 23,703 in all. 1,500 film-review sentences are kept apart (the test split of
`movie_reviews`); a byte-level vocabulary of 2,048 is learnt from the others, and the model from their tokens, sentence
after sentence, each behind a token that ends the one before. What comes out is a model directory like any other.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import movie_reviews, smoke
from experiments.movie_reviews import Review, Splits
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse
from ppo_jax.data import assets
from ppo_jax.data.encode import EncodedSFT
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.files.artifacts import EXPORT, MODEL
from ppo_jax.models.layout import init_params
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sft import run_sft
from ppo_jax.train.loop import OfflineLoop
from ppo_jax.train.sft import SFTConfig

END = "<end>"
OTHERS = ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Train the small language model of the papers' notebooks from scratch."""

    smoke: bool = False
    """Train a toy on sentences of a toy grammar instead."""
    run_dir: Path = Path()
    """The run directory; by default it lies in the cache."""
    vocabulary: int = 2048
    """The tokenizer has this many tokens."""
    layers: int = 4
    """The model has this many layers."""
    width: int = 256
    """Hidden states have this width."""
    length: int = 64
    """A row of training has this many tokens."""
    sft: SFTConfig = SFTConfig(epochs=2, batch_size=32, learning_rate=2e-3)
    """These options say how the model is trained, and for how long."""

    @property
    def where(self) -> Path:
        """The run directory."""
        name = "language-smoke" if self.smoke else "language"
        return self.run_dir if self.run_dir != Path() else assets.cache_dir() / "papers" / name


TOY = Recipe(
    smoke=True, vocabulary=300, layers=2, width=32, length=32, sft=SFTConfig(steps=24, batch_size=8, learning_rate=1e-2)
)


class Corpus(NamedTuple):
    """Rated film-review sentences in disjoint parts, and sentences of other kinds."""

    splits: Splits
    others: list[str]

    @property
    def training(self) -> list[str]:
        """All sentences but those of the test split."""
        parts = (self.splits.prompts, self.splits.reward_train, self.splits.judge_train)
        return [review.text for part in parts for review in part] + self.others


def read_corpus(toy: bool = False) -> Corpus:
    """The sentences; a toy's are of random words, and nothing is downloaded."""
    if toy:
        return Corpus(movie_reviews.splits(smoke.reviews(600), 0, test=60, prompts=200, judge_train=100), [])
    reviews = movie_reviews.load()
    test = movie_reviews.splits(reviews, 0)
    others = []
    for name in OTHERS:
        lines = (assets.vader() / f"{name}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        others += [movie_reviews.clean(line.split("\t", 2)[2]) for line in lines]
    held_out = {review.text for review in test.test}
    return Corpus(test, [text for text in others if text and text not in held_out])


def learn_tokenizer(texts: list[str], size: int) -> Any:
    """A byte-level BPE of `size` tokens, the first of which ends a text (and so begins the next one)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def pack(texts: list[str], tokenizer: Any, length: int, seed: int = 0) -> EncodedSFT:
    """Rows of `length` tokens from sentences in random order, an end token before each; the remainder is left out."""
    end = tokenizer.eos_token_id
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    stream = [token for row in encoded for token in (end, *row)]
    rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return EncodedSFT(rows, [1] * len(rows), list(range(len(rows))), 0)


def describe(recipe: Recipe, size: int) -> ModelConfig:
    """The shapes of the model."""
    return ModelConfig(
        vocab_size=size,
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_layers=recipe.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=recipe.width // 4,
        max_positions=512,
        eos_token_ids=(0,),
    )


def train(recipe: Recipe) -> Path:
    """Train, or go on; returns the model's directory."""
    corpus = read_corpus(recipe.smoke)
    start = recipe.where / "start"
    if not start.exists():
        tokenizer = learn_tokenizer(corpus.training, recipe.vocabulary)
        config = describe(recipe, len(tokenizer))
        hf.save(start, config, init_params(jax.random.key(0), config), tokenizer)
    model = load_model(start)
    held_out = [review.text for review in corpus.splits.test]
    rows, measured = (pack(texts, model.tokenizer, recipe.length) for texts in (corpus.training, held_out))
    directory = rundir.open_run(recipe.where / "run", "auto")
    with progress("language model", log=directory / rundir.LOG) as screen:
        every = max(recipe.sft.num_steps(len(rows.rows)) // 12, 1)
        loop = OfflineLoop(eval_every=every, checkpoint_every=100)
        setup = OfflineSetup(model, rows, measured, recipe.sft, 0, AdapterConfig(kind="full"), loop)
        result = run_sft(directory, setup, screen, "auto")
        screen.message(f"perplexity {result.after['perplexity']:.1f} per token of {len(held_out)} held-out sentences")
    return directory / EXPORT / MODEL


def small_model(toy: bool = False) -> Model:
    """The trained model; FileNotFoundError says how to make it where there is none yet. The toy is made at once."""
    recipe = TOY if toy else Recipe()
    path = recipe.where / "run" / EXPORT / MODEL
    if not path.exists():
        if not toy:
            raise FileNotFoundError(f"{path}: no small language model yet; python -m experiments.papers.language")
        train(recipe)
    return load_model(path)


def opening_rows(model: Model, reviews: list[Review], longest: int, seed: int = 0) -> list[list[int]]:
    """The end token and the first words of sentences, at most `longest` tokens."""
    texts = movie_reviews.openings(reviews, np.random.default_rng(seed))
    rows = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[model.stop_ids[0], *row] for row in rows if 1 <= len(row) < longest]


def main(args: list[str] | None = None) -> Path:
    """Run the recipe; return the model's directory."""
    recipe = parse(Recipe, args, prog="experiments.papers.language")
    return train(dataclasses.replace(TOY, run_dir=recipe.run_dir) if recipe.smoke else recipe)


if __name__ == "__main__":
    sys.exit(exit_code("experiments.papers.language", main, resumable=True))
