"""The work that is measured, and the record of a measurement. Read by peers too: the standard library alone."""

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    @property
    def head_width(self) -> int:
        return 64 if self.width % 64 == 0 else self.width // self.heads

    @property
    def products(self) -> int:
        """Weights that a token is multiplied with in the layers."""
        inner = self.head_width * (2 * self.heads + 2 * self.kv_heads) + 3 * self.mlp
        return self.layers * self.width * inner


@dataclasses.dataclass(frozen=True)
class Workload:
    """One PPO iteration: rollout, score, epochs of one optimizer step each."""

    shape: Shape
    batch: int
    prompt: int
    response: int
    epochs: int
    micro_batches: int = 1
    adapter: Literal["full", "lora"] = "full"
    rank: int = 16  # of LoRA
    layers: int = 0  # that have LoRA, counted from the last; 0: all
    own_critic: bool = False
    reward: Literal["model", "rule", "lora"] = "model"  # of the same size; a sum over tokens; LoRA as the policy's
    stops: int = 0  # so many token ids end a response; 0: every response has its whole length
    slots: int = 0  # ours alone: responses drawn at a time
    length_buckets: int = 1  # ours alone: lengths that micro-batches are cut to
    logprob_chunk: int = 0  # ours alone: positions whose logits are held at once; 0: all

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.response)

    def update_flops(self) -> float:
        """Multiplications and additions of the update that cannot be done without: reference pass, then the epochs.

        A pass over n tokens takes 2 n (products + scores of attention) and the unembedding on response positions; its
        backward pass twice that, or once where the weights are frozen. Padding behind short responses counts as work.
        Layers below the trained ones are passed once; a reward that is read with the update passes the others once.
        """
        shape, rows = self.shape, self.batch * self.response
        attention = 2 * shape.layers * (self.prompt + self.response) * shape.heads * shape.head_width
        trunk, table = 2 * self.tokens * shape.products, 2 * rows * shape.width * shape.vocabulary
        scores = 2 * self.tokens * attention
        weights = 1 if self.adapter == "full" else 0
        part = (self.layers or shape.layers) / shape.layers
        policy = (2 + weights) * (part * trunk + table) + 3 * part * scores
        critic = (3 * trunk + 3 * scores) if self.own_critic else 0
        reward = part * (trunk + scores) if self.reward == "lora" else 0
        return trunk + scores + table + reward + self.epochs * (policy + critic)


SMOLLM2 = Shape(vocabulary=49_152, width=576, layers=30, heads=9, kv_heads=3, mlp=1536)
FOUR = Shape(vocabulary=1024, width=256, layers=4, heads=4, kv_heads=4, mlp=1024)

WORKLOADS = {
    "T": Workload(FOUR, batch=16, prompt=32, response=64, epochs=4),
    "T-critic": Workload(FOUR, batch=16, prompt=32, response=64, epochs=4, own_critic=True),
    "T-rule": Workload(FOUR, batch=16, prompt=32, response=64, epochs=4, own_critic=True, reward="rule"),
    "C": Workload(
        dataclasses.replace(FOUR, vocabulary=32_000), batch=8, prompt=32, response=64, epochs=2, logprob_chunk=128
    ),
    "V": Workload(FOUR, batch=64, prompt=32, response=128, epochs=4, micro_batches=4, stops=32),
    "V-ragged": Workload(
        FOUR, batch=64, prompt=32, response=128, epochs=4, micro_batches=8, stops=32, slots=24, length_buckets=4
    ),
    "S": Workload(SMOLLM2, batch=32, prompt=16, response=24, epochs=4, micro_batches=4),
    "S-lora": Workload(SMOLLM2, batch=32, prompt=16, response=24, epochs=4, micro_batches=4, adapter="lora"),
    "S-top": Workload(
        SMOLLM2, batch=32, prompt=16, response=24, epochs=4, micro_batches=4, adapter="lora", layers=12, reward="lora"
    ),
    "S-critic": Workload(SMOLLM2, batch=32, prompt=16, response=24, epochs=4, micro_batches=4, own_critic=True),
}


def find_workload(name: str) -> Workload:
    """The workload of this name; `tiny:NAME` is the same in small, to rehearse with."""
    whole = WORKLOADS[name.removeprefix("tiny:")]
    if not name.startswith("tiny:"):
        return whole
    small = Shape(vocabulary=64, width=64, layers=2, heads=1, kv_heads=1, mlp=64)
    batch, slots = max(4, whole.micro_batches), min(whole.slots, 2)
    return dataclasses.replace(
        whole, shape=small, batch=batch, prompt=4, response=6, slots=slots, layers=min(whole.layers, 1)
    )


class Clock:
    """Seconds of the wall and of this process' processors (user and system), phase by phase."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, list[float]]] = []

    def begin(self) -> None:
        self.iterations.append({})

    def time(self, phase: str, work: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """What `work` returns; its seconds are added to the phase."""
        wall, used = time.perf_counter(), time.process_time()
        result = work(*inputs, **named)
        spent = self.iterations[-1].setdefault(phase, [0.0, 0.0])
        spent[0] += time.perf_counter() - wall
        spent[1] += time.process_time() - used
        return result


def peak_mib() -> int:
    """The most resident memory that this process has had so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def report(clock: Clock, peak: int, **more: float) -> None:
    """Prints the record of a worker as its last line: [wall, cpu] seconds of every phase of every iteration."""
    print(json.dumps({"iterations": clock.iterations, "peak_mib": peak} | more))
