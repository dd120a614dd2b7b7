"""A settings record with everything that a field can be."""

import dataclasses
import enum
from pathlib import Path
from typing import Literal, NamedTuple

from ppo_jax.types import Hyper


class Schedule(enum.Enum):
    CONSTANT = 1
    COSINE = 2


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 8


@dataclasses.dataclass(frozen=True)
class TopK:
    layers: int = 2


class Span(NamedTuple):
    start: int
    stop: int = 10


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """How parameters move."""

    epochs: int = 4
    """Passes over each rollout."""
    kind: Literal["k1", "k2", 3, None] = "k1"
    schedule: Schedule = Schedule.COSINE

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of everything that a field can be."""

    out: Path = Path("runs/a")
    """Where the run goes."""
    name: str = "x"
    overwrite: bool = False
    target: float | None = None
    budget: int | float | str = 1
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    optimiser: Optimiser = Optimiser()
    hyper: Hyper = Hyper()
    span: Span | None = None
    adapter: Lora | TopK = Lora()
    adapters: tuple[Lora | TopK, ...] = ()
    derived: int = dataclasses.field(default=0, init=False)


@dataclasses.dataclass(frozen=True)
class Resumable:
    resume: Literal["no", "yes", "auto"] = "no"
    steps: int = 1
