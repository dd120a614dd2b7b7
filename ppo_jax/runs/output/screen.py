"""Live progress of a run on a terminal (rich), or plain one-line summaries where there is none (CI logs).

    with progress("sentiment") as screen:
        screen.update(phase="ppo", step=3, total=60, values={"reward": 0.4, "kl": 1.2})
        screen.sample(prompts, before, after, before_scores, after_scores)
        screen.message("saved checkpoints/3")

Only the first process of a multi-host run shows anything.
"""

import contextlib
import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_jax.rewards.addresses import hide_addresses
from ppo_jax.runs.output.caller import in_words_of_caller
from ppo_jax.runs.output.pace import Plan, count_compiling, left_of_all
from ppo_jax.runs.output.streams import unbreakable

# What is shown, in this order, with its label and format; a phase that has none of these shows what it has.
SHOWN = {
    "reward": ("reward", "{:+.3f}"),
    "kl": ("KL", "{:.2f} nats"),
    "kl_coef": ("KL coefficient", "{:.3g}"),
    "loss": ("loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "heldout_loss": ("held-out loss", "{:.4f}"),
    "heldout_perplexity": ("held-out perplexity", "{:.2f}"),
    "heldout_accuracy": ("held-out accuracy", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "value_loss": ("value loss", "{:.3f}"),
    "clip_fraction": ("clip fraction", "{:.3f}"),
    "explained_variance": ("explained variance", "{:+.2f}"),
    "response_length": ("length", "{:.1f} tok"),
    "eos_rate": ("EOS rate", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
PARTS = "reward/"  # how the names of what a reward is a sum of begin; shown beside it
HEADLINE = ("reward", "loss")  # drawn as a sparkline: the first of these that the phase has
BLOCKS = "▁▂▃▄▅▆▇█"


@contextmanager
def progress(
    title: str,
    main_process: bool = True,
    console: Console | None = None,
    live: bool | None = None,
    interval: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    log: Path | None = None,
    compiling: Callable[[], float] | None = None,
) -> Iterator["Screen"]:
    """Give a `Screen` for the length of a `with` block; what it last showed stays there, also after an error.

    main_process: False (every process but the first of a multi-host run) shows nothing at all.
    live: redraw in place; by default where standard output is a terminal that can. NO_COLOR is respected by rich.
    interval: the least number of seconds between two plain lines of one phase; its first and last always appear.
    log: a file that all lines are added to as well, whatever becomes of the terminal, and what ended the block where
      that was an error; None: none.
    compiling: () -> seconds that were spent compiling so far, which say nothing of the steps to come; by default JAX's.

    Inside the block nothing that is printed fails, whoever prints it (`streams`).
    """
    with unbreakable():
        screen = Screen(title, main_process, console or stdout_console(), live, interval, clock)
        screen.compiling = compiling or count_compiling()
        screen.log = log if main_process else None
        screen.note(title)
        display: contextlib.AbstractContextManager = contextlib.nullcontext()
        if screen.live:
            display = Live(screen, console=screen.console, refresh_per_second=2)
        with display:
            try:
                yield screen
            except BaseException as error:
                screen.flush()
                screen.note(f"ended by {type(error).__name__}: {error}")
                raise
            screen.flush()


@dataclasses.dataclass
class _Phase:
    """What is known of one phase. Phases may take turns (an evaluation between two PPO updates)."""

    name: str
    first_step: int  # the first step compiles, so the rate starts after it
    first_time: float
    first_compiling: float  # seconds spent compiling by then
    step: int = 0
    total: int | None = None
    time: float = 0.0  # of the last step
    compiling: float = 0.0
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[float] = dataclasses.field(default_factory=list)  # of the headline metric
    printed_time: float = -math.inf
    printed_step: int | None = None


class Screen:
    """What `progress` gives: `plan`, `begin`, `doing`, `update`, `sample` and `message`."""

    def __init__(
        self,
        title: str,
        main_process: bool,
        console: Console,
        live: bool | None,
        interval: float,
        clock: Callable[[], float],
    ) -> None:
        # FORCE_COLOR makes rich believe in a terminal where there is a log file: ask the file too
        able = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
        self.title, self.console, self.interval, self.clock = title, console, interval, clock
        self.shown = main_process
        self.live = main_process and (able if live is None else live)
        self.start = clock()
        self.phases: dict[str, _Phase] = {}
        self.current: _Phase | None = None
        self.plan: Plan = {}  # what the phases of the whole are, where there are several
        self.at, self.at_time = "", self.start  # the phase of the plan that runs, and since when
        self.activity, self.said = "", set[str]()  # what runs between two updates; what was said of such
        self.compiling: Callable[[], float] = lambda: 0.0
        self.log: Path | None = None
        # Lays out what goes into the log: plain even where FORCE_COLOR is set.
        self.plain = Console(file=io.StringIO(), width=120, force_terminal=False, color_system=None, highlight=False)
        self.labels: dict[str, str] = {}  # metrics that are shown besides SHOWN: name -> what is written

    def begin(self, phase: str) -> None:
        """Say which phase of the plan begins; nothing where there is no plan, or it has begun already."""
        if self.shown and phase in self.plan and phase != self.at:
            self.flush()
            self.at, self.at_time = phase, self.clock()
            number = list(self.plan).index(phase) + 1
            self._say(f"Phase {number} of {len(self.plan)}: {self.plan[phase].label}")

    def doing(self, what: str = "", phase: str = "") -> None:
        """Show what runs until the next update; a log says it once. Without words it is `phase` that goes on."""
        if not self.shown:
            return
        self.flush()
        self.activity = what
        self.current = self.phases.get(phase, self.current)
        if what and what not in self.said:
            self.said.add(what)
            self._say(what, only_log=self.live)

    def update(
        self, *, phase: str, step: int, total: int | None = None, values: Mapping[str, float] | None = None
    ) -> None:
        """Show that `step` of `total` of `phase` is done, with the newest values (names as in metrics.jsonl)."""
        if not self.shown:
            return
        if self.current is not None and self.current.name != phase:
            self.flush()
        self.begin(phase)
        now, compiling, self.activity = self.clock(), self.compiling(), ""
        if phase not in self.phases or step < self.phases[phase].step:  # new, or begun again
            self.phases[phase] = _Phase(phase, step, now, compiling)
        state = self.current = self.phases[phase]
        state.step, state.total, state.time, state.compiling = step, total, now, compiling
        state.values.update({name: float(value) for name, value in (values or {}).items()})
        headline = next((name for name in HEADLINE if values and name in values), None)
        if headline:
            state.history = [*state.history, state.values[headline]][-30:]
        if now - state.printed_time >= self.interval or step == total:
            self.flush()

    def flush(self) -> None:
        """Print the line of the last update, if it was held back; where the terminal is live, into the log alone."""
        state = self.current
        if state is not None and state.printed_step != state.step:
            state.printed_step, state.printed_time = state.step, self.clock()
            self._say(self._summary(state), only_log=self.live)

    def sample(
        self,
        prompts: Sequence[str],
        before: Sequence[str],
        after: Sequence[str],
        before_scores: Sequence[float] | None = None,
        after_scores: Sequence[float] | None = None,
        title: str = "Samples before and after",
    ) -> None:
        """Show a table: each prompt, what the policy wrote `before` and `after`, and what the reward says of each."""
        if not self.shown:
            return
        table = Table(title=title, box=box.SIMPLE_HEAD, show_lines=True, title_justify="left", expand=True)
        table.add_column("prompt", ratio=2, style="dim")
        for name, scores in (("before", before_scores), ("after", after_scores)):
            table.add_column(name, ratio=3)
            if scores is not None:
                table.add_column("score", justify="right", no_wrap=True, min_width=5)
        for i, prompt in enumerate(prompts):
            row = [Text(self._safe(prompt))]
            for texts, scores in ((before, before_scores), (after, after_scores)):
                row.append(Text(self._safe(texts[i])))
                if scores is not None:
                    row.append(Text(f"{scores[i]:+.2f}"))
            table.add_row(*row)
        self._print(table)

    def _print(self, what: RenderableType, only_log: bool = False, **how: Any) -> None:
        """Print onto the console and into the log. That one of them cannot be written is no reason to end a run."""
        if not only_log:
            with contextlib.suppress(OSError):
                self.console.print(what, **how)
        if self.log is not None:
            with self.plain.capture() as captured:
                self.plain.print(what, **how)
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {hide_addresses(captured.get())}"
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line)

    def message(self, text: str) -> None:
        """Print text above the live part, as it is (no markup)."""
        self._say(in_words_of_caller(text))

    def note(self, text: str) -> None:
        """Put text into the log alone."""
        self._say(text, only_log=True)

    def _say(self, text: str, only_log: bool = False) -> None:
        if self.shown:
            lines = "\n".join(self._safe(line) for line in text.splitlines())
            self._print(lines, only_log, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Estimate (total - step) * seconds per step of this phase - what has passed since its last step.

        What was spent compiling is no part of a step. None before the second step, or without a total.
        """
        state = self.current
        if state is None or state.total is None or state.step <= state.first_step:
            return None
        worked = state.time - state.first_time - (state.compiling - state.first_compiling)
        pace = max(0.0, worked) / (state.step - state.first_step)
        return max(0.0, (state.total - state.step) * pace - (self.clock() - state.time))

    def __rich__(self) -> RenderableType:
        """Draw the live part: bar and times in one row, values in columns below, then a sparkline."""
        state = self.current
        head = Table.grid(padding=(0, 2))
        title = Text(self._safe(self.title), style="bold")
        if state is None:
            head.add_row(title, Text(self._safe(self.activity or "starting"), style="cyan"), self._times())
            return head
        bar = ProgressBar(total=state.total or 1, completed=state.step if state.total else 0, width=24)
        head.add_row(
            title, Text(self._safe(self.activity or state.name), style="cyan"), bar, _count(state), self._times()
        )
        body = Table.grid(padding=(0, 2))
        pairs = _pairs(state, self.labels)
        columns = max(1, min(4, self.console.width // 29))
        for start in range(0, len(pairs), columns):
            row = pairs[start : start + columns]
            body.add_row(*[cell for name, value in row for cell in (Text(self._safe(name), style="dim"), Text(value))])
        spark = _sparkline(state) if self.console.encoding.startswith("utf") else ""
        return Group(head, *([body] if pairs else []), *([Text(spark, style="cyan")] if spark else []))

    def _summary(self, state: _Phase) -> str:
        values = "  ".join(f"{label} {value}" for label, value in _pairs(state, self.labels))
        return "  ".join(part for part in (f"[{state.name}]", _count(state), values, self._times()) if part)

    def _times(self) -> str:
        left, now = self.seconds_left(), self.clock()
        times = f"elapsed {clock_time(now - self.start)}"
        if left is not None:
            times += f"  left {clock_time(left)}"
        if self.at:
            known = left if self.current and self.current.name == self.at else None
            whole = left_of_all(self.plan, self.at, known, now - self.at_time, self.at_time - self.start)
            times += "" if whole is None else f", of all {clock_time(whole)}"
        return times

    def _safe(self, text: str) -> str:
        """Make the text fit to be shown here: a model may write escape sequences, and a log may be ASCII."""
        spaced = text.replace("\n", " ⏎ ").replace("\t", " ")
        clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)
        return clean.encode(self.console.encoding, "replace").decode(self.console.encoding)


def clock_time(seconds: float) -> str:
    """Format seconds as m:ss, or h:mm:ss from an hour on."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def stdout_console() -> Console:
    console = Console(highlight=False)
    wide = console.is_terminal or "COLUMNS" in os.environ
    return console if wide else Console(highlight=False, width=120)  # a log has no width of its own


def _count(state: _Phase) -> str:
    return str(state.step) if state.total is None else f"{state.step}/{state.total}"


def _pairs(state: _Phase, labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Choose (label, formatted value) of what is shown of a phase."""
    values = state.values
    parts = {name: f"reward {name.removeprefix(PARTS)}" for name in values if name.startswith(PARTS)}
    parts = {name: label for name, label in parts.items() if len(parts) > 1 and not name.endswith("_std")}
    named = {name: (label, "{:+.3f}") for name, label in (parts | dict(labels)).items()}
    shown = {"reward": SHOWN["reward"]} | named | SHOWN
    known = [(label, form.format(values[name])) for name, (label, form) in shown.items() if name in values]
    return known or [(name, f"{value:.4g}") for name, value in list(values.items())[:8]]


def _sparkline(state: _Phase) -> str:
    """Draw the last headline values as bars between lowest and highest; empty below two finite values."""
    points = [x for x in state.history if math.isfinite(x)]
    if len(points) < 2:
        return ""
    low, high = min(points), max(points)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BLOCKS[round((x - low) * scale)] for x in points)
    name = next(name for name in HEADLINE if name in state.values)
    return f"{name} {bars}  {low:.3g} to {high:.3g}"
