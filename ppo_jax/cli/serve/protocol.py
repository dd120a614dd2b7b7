"""The requests that the reward server reads, and why it refuses one (docs/rewards.md has both protocols)."""

import asyncio
from typing import Any

from ppo_jax.cli.serve.room import Held
from ppo_jax.data.disk import parse_json

DRAINED = 4  # times the limit: as much of a body that is refused is read, so that the client sees the answer
AGAIN = {"Retry-After": "1"}


class Refused(Exception):
    """A request that gets an error status and a reason."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


async def read_json(request: Any, limit: int, timeout: float, held: Held) -> dict[str, Any]:
    """Read the JSON object in a request's body of at most `limit` bytes, which arrives within `timeout` seconds.

    `held` counts the bytes: all of them before the first is read where their number is known, else as they come.

    Refused: 400 the client left, 408 too slow, 413 too large, 422 no JSON object, 503 no room.
    """
    from starlette.requests import ClientDisconnect

    def refuse(too_large: bool) -> Refused:  # made where it is raised: one in a variable would keep this frame's body
        if too_large:
            return Refused(413, f"the body is larger than {limit} bytes", {"Connection": "close"})
        return Refused(503, "too many bytes are waiting already; come back later", AGAIN | {"Connection": "close"})

    declared = request.headers.get("content-length", "0")
    known = int(declared) if declared.isdigit() else 0
    if known > DRAINED * limit:
        raise refuse(too_large=True)
    if known <= limit and not held.take(known):
        raise refuse(too_large=False)  # nothing of it is read: to read it all and drop it would hold the others up
    body, size, is_too_large, is_busy = bytearray(), 0, False, False
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > DRAINED * limit:
                    raise refuse(too_large=True)
                if size > limit:
                    is_too_large = True
                elif not is_busy and size > held.size and not held.take(size - held.size):
                    is_busy = True
                if not (is_too_large or is_busy):
                    body += chunk
                else:
                    body.clear()
                    held.keep(0)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {timeout} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    if is_too_large or is_busy:
        raise refuse(is_too_large)
    try:
        value = parse_json(bytes(body))
    except ValueError as error:  # also a key that stands twice, NaN, or nested too deep
        raise Refused(422, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(422, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def read_samples(body: dict[str, Any], max_rows: int) -> list[dict[str, Any]]:
    """Read our protocol's field: samples of prompt, response and metadata."""
    samples = _rows(body, "samples", max_rows)
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise Refused(422, f"samples[{i}] must be an object")
        for field in ("prompt", "response"):
            _check_text(sample.get(field), f"samples[{i}].{field}")
        if not isinstance(sample.get("metadata", {}), dict):
            raise Refused(422, f"samples[{i}].metadata must be an object")
    return samples


def read_messages(body: dict[str, Any], max_rows: int) -> tuple[str, list[str], int | None]:
    """Read LLaMA-Factory's fields: model, messages, max_length."""
    if not isinstance(body.get("model"), str):
        raise Refused(422, "model must be text")
    _check_text(body["model"], "model")
    texts = _rows(body, "messages", max_rows)
    for i, text in enumerate(texts):
        _check_text(text, f"messages[{i}]")
    length = body.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise Refused(422, f"max_length must be a positive integer or null, not {str(length)[:40]}")
    return body["model"], texts, length


def _rows(body: dict[str, Any], field: str, max_rows: int) -> list[Any]:
    rows = body.get(field)
    if not isinstance(rows, list):
        raise Refused(422, f"{field} must be a list")
    if not rows:
        raise Refused(400, f"{field} is empty")
    if len(rows) > max_rows:
        raise Refused(413, f"{field} has {len(rows)} rows; this server takes at most {max_rows}")
    return rows


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise Refused(422, f"{where} must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(422, f"{where} holds half of a surrogate pair") from None


def entry(score: float | str) -> dict[str, Any]:
    """Make our protocol's answer for one sample: its score, or why there is none."""
    return {"error": score} if isinstance(score, str) else {"score": score}
