"""A reward over HTTP that is called, what it says, and what it is to give."""

from typing import Any

import numpy as np

from ppo_jax.rewards.api import APIConfig, api_reward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.types import Scores
from tests.rewards.faulty_server import score

SECRET = "sk-0123456789abcdef"
PROMPTS = [f"prompt {i}" for i in range(6)]
RESPONSES = [" answer" * (i + 1) for i in range(6)]
METADATA = [{"id": i} for i in range(6)]
EXPECTED = np.array([score(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], np.float32)
QUICK = dict(rows_per_request=2, connections=1, backoff=0.01, deadline=30.0)  # requests in order, two rows each


class Caller:
    """A reward and what it said."""

    def __init__(self, url: str, token: str | None = None, **changes: Any) -> None:
        self.said: list[str] = []
        self.log = FailureLog(self.said.append)
        self.reward = api_reward(url, APIConfig(**(QUICK | changes)), self.log, token)

    def __call__(self) -> Scores:
        return self.reward(PROMPTS, RESPONSES, METADATA)


def check(scores: Scores, failed: list[int]) -> None:
    """Defects 2 and 19: the other rows have their fractions, and the failed ones no number at all, least of all 0."""
    good = [i for i in range(6) if i not in failed]
    assert scores.reward.dtype == np.float32 and scores.reward.shape == (6,)
    np.testing.assert_array_equal(scores.valid, [i in good for i in range(6)])
    np.testing.assert_array_equal(scores.reward[good], EXPECTED[good])
    assert np.isnan(scores.reward[failed]).all()
