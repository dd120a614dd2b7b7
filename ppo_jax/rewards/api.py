"""A reward that an HTTP service gives: docs/rewards.md has the two protocols.

A batch is cut into requests; they run side by side on one event loop in a daemon thread, over one pool of connections.
Every wait ends at the batch's deadline, also one for a body that trickles, since the task that waits is cancelled.
"""

import asyncio
import dataclasses
import email.utils
import math
import random
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import UTC
from functools import partial
from typing import Any, Literal

import httpx

from ppo_jax.rewards.addresses import LOOPBACK, secrets_of
from ppo_jax.rewards.base import HostReward
from ppo_jax.rewards.failures import Report
from ppo_jax.rewards.protocols import (
    Failed,
    Read,
    Row,
    Show,
    check_url,
    hide_secrets,
    make_bodies,
    read_answer,
    read_ours,
    read_theirs,
    show_text,
    speaks_theirs,
)
from ppo_jax.rewards.scores import to_scores
from ppo_jax.types import Scores

RETRIED = (429, *range(500, 600))
BYTES, BYTES_PER_ROW = 65536, 4096  # largest answer that is read: a constant and so much per row


@dataclasses.dataclass(frozen=True)
class APIConfig:
    """How an HTTP reward service is called."""

    protocol: Literal["auto", "ppo_jax", "llamafactory"] = "auto"
    """The service speaks this protocol; auto is LLaMA-Factory's where the path ends in /score/evaluation, else ours."""
    model: str = "reward"
    """Requests carry this name as their field "model"."""
    rows_per_request: int = 16
    """A request carries at most this many texts."""
    connections: int = 4
    """At most this many requests run at once."""
    connect_timeout: float = 5.0
    """A connection must stand within this many seconds."""
    read_timeout: float = 30.0
    """A request fails after this many seconds of silence while an answer is awaited."""
    deadline: float = 120.0
    """A whole batch with all retries may take this many seconds; rows not scored by then have failed."""
    retries: int = 5
    """A request is tried again at most this many times after a connection error, a 429 or a 5xx."""
    backoff: float = 0.5
    """The second try comes after this many seconds, each next one after twice as many, less up to a half by chance."""

    def __post_init__(self) -> None:
        for name, least in {"rows_per_request": 1, "connections": 1, "retries": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("connect_timeout", "read_timeout", "deadline"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name}={getattr(self, name)} must be positive seconds, below a million")
        if not 0 <= self.backoff <= 3600:
            raise ValueError(f"backoff={self.backoff} must lie in [0, 3600] seconds")


def api_reward(url: str, config: APIConfig, report: Report, token: str | None = None) -> HostReward:
    """The scores of a service at `url`; `report` hears the causes of rows that have none.

    Args:
      token: sent as `Authorization: Bearer ...`; shown nowhere.

    Raises:
      ValueError: the URL is not one, or holds a password; or the token cannot be sent.
    """
    url, theirs = check_url(url), speaks_theirs(url, config.protocol)
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"} | _authorization(token)
    secrets = (*secrets_of(url), token or "")
    show = partial(show_text, secrets=secrets)
    service: list[_Service] = []  # made at the first batch, so that a reward that is never called starts nothing

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        if not responses:
            return to_scores([])
        if not service:
            service.append(_Service(url, config, headers, show))
        bodies = make_bodies(prompts, responses, metadata, config.model, config.rows_per_request, theirs)
        rows = service[0].batch(bodies, read_theirs if theirs else read_ours)
        failed: dict[str, tuple[int, str]] = {}
        for row in rows:
            if isinstance(row, tuple):
                count, detail = failed.get(row[0], (0, row[1]))
                failed[row[0]] = (count + 1, detail)
        for cause, (count, detail) in failed.items():
            report(hide_secrets(cause, secrets), count, hide_secrets(detail, secrets))
        return to_scores([math.nan if isinstance(row, tuple) else row for row in rows])

    return reward


def retry_after(value: str, now: float) -> float | None:
    """Seconds to wait that a Retry-After header asks for (RFC 9110, section 10.2.3); None where it says nothing usable.

    Args:
      value: a number of seconds, or an HTTP date.
      now: seconds since the epoch.
    """
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError, TypeError):  # a zone of a million days is a number to the parser
        return None


class _Service:
    """The event loop in its thread, and the connections that live on it."""

    def __init__(self, url: str, config: APIConfig, headers: dict[str, str], show: Show) -> None:
        self.url, self.config, self.show = url, config, show
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="reward-api", daemon=True).start()
        timeout = httpx.Timeout(config.read_timeout, connect=config.connect_timeout, pool=None)
        limits = httpx.Limits(max_connections=config.connections, max_keepalive_connections=config.connections)
        direct = {f"all://{host}": None for host in LOOPBACK}  # a proxy cannot know this machine's services
        self.client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, mounts=direct)
        self.free = asyncio.Semaphore(config.connections)
        weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop)

    def batch(self, bodies: list[tuple[int, bytes]], read: Read) -> list[Row]:
        future = asyncio.run_coroutine_threadsafe(self._batch(bodies, read), self.loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for the rest
            future.cancel()
            raise

    async def _batch(self, bodies: list[tuple[int, bytes]], read: Read) -> list[Row]:
        end = self.loop.time() + self.config.deadline
        last: dict[int, str] = {}  # request -> its last failure, for those that the deadline ends
        tasks = [
            asyncio.ensure_future(self._request(body, rows, read, end, last, index))
            for index, (rows, body) in enumerate(bodies)
        ]
        _, late = await asyncio.wait(tasks, timeout=self.config.deadline)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)
        found: list[Row] = []
        for index, (task, (rows, _)) in enumerate(zip(tasks, bodies, strict=True)):
            if task.done() and not task.cancelled():
                error = task.exception()  # of a kind that nobody thought of: these rows failed, the run did not
                cause = f"the request failed: {type(error).__name__}"
                found += task.result() if error is None else [(cause, self.show(str(error)))] * rows
            else:
                detail = f"last failure: {last[index]}" if index in last else ""
                found += [(f"no answer before the deadline of {self.config.deadline:g} s", detail)] * rows
        return found

    async def _request(
        self,
        body: bytes,
        rows: int,
        read: Read,
        end: float,
        last: dict[int, str],
        index: int,
    ) -> list[Row]:
        """The rows of one request, after as many tries as it takes and is allowed."""
        for tried in range(self.config.retries + 1):
            try:
                async with self.free:
                    answer = await self._once(body, rows)
                return read(read_answer(answer, self.show), rows, self.show)
            except Failed as failure:
                if failure.wait is None:
                    return [(failure.cause, failure.detail)] * rows
                last[index] = failure.cause
                pause = self.config.backoff * 2**tried * random.uniform(0.5, 1.0)
                pause = max(failure.wait, min(pause, 60.0))
                if tried == self.config.retries:
                    return [(failure.cause, f"{failure.detail}; tried {tried + 1} times".lstrip("; "))] * rows
                if self.loop.time() + pause >= end:
                    left = f"the next try would be in {pause:.0f} s, after the batch's deadline"
                    return [(failure.cause, f"{failure.detail}; {left}".lstrip("; "))] * rows
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _once(self, body: bytes, rows: int) -> tuple[bytes, str]:
        """(body, content type) of a 200; `Failed` for everything else."""
        limit = BYTES + BYTES_PER_ROW * rows
        headers = {"Content-Type": "application/json"}
        try:
            async with self.client.stream("POST", self.url, content=body, headers=headers) as response:
                status, encoding = response.status_code, response.headers.get("Content-Encoding", "identity")
                found = bytearray()
                async for chunk in response.aiter_raw():  # not decompressed: a small body could become a huge one
                    found += chunk
                    if len(found) > limit:
                        break
        except httpx.TransportError as error:
            cause = self.show(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            raise Failed(f"the service cannot be reached: {cause}", wait=0.0) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(f"the request failed: {type(error).__name__}", self.show(str(error))) from None
        kind = response.headers.get("Content-Type", "").split(";")[0].strip()
        if status != 200:
            detail = self.show(bytes(found).decode("utf-8", "replace"))
            wait = None
            if status in RETRIED:
                wait = retry_after(response.headers.get("Retry-After", ""), time.time()) or 0.0
            raise Failed(f"the service answered HTTP {status}", detail, wait)
        if len(found) > limit:
            raise Failed("the answer is too large", f"more than {limit} bytes for {rows} rows")
        if encoding.strip().lower() not in ("", "identity"):
            raise Failed(f"the answer is compressed ({self.show(encoding)}), which was not asked for")
        return bytes(found), kind


def _authorization(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("the bearer token is empty or has characters that an HTTP header cannot carry")
    return {"Authorization": f"Bearer {token}"}
