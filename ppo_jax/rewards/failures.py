"""What becomes of rewards that fail: the row is invalid (never 0), its cause is named once, too many stop the run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.types import Scores

# What a reward calls for rows that it could not score: (cause, rows, detail). The cause is a kind, such as "HTTP 503";
# the detail is shown for the first of that kind only.
Report = Callable[[str, int, str], None]
KINDS = 32  # causes told apart in one run; a service that puts an id into each must not fill the log


class FailureLog:
    """A `Report` that counts failed rows by cause and names each cause once, through `notify`."""

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self.notify, self.counts = notify, dict[str, int]()

    def __call__(self, cause: str, rows: int, detail: str = "") -> None:
        if rows < 1:
            return
        if cause not in self.counts and len(self.counts) >= KINDS:
            cause, detail = "other causes", ""
        new = cause not in self.counts
        self.counts[cause] = self.counts.get(cause, 0) + rows
        if new and self.notify is not None:
            more = f" ({detail})" if detail else ""
            self.notify(
                f"reward: {cause}: {_rows(rows)} could not be scored{more}. Such rows are left out of training; "
                "more of this kind are only counted"
            )

    def summary(self) -> str:
        """The causes with their rows, most frequent first; "" where nothing failed."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{cause} ({_rows(rows)})" for cause, rows in ordered)


def next_streak(streak: int, failed: float, ceiling: float) -> int:
    """Batches in a row of which more than the fraction `ceiling` failed, after one of which `failed` did."""
    return streak + 1 if failed > ceiling else 0


def too_many(step: int, streak: int, failed: float, ceiling: float, causes: str) -> str:
    """Why a run is stopped after update `step`, whose state is saved, and how it goes on."""
    why = f" Causes so far: {causes}." if causes else ""
    return (
        f"update {step}: {100 * failed:.0f} % of the rewards failed, and more than --loop.max-failed {ceiling:g} did "
        f"in {streak} batches in a row.{why} Nothing was learned from failed rows. Mend the reward, and go on with "
        "--resume"
    )


def number(value: Any) -> tuple[float, str | None]:
    """(value, None) of a finite real number, else (NaN, what is wrong with it). A fraction stays a fraction."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a NumPy, JAX or torch scalar
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, f"{type(value).__name__} in place of a number"
    if value != value:
        return math.nan, "NaN"
    if not abs(value) <= float(np.finfo(np.float32).max):
        return math.nan, "infinity" if isinstance(value, float) and math.isinf(value) else "too large for float32"
    return float(value), None


def to_scores(rows: Sequence[float] | np.ndarray, parts: Mapping[str, np.ndarray] | None = None) -> Scores:
    """Scores of a host reward (numpy arrays), valid where finite in float32; a failed row is NaN."""
    with np.errstate(over="ignore"):
        reward: Any = np.asarray(rows).astype(np.float32)
    valid: Any = np.isfinite(reward)
    named: Any = {name: np.asarray(part, np.float32) for name, part in (parts or {}).items()}
    return Scores(np.where(valid, reward, np.float32(np.nan)), valid, named)  # type: ignore[arg-type]


def printable(text: str, limit: int = 160) -> str:
    """Foreign text for a log: one line, no control characters, at most `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")
