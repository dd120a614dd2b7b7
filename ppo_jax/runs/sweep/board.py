"""The live table of a sweep: a line per member, and how far the study is; plain lines where there is no terminal."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ppo_jax.runs.output.screen import Screen, clock_time, stdout_console
from ppo_jax.runs.output.streams import unbreakable

STYLES = {"trains": "cyan", "waits": "dim", "finished": "green", "pruned": "yellow", "stopped": "red"}


class Line(NamedTuple):
    """What is shown of a member."""

    name: str
    setting: str
    done: int
    updates: int
    reward: float
    kl: float
    state: str  # one of STYLES


class Board(Screen):
    """A `Screen` that shows the members of a population."""

    def __init__(self, title: str, main_process: bool, console: Console, live: bool | None = None) -> None:
        import time

        super().__init__(title, main_process, console, live, 10.0, time.monotonic)
        self.lines: Sequence[Line] = ()
        self.status, self.left = "", math.nan
        self.printed = -math.inf
        self.said: set[str] = set()

    def show(self, lines: Sequence[Line], status: str, left: float) -> None:
        """The members now, how far the study is, and the seconds that are left (NaN: not known)."""
        self.lines, self.status, self.left = lines, status, left
        now = self.clock()
        if self.shown and not self.live and now - self.printed >= self.interval:
            self.printed = now
            training = [line for line in lines if line.state == "trains"]
            rewards = [line.reward for line in training if math.isfinite(line.reward)]
            best = f", best reward now {max(rewards):+.3f}" if rewards else ""
            self.message(f"{self.footer()}  {len(training)} members train{best}")

    def footer(self) -> str:
        """How far the study is, and the times."""
        left = "" if math.isnan(self.left) else f"  left {clock_time(self.left)}"
        return f"{self.status}  elapsed {clock_time(self.clock() - self.start)}{left}"

    def once(self, text: str) -> None:
        """A message that many members would give: shown the first time."""
        if text not in self.said:
            self.said.add(text)
            self.message(text)

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, title=self.title, title_justify="left", title_style="bold", expand=False)
        for name in ("trial", "setting"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name in ("update", "reward", "KL"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state")
        for line in self.lines:
            done = f"{line.done}/{line.updates}"
            state = Text(line.state, style=STYLES.get(line.state, ""))
            setting = Text(line.setting.replace("\n", " "))
            table.add_row(line.name, setting, done, _signed(line.reward), f"{line.kl:.2f}", state)
        return Group(table, Text(self.footer()))


class MemberScreen(Screen):
    """The screen of one member: only what it has to say, under its name."""

    def __init__(self, board: Board, name: str) -> None:
        super().__init__(name, False, board.console, False, math.inf, board.clock)
        self.board = board

    def message(self, text: str) -> None:
        if text.startswith(("resumed", "damaged", "the damaged")):
            self.board.message(f"{self.title}: {text}")
        else:
            self.board.once(f"{self.title}: {text}" if len(text) < 60 else text)


@contextmanager
def show_board(title: str, main_process: bool, console: Console | None = None) -> Iterator[Board]:
    """A `Board` for the length of the block."""
    with unbreakable():
        board = Board(title, main_process, console or stdout_console())
        display: AbstractContextManager = (
            Live(board, console=board.console, refresh_per_second=2) if board.live else nullcontext()
        )
        with display:
            yield board


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "–"
