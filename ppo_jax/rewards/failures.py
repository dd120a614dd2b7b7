"""What becomes of rewards that fail: the row is invalid (never 0), its cause is named once, too many stop the run."""

from collections.abc import Callable

# What a reward calls for rows that it could not score: (cause, rows, detail). The cause is a kind, such as "HTTP 503";
# the detail is shown for the first of that kind only.
Report = Callable[[str, int, str], None]
KINDS = 32  # causes told apart in one run; a service that puts an id into each must not fill the log


class GivenUp(Exception):
    """An iteration that was left in the middle because the run is to stop; the state is as it was before."""


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


def none_scored(causes: str) -> str:
    """Why a run is stopped before its first update, where the first evaluation has no score, and how it goes on."""
    why = f" Causes: {causes}." if causes else ""
    return (
        f"not one response of the first evaluation could be scored.{why} Nothing was trained. Mend the reward, and go "
        "on with --resume (--loop.max-failed 1 trains all the same)"
    )


def printable(text: str, limit: int = 160) -> str:
    """Foreign text for a log: one line, no control characters, at most `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")
