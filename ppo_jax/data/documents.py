"""What the documents that a run reads again have to say: a record for each, checked where it is read.

A file may be whole, and its checksum right, and still say a word where a number is needed: written by another program,
or mended by hand. More than these fields may stand there; one that is read is of the kind named here.
"""

import functools
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs these before Python 3.12
    TypeVar,
)

from typing_extensions import TypedDict

T = TypeVar("T")
INFINITIES = ("Infinity", "-Infinity")  # how strict JSON has them
LARGEST = 2**53  # integers beyond it are not the same for every reader of JSON
MOST = 1e300  # of a number; an integer may be too large for a float


class _Check:
    """A check that pydantic is given where it is a mark in `Annotated`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # when the first document is read

        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> Any:
        raise NotImplementedError


class _Count(_Check):
    def check(self, value: Any) -> int:
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise ValueError("a whole number, 0 or more")
        return value


class _Number(_Check):
    def __init__(self, infinite: bool = False, null: bool = True) -> None:
        self.infinite, self.null = infinite, null

    def check(self, value: Any) -> float | None:
        if value is None and self.null:
            return None
        if self.infinite and isinstance(value, str) and value in INFINITIES:
            return float(value)
        if type(value) not in (int, float) or not (abs(value) < MOST or (self.infinite and type(value) is float)):
            raise ValueError("a number")
        return float(value)


class _Score(_Number):
    def check(self, value: Any) -> float | None:
        return value if type(value) is bool else super().check(value)


class _Time(_Check):
    def check(self, value: Any) -> str:
        try:
            datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise ValueError("a time, as 2026-01-31T12:00:00+00:00") from None
        return value


def _may_say_more(kind: T) -> T:
    """Let a record have more fields than it names; what it names is taken as it is, text is no number."""
    kind.__pydantic_config__ = {"strict": True, "extra": "allow"}  # type: ignore[attr-defined]
    return kind


Step = Annotated[int, _Count()]
Value = Annotated[float | None, _Number(infinite=True)]
Finite = Annotated[float | None, _Number()]
Values = dict[str, Value]
Numbers = dict[str, Annotated[float, _Number(null=False)]]


@_may_say_more
class MetricsLine(TypedDict):
    """A line of metrics.jsonl; all its other fields are `Value`."""

    phase: str
    step: Step


@_may_say_more
class SamplesLine(TypedDict):
    """A line of samples.jsonl."""

    step: Step
    index: Step
    prompt: str
    response: str
    scores: NotRequired[Values]


@_may_say_more
class EvaluationsLine(TypedDict):
    """A line of evaluations.jsonl."""

    step: Step
    columns: dict[str, list[Annotated[float | None, _Score(infinite=True)]]]


@_may_say_more
class BaseFacts(TypedDict, total=False):
    name: str
    fingerprint: str


@_may_say_more
class RunFacts(TypedDict, total=False):
    base: BaseFacts
    stage: str | None
    lora_scales: Numbers


@_may_say_more
class BestSoFar(TypedDict, total=False):
    step: Step
    metric: str
    value: Value


@_may_say_more
class CheckpointMeta(TypedDict, total=False):
    """What a run says in a checkpoint beside its arrays."""

    config: str
    facts: RunFacts
    best: BestSoFar


@_may_say_more
class ArtifactMeta(TypedDict, total=False):
    """What a trainer says of what it leaves in export/."""

    accuracy: Finite
    measured_on: str
    updates: Step
    steps: Step
    evaluation: Values
    heldout: Values


@_may_say_more
class StoredSummary(TypedDict, total=False):
    """summary.json, from which a report can be made again."""

    title: str | None
    task: str | None
    before: Values
    after: Values
    prompts: Step | None
    measured_on: str
    kl_budget: Value
    reward_accuracy: Finite
    judges: dict[str, str]
    judge_accuracy: Finite
    reference_accuracies: Numbers
    reward_accuracy_note: str
    seconds: Numbers
    versions: dict[str, str]
    machine: str
    date: str
    notes: list[str]


@_may_say_more
class Session(TypedDict, total=False):
    """One start of a run."""

    command: str
    started: Annotated[str, _Time()]
    commit: str | None
    versions: dict[str, str]
    machine: str


@_may_say_more
class StoredRun(TypedDict, total=False):
    """run.json: who started a run, where and when, and what it is about."""

    sessions: list[Session]
    base: str
    prompts: Step | None
    held_out: Step | None
    measured_on: str
    judges: dict[str, str]
    reward_accuracy: Finite
    reward_mean: Finite
    reward_std: Finite
    wandb: str  # its id there, of runs before there was trackers.json


@_may_say_more
class StoredPage(TypedDict):
    """What is known of a run's page in a tracker."""

    id: str
    sent: dict[str, Step]  # "phase/name": the last step


StoredTrackers = dict[str, StoredPage]  # trackers.json


LINES = {
    "metrics.jsonl": MetricsLine,
    "samples.jsonl": SamplesLine,
    "evaluations.jsonl": EvaluationsLine,
}  # by the name of the file


def check_document(kind: Any, value: Any, where: str) -> Any:
    """Return what a document of `kind` says, infinities as numbers; raise ValueError with `where` and the field."""
    if wrong := find_mistake(kind, value):
        raise ValueError(f"{where}: {wrong}")
    return _adapter(kind).validate_python(value)


def check_line(file: Path, number: int, record: Mapping[str, Any]) -> None:
    """Raise ValueError with file, line and field where a record is not what files of that name hold."""
    kind = LINES.get(file.name)
    if kind is None or (kind is MetricsLine and _is_plain(record)):
        return
    wrong = find_mistake(kind, record)
    if wrong is None and kind is MetricsLine:
        wrong = find_mistake(Values, {name: value for name, value in record.items() if name != "phase"})
    if wrong:
        raise ValueError(f"{file}, line {number}: {wrong}; mend or delete the line")


def _is_plain(record: Mapping[str, Any]) -> bool:
    """Tell in a moment that a line of metrics.jsonl is what nearly all of them are; a run has many."""
    if type(record.get("phase")) is not str or type(record.get("step")) is not int or record["step"] < 0:
        return False
    numbers = (value for value in record.values() if type(value) is float or type(value) is int)
    others = sum(value is None for value in record.values()) + 1  # the phase
    return sum(-MOST < value < MOST for value in numbers) + others == len(record)


def find_mistake(kind: Any, value: Any) -> str | None:
    """Say which field is wrong, and how; None where all is right."""
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "all of it"
        if first["type"] == "missing":
            return f"{name} is missing"
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        return f"{name} is {first['input']!r:.80}, which should be {said}"
    return None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
