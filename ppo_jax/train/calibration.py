"""Whether a reward model's probabilities are right: accuracy against sigmoid(score gap), by gap."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Bucket(NamedTuple):
    """Held-out pairs with similar gaps between their two scores."""

    low: float  # the smallest gap |s_a - s_b| in the bucket
    high: float  # and the largest
    pairs: int
    accuracy: float  # how often the preferred text has the higher score; a tie is a half
    predicted: float  # mean of sigmoid(gap): what the Bradley-Terry model expects that accuracy to be


def calibration(leads: Float[np.ndarray, " M"], buckets: int = 5) -> list[Bucket]:
    """Pairs in at most `buckets` equally large groups of rising |lead|.

    Args:
      leads: score of the preferred text minus that of the other, on the scale that was trained, without gain.
    """
    order = np.argsort(np.abs(leads), kind="stable")
    found = []
    for index in np.array_split(order, min(buckets, len(leads)) or 1):
        if len(index):
            gaps, right = np.abs(leads[index]), (leads[index] > 0) + 0.5 * (leads[index] == 0)
            predicted = np.mean(1 / (1 + np.exp(-gaps)))
            found.append(Bucket(float(gaps[0]), float(gaps[-1]), len(index), float(right.mean()), float(predicted)))
    return found


def calibration_error(table: list[Bucket]) -> float:
    """Mean over the pairs of |accuracy - predicted| of their bucket (expected calibration error)."""
    pairs = sum(bucket.pairs for bucket in table)
    return sum(bucket.pairs * abs(bucket.accuracy - bucket.predicted) for bucket in table) / max(pairs, 1)


def format_table(table: list[Bucket]) -> list[str]:
    """The table as lines of text."""
    lines = ["   score gap      pairs   accuracy  predicted"]
    return lines + [
        f"{b.low:6.2f} - {b.high:<6.2f} {b.pairs:6d}  {100 * b.accuracy:7.1f} %  {100 * b.predicted:7.1f} %"
        for b in table
    ]
