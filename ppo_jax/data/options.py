"""What a stage is told of its data besides the file: which fields, which rows, and what is mixed and kept apart."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

from ppo_jax.data.llamafactory.templates import TEMPLATES
from ppo_jax.types import Off

AUTO = "auto"  # the template that the tokenizer's own chat template is read as
ToolFormatName = Literal["", "default", "llama3", "mistral", "qwen"]
FormName = Literal["auto", "ppo_jax", "alpaca", "sharegpt", "messages", "trl", "hh", "ultrafeedback", "kto"]


@dataclasses.dataclass(frozen=True)
class TemplateOptions:
    """A template of LLaMA-Factory, in place of the tokenizer's chat template."""

    name: Annotated[str, Off("")] = ""
    """Messages become tokens by this template, piece by piece as LLaMA-Factory does it; auto is the tokenizer's own,
    read in that way; "" is off."""
    system: str | None = None
    """This is the system message of conversations without one, in place of the template's own."""
    tools: ToolFormatName = ""
    """Tools and calls are written in this format, in place of the template's own; "" is that."""
    thinking: bool | None = True
    """Empty thoughts before answers without any are learnt, in templates that have them; else they are of the
    prompt."""

    def __post_init__(self) -> None:
        if self.name not in ("", AUTO, *TEMPLATES):
            raise ValueError(
                f"name={self.name!r} is no template that is known; there are: {AUTO}, {', '.join(TEMPLATES)}"
            )
        if not self.name and (self.system is not None or self.tools or self.thinking is not True):
            raise ValueError("system, tools and thinking are of a template; give its name too")


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """How the files of a stage are read, mixed and held out."""

    columns: tuple[str, ...] = ()
    """These fields are read, each a NAME, or NAME=COLUMN where the file calls it COLUMN; by default all fields are."""
    form: FormName = "auto"
    """The rows have this form; auto recognises it by their fields and says which it is."""
    split: str = "train"
    """This split is read of a data set that has several: a directory that `datasets` saved, or hub:OWNER/NAME."""
    max_samples: int | None = None
    """At most this many rows of each file are read, its first ones; None takes all."""
    more: tuple[Path, ...] = ()
    """These files are read too, in the same way, and mixed with the first one."""
    weights: tuple[float, ...] = ()
    """These are the shares of the files in training, the first one's first; by default each row counts alike."""
    held_out_fraction: float | None = None
    """This fraction of the rows is kept apart to measure on, in place of the number that held_out gives."""
    held_out_file: Path | None = None
    """The rows of this file are what is measured on, and none is taken from the training files."""
    template: TemplateOptions = TemplateOptions()
    """These options choose a template of LLaMA-Factory."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.renamed]
        for name, column in self.renamed:
            if not name or not column:
                raise ValueError(f"columns={'='.join((name, column))!r} must be NAME or NAME=COLUMN")
        if len(set(names)) < len(names):
            raise ValueError(f"columns name {next(n for n in names if names.count(n) > 1)!r} more than once")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples={self.max_samples} must be at least 1")
        if self.weights and len(self.weights) != 1 + len(self.more):
            raise ValueError(f"{len(self.weights)} weights for {1 + len(self.more)} files; give one for each")
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise ValueError(f"weights={list(self.weights)} must be positive")
        if self.held_out_fraction is not None and not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        if self.held_out_fraction is not None and self.held_out_file is not None:
            raise ValueError("held_out_fraction and held_out_file exclude one another; give one of them")

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """(our name, the file's) of each column that is read."""
        pairs = (text.partition("=") for text in self.columns)
        return tuple((name, column if sign else name) for name, sign, column in pairs)
