"""Judges of the sentiment task, which PPO never sees: a lexicon, and a reward model trained on other sentences."""

import jax
import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments import rating_model
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.adapter import score_tokens, text_mask
from ppo_jax.runs.setup import Judge
from ppo_jax.types import Frozen, Rollout

_VADER = SentimentIntensityAnalyzer()


def vader_score(text: str) -> float:
    """VADER's compound sentiment, -1 to 1 (Hutto & Gilbert 2014): a lexicon and rules."""
    return float(_VADER.polarity_scores(text)["compound"])


def vader_judge() -> Judge:
    """VADER on the whole sentence."""
    return lambda rollout, prompts, responses: np.array(
        [vader_score(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    )


def model_judge(model: Model, judge: rating_model.RatingModel, stop_ids: tuple[int, ...]) -> Judge:
    """The second reward model on the whole sentence."""

    @jax.jit
    def score(frozen: Frozen, rollout: Rollout) -> jax.Array:
        mask = text_mask(rollout, stop_ids)
        return score_tokens(frozen.base, frozen.reward, judge.trunk, rollout.tokens, mask)

    return lambda rollout, prompts, responses: np.asarray(score(Frozen(model.params, judge.role), rollout))
