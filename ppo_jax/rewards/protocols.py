"""The two protocols of reward services: what is sent, and what is read from an answer (docs/rewards.md).

Nothing here opens a connection; `rewards.api` does.
"""

import html
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from ppo_jax.data.disk import RepeatedKey, parse_json
from ppo_jax.rewards.failures import printable
from ppo_jax.rewards.scores import number

# What one row became: its score, or (cause, detail).
Row = float | tuple[str, str]
Show = Callable[..., str]  # (text, limit)
Read = Callable[[Any, int, Show], list[Row]]  # (answer, rows, show) -> rows


class Failed(Exception):
    """Why a request has no scores. cause: for the count; detail: for the first time; wait: None (final) or seconds."""

    def __init__(self, cause: str, detail: str = "", wait: float | None = None) -> None:
        super().__init__(cause)
        self.cause, self.detail, self.wait = cause, detail, wait


def check_url(url: str) -> str:
    """`url` if a service may be there; ValueError otherwise."""
    try:
        parts, _ = urlsplit(url), httpx.URL(url)
        plain = url.isascii() and url.isprintable() and " " not in url
        usable = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        raise ValueError("the reward's URL must look like http://HOST:PORT/PATH or https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "the reward's URL holds a user or a password, which every program on the way may log: name a bearer "
            "token's variable or file instead"
        )
    return url


def speaks_theirs(url: str, protocol: str) -> bool:
    """Whether a service is called by LLaMA-Factory's protocol; "auto": its path tells."""
    if protocol != "auto":
        return protocol == "llamafactory"
    return urlsplit(url).path.rstrip("/").endswith("/score/evaluation")


def hide_secrets(text: str, secrets: Sequence[str]) -> str:
    """`text` without the secrets, which a service may echo: as they are, or as JSON, HTML and URLs write them."""
    forms: set[str] = set()
    for token in filter(None, secrets):
        quoted = json.dumps(token)[1:-1]
        forms |= {token, quoted, quoted.replace("/", "\\/"), html.escape(token), quote(token), quote(token, safe="")}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "[token]")
    return text


def show_text(text: str, limit: int = 160, secrets: Sequence[str] = ()) -> str:
    """Foreign text for the log. Secrets go first: of one that was cut off, most would be shown."""
    return printable(hide_secrets(text, secrets), limit)


def make_bodies(
    prompts: Sequence[str],
    responses: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    model: str,
    size: int,
    theirs: bool,
) -> list[tuple[int, bytes]]:
    """(rows, JSON) of each request, which has at most `size` rows.

    Raises ValueError where the metadata of a prompt is not JSON.
    """
    samples: list[Any]
    if theirs:
        name, samples = "messages", [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    else:
        name, samples = "samples", []
        for prompt, response, facts in zip(prompts, responses, metadata, strict=True):
            samples.append({"prompt": prompt, "response": response, "metadata": facts})
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    try:
        texts = [json.dumps({"model": model, name: piece}, allow_nan=False) for piece in pieces]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of a prompt cannot be sent as JSON: {error}") from None
    return [(len(piece), text.encode()) for piece, text in zip(pieces, texts, strict=True)]


def read_answer(answer: tuple[bytes, str], show: Show) -> Any:
    """The JSON in (body, content type); `Failed` where it is none."""
    body, kind = answer
    try:
        return parse_json(body, finite=False)  # a score that is NaN fails its row, not the others
    except RepeatedKey as error:
        raise Failed("the answer has a key twice", str(error)) from None
    except ValueError:  # not UTF-8, not JSON, nested a thousand deep
        named = show(kind, 40) or "no content type"
        detail = show(body.decode("utf-8", "replace"), 80)
        raise Failed(f"the answer is not JSON ({named})", f"it begins: {detail}" if detail else "it is empty") from None


def _scores(answer: Any, rows: int) -> list[Any]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise Failed('the answer has no list "scores"')
    if len(scores) != rows:
        raise Failed("the answer has a wrong number of scores", f"{len(scores)} for {rows} rows")
    return scores


def read_theirs(answer: Any, rows: int, show: Show = printable) -> list[Row]:
    """What each row became, in LLaMA-Factory's answer; `Failed` where it has not one entry per row."""
    return [_score(value) for value in _scores(answer, rows)]


def read_ours(answer: Any, rows: int, show: Show = printable) -> list[Row]:
    """The same in ours."""
    found: list[Row] = []
    for entry in _scores(answer, rows):
        if isinstance(entry, dict) and "error" in entry:
            found.append(("the service could not score the row", show(str(entry["error"]))))
        elif isinstance(entry, dict) and "score" in entry:
            found.append(_score(entry["score"]))
        else:
            found.append(('an entry has neither "score" nor "error"', ""))
    return found


def _score(value: Any) -> Row:
    score, wrong = number(value)
    return score if wrong is None else (f"a score is {wrong}", "")
