"""Rewards in plain Python: `ppo-jax ppo --reward docs/examples/rewards.py:good_words`."""

GOOD = {"great", "lovely", "brilliant", "funny", "superb", "moving"}


def good_words(prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
    """One finite number per response: how many good words it has."""
    return [float(sum(word in GOOD for word in response.split())) for response in responses]


def brevity(prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
    """Shorter is better; `--reward A B --scoring.weights 1 0.1` sums two."""
    return [-len(response) / 100 for response in responses]
