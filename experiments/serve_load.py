"""Load on a reward server: many requests from concurrent clients, every score checked, the server's memory watched.

    python -m experiments.serve_load                      # a tiny random model: 10,000 requests from 16 clients
    python -m experiments.serve_load --reward DIR --requests 1000

Each client sends requests of 1 to 4 rows, by both protocols in turn, and compares what comes back with the scores of
the same model in this process. The server is a process of its own, `ppo-jax serve-reward`.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import psutil

from experiments import smoke
from ppo_jax.cli.parse import parse
from ppo_jax.models.files import classifiers
from ppo_jax.models.heads import RewardHead
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.rewards.loading import load_scorer
from ppo_jax.train.comparisons import bucket_texts, head_scores, text_features
from ppo_jax.train.reward import normalise_head

WORDS = smoke.GOOD + smoke.BAD + smoke.OTHER
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """Send requests to a reward server and check every score."""

    reward: Path | None = None
    """The reward model is in this directory; by default it is a tiny random one."""
    requests: int = 10_000
    """The clients send this many requests in all."""
    clients: int = 16
    """This many clients send at the same time, each one request after another."""
    texts: int = 200
    """The requests draw from this many different texts."""
    seed: int = 0
    """This number seeds the texts and the choice of who sends which."""


class Text(NamedTuple):
    prompt: str
    response: str
    score: float


class Load(NamedTuple):
    """What became of the requests."""

    answered: int  # requests with status 200 and as many scores as rows
    failed: int  # all others
    swapped: int  # rows with the score of another text
    inexact: int  # rows whose score differs from the local one by more than 1e-5
    rows: int
    seconds: float
    requests_per_second: float
    worst_error: float  # largest difference to the local score
    megabytes: list[float]  # the server's resident memory: after a tenth of the requests, ..., after all


def main(args: list[str] | None = None) -> Load:
    """Runs the load; prints and returns the result. Exit code 1 if anything was lost or swapped."""
    settings = parse(LoadConfig, args, prog="experiments.serve_load")
    with tempfile.TemporaryDirectory() as folder:
        path = settings.reward or tiny_model(Path(folder) / "reward")
        table = texts(path, settings.texts, settings.seed)
        with server(path) as (url, process):
            result = asyncio.run(load(url, table, settings.requests, settings.clients, process.pid, settings.seed))
    print(json.dumps(result._asdict(), indent=2))
    return result


def tiny_model(path: Path, seed: int = 0) -> Path:
    """A random reward model of the smoke test's size, as a sequence-classification directory; its scores have std 1."""
    model = smoke.model(seed)
    head = RewardHead().init(jax.random.key(seed), jnp.zeros((1, model.config.hidden_size)))["params"]
    rows = model.tokenizer([review.text for review in smoke.reviews(100)])["input_ids"]
    buckets = bucket_texts(rows, [16], model.pad_id)
    features = text_features(model.params, RewardRole({}, head), model.config, buckets, 100)
    head = normalise_head(head, head_scores(head, features))
    return classifiers.save(path, model.config, model.params, head, model.tokenizer)


def texts(path: Path, count: int, seed: int = 0) -> list[Text]:
    """Texts with their scores in this process; at most `count`, any two of which are told apart by their scores."""
    rng = np.random.default_rng(seed)

    def draw(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    pairs = list(dict.fromkeys((draw(5), " " + draw(20)) for _ in range(count)))
    scores = load_scorer(path).score(*map(list, zip(*pairs, strict=True)))
    order = np.argsort(scores)
    apart = order[np.diff(scores[order], prepend=-np.inf) > 10 * TOLERANCE]
    return [Text(pairs[i][0], pairs[i][1], float(scores[i])) for i in apart]


@contextlib.contextmanager
def server(path: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(URL, process) of `ppo-jax serve-reward` on a free port; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "ppo_jax.cli", "serve-reward", "--reward", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"serving .* at (http://\S+:\d+)/", line):
                yield found[1], process
                break
        else:
            raise RuntimeError(f"the server did not start: {''.join(said)}")
    finally:
        process.terminate()
        process.wait(timeout=120)


async def load(url: str, table: Sequence[Text], requests: int, clients: int, pid: int, seed: int = 0) -> Load:
    """Sends `requests` requests from `clients` concurrent clients to the server with process id `pid`."""
    server_process, began = psutil.Process(pid), time.perf_counter()
    counts = dict.fromkeys(("answered", "failed", "swapped", "inexact", "rows"), 0)
    known = np.array([text.score for text in table])
    worst, megabytes = 0.0, []
    todo = iter(range(requests))  # shared: whoever is free takes the next

    async def client(number: int) -> None:
        nonlocal worst
        rng = np.random.default_rng([seed, number])
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for request in todo:
                chosen = rng.integers(len(table), size=rng.integers(1, 5))
                rows = [table[i] for i in chosen]
                scores = await ask(http, rows, ours=request % 2 == 0)
                if scores is None or len(scores) != len(rows):
                    counts["failed"] += 1
                else:
                    errors = np.abs(np.array(scores) - known[chosen])
                    worst = max(worst, float(errors.max()))
                    counts["answered"] += 1
                    counts["rows"] += len(rows)
                    counts["inexact"] += int(np.sum(errors > TOLERANCE))
                    nearest = np.abs(np.array(scores)[:, None] - known).argmin(axis=1)
                    counts["swapped"] += int(np.sum(nearest != chosen))
                if (request + 1) % max(requests // 10, 1) == 0:
                    megabytes.append(round(server_process.memory_info().rss / 2**20, 1))

    await asyncio.gather(*map(client, range(clients)))
    seconds = time.perf_counter() - began
    return Load(
        **counts,
        seconds=round(seconds, 2),
        requests_per_second=round(requests / seconds, 1),
        worst_error=worst,
        megabytes=megabytes,
    )


async def ask(http: httpx.AsyncClient, rows: Sequence[Text], ours: bool) -> list[float] | None:
    """The scores of these texts by our protocol or by LLaMA-Factory's; None when the server did not give them."""
    if ours:
        samples = [{"prompt": row.prompt, "response": row.response, "metadata": {}} for row in rows]
        response = await http.post("/v1/score", json={"model": "any", "samples": samples})
        return [entry["score"] for entry in response.json()["scores"]] if response.status_code == 200 else None
    texts = [row.prompt + row.response for row in rows]
    response = await http.post("/v1/score/evaluation", json={"model": "any", "messages": texts})
    return response.json()["scores"] if response.status_code == 200 else None


if __name__ == "__main__":
    outcome = main()
    sys.exit(int(bool(outcome.failed or outcome.swapped or outcome.inexact)))
