"""Well-behaved clients of a reward server beside clients that mean ill: who fails, and how long the others wait.

    python -m experiments.serve_attacks                 # a tiny random model, 200 clients, every attack in turn

Each well-behaved client sends a short request, waits for its scores, pauses, and sends the next one; it fails where it
does not get them within a minute. As our own client does, it tries up to five times more after a 503 (when its
Retry-After is over) and after a connection that failed, which is counted. For each attack
the same clients are measured before it and during it. The server is a process of its own, with its default limits.
"""

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.process
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from experiments.serve_load import server, tiny_model
from ppo_jax.cli.parse import parse

PATH = "/v1/score/evaluation"
LONG = 8 * 2**20 - 100  # bytes, just below the server's limit


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Measure well-behaved clients beside attacks."""

    reward: Path | None = None
    """The reward model is in this directory; by default it is a tiny random one."""
    clients: int = 200
    """This many well-behaved clients send short requests."""
    attackers: int = 100
    """This many clients attack."""
    seconds: float = 20.0
    """The clients are measured for this many seconds before each attack, and for as long during it."""
    attacks: tuple[str, ...] = ()
    """These attacks are made; by default all of them."""
    pause: float = 5.0
    """A client pauses for this many seconds between two requests, on the average."""


Attack = Callable[[str, int], Awaitable[None]]  # (URL, number of the attacker), again and again until it is cancelled


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measures; prints and returns the result. Exit code 1 if a well-behaved client failed."""
    settings = parse(AttackConfig, args, prog="experiments.serve_attacks")
    result: dict[str, Any] = {"settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "reward"}}
    result["cores"], result["load_average"] = os.cpu_count(), [round(x, 1) for x in os.getloadavg()]
    with tempfile.TemporaryDirectory() as folder:
        path = settings.reward or tiny_model(Path(folder) / "reward")
        with server(path) as (url, process):
            memory = psutil.Process(process.pid)
            asyncio.run(measure(url, settings, memory, "", 3.0))  # compiles its programs
            for name in settings.attacks or ATTACKS:
                before = asyncio.run(measure(url, settings, memory, "", settings.seconds))
                during = asyncio.run(measure(url, settings, memory, name, settings.seconds))
                result[name] = {"before": before, "during": during}
                print(json.dumps({name: result[name]}), flush=True)
    print(json.dumps(result, indent=2))
    return result


async def measure(
    url: str, settings: AttackConfig, server_process: psutil.Process, attack: str, seconds: float
) -> dict[str, Any]:
    """Runs the well-behaved clients for so long, beside an attack; their failures and latencies in seconds."""
    times: list[float] = []
    failures: list[str] = []
    again: Counter[str] = Counter()
    attackers = start_attack(attack, url, settings.attackers) if attack else None
    megabytes = [server_process.memory_info().rss / 2**20]
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.uniform(0, settings.pause))
        async with httpx.AsyncClient(base_url=url, timeout=60, verify=False, trust_env=False) as http:
            while time.monotonic() < end:
                text = f"the film is {rng.random()}"  # no two are alike, so that none joins another
                began = time.monotonic()
                try:
                    async with asyncio.timeout(60):
                        answer = await ask(http, text, again)
                    if answer.status_code != 200 or not np.isfinite(answer.json()["scores"]).all():
                        failures.append(f"HTTP {answer.status_code}")
                except (httpx.HTTPError, TimeoutError) as error:
                    failures.append(type(error).__name__)
                times.append(time.monotonic() - began)
                await asyncio.sleep(rng.uniform(0.5, 1.5) * settings.pause)

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.2)
            megabytes.append(server_process.memory_info().rss / 2**20)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*map(client, range(settings.clients)))
    watching.cancel()
    if attackers is not None:
        attackers.kill()
        attackers.join()
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "requests": len(times),
        "failed": len(failures),
        "failures": sorted(set(failures)),
        "tried again": dict(again),
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "worst": round(max(times), 3),
        "megabytes": [round(megabytes[0]), round(max(megabytes))],
    }


async def ask(http: httpx.AsyncClient, text: str, again: Counter[str]) -> httpx.Response:
    """Sends a request, five times more where the connection fails or the server says 503; `again` counts why."""
    for tried in range(6):
        try:
            answer = await http.post(PATH, json={"model": "m", "messages": [text]})
            if answer.status_code != 503 or tried == 5:
                return answer
            again["503"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        except httpx.TransportError as error:
            if tried == 5:
                raise
            again[type(error).__name__] += 1
            await asyncio.sleep(0.5)
    raise AssertionError("unreachable")


def start_attack(attack: str, url: str, count: int) -> multiprocessing.process.BaseProcess:
    """Starts the attackers, in a process of their own: what they do must not hold up those who are measured."""
    context = multiprocessing.get_context("fork")
    stands = context.Event()
    process = context.Process(target=run_attack, args=(attack, url, count, stands), daemon=True)
    process.start()
    stands.wait()
    return process


def run_attack(attack: str, url: str, count: int, stands: Any) -> None:
    """The attackers, until their process is killed."""

    async def run() -> None:
        attackers = [repeat(ATTACKS[attack], url, number) for number in range(count)]
        asyncio.get_running_loop().call_later(2, stands.set)
        await asyncio.gather(*attackers)

    asyncio.run(run())


async def repeat(attack: Attack, url: str, number: int) -> None:
    """Attacks until it is cancelled, whatever the server does about it."""
    while True:
        with contextlib.suppress(OSError, httpx.HTTPError, asyncio.IncompleteReadError):
            await attack(url, number)
        await asyncio.sleep(0.05)


async def send(url: str, said: bytes, stay: float) -> None:
    """Says something on a connection of its own, and stays until it is closed, or so many seconds."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(said)
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), stay)
    finally:
        writer.close()


def post(body: bytes) -> bytes:
    """A whole request."""
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


LONG_TEXT = post(json.dumps({"model": "m", "messages": ["the film " * (LONG // 9 - 10)]}).encode())


async def long_text(url: str, number: int) -> None:
    """One text of 8 MB."""
    await send(url, LONG_TEXT, 60)


async def half_head(url: str, number: int) -> None:
    """Half of a request's head on ten connections, which stay open."""
    await asyncio.gather(*(send(url, b"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-Long", 60) for _ in range(10)))


async def half_body(url: str, number: int) -> None:
    """Half of a request's body on ten connections, which stay open."""
    await asyncio.gather(*(send(url, post(b"{" * 1000)[:-500], 60) for _ in range(10)))


async def leave(url: str, number: int) -> None:
    """A request of 64 rows that is not waited for."""
    texts = [f"the film {number} {random.random()} {i}" for i in range(64)]
    await send(url, post(json.dumps({"model": "m", "messages": texts}).encode()), 0.05)


async def rubbish(url: str, number: int) -> None:
    """Something that is not HTTP."""
    await send(url, random.randbytes(1000) + b"\r\n\r\n", 5)


ATTACKS: dict[str, Attack] = {
    "long texts": long_text,
    "half heads": half_head,
    "half bodies": half_body,
    "clients that leave": leave,
    "malformed HTTP": rubbish,
}


if __name__ == "__main__":
    outcome = main()
    sys.exit(
        int(any(part["during"]["failed"] for part in outcome.values() if isinstance(part, dict) and "during" in part))
    )
