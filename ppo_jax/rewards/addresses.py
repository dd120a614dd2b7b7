"""URLs of reward services: where they are read from, and what of them is written down.

    http://HOST:PORT/PATH     the URL itself
    env:NAME                  it is in this environment variable
    file:PATH                 it is in this file

A URL may hold a key, and its host may be nobody's business, so neither is written into what a run leaves: there it is
`NOT_SAVED`, and who goes on with the run gives it again. `env:NAME` and `file:PATH` are written as they are, and so is
a plain URL of this machine. What is published (the report, a model card) names a service and no more.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ppo_jax.data.disk import read_bytes

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
NOT_SAVED = "url:not-saved"


def is_url(source: str) -> bool:
    """Tell whether it is a URL as such."""
    return re.match(r"https?:", source, re.IGNORECASE) is not None


def is_service(source: str) -> bool:
    """Tell whether it says where a service is, in any way."""
    return is_url(source) or source.startswith(("env:", "file:")) or source == NOT_SAVED


def read_source(source: str) -> str:
    """Look up the URL of `env:NAME` and `file:PATH`; every other source is what it is. Errors show no URL."""
    kind, _, place = source.partition(":")
    if source == NOT_SAVED:
        raise ValueError(
            "the URL of the reward is not saved with a run, since it may hold a key or an internal address: give it "
            "again (--reward URL), or say where it is (--reward env:NAME or file:PATH), which is saved"
        )
    if kind == "env":
        found = os.environ.get(place, "").strip()
        if not found:
            raise ValueError(f"--reward {source}: the environment variable {place} is not set, or empty")
    elif kind == "file":
        try:
            found = read_bytes(Path(place).expanduser()).decode().strip()
        except FileNotFoundError:
            raise FileNotFoundError(f"--reward {source}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--reward {source}: it cannot be read as text: {type(error).__name__}") from None
    else:
        return source
    if not is_url(found):
        raise ValueError(f"--reward {source}: what is there does not begin with http:// or https://")
    return found


def saved_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """What is written of sources into the configuration that repeats a run."""
    return tuple(NOT_SAVED if is_url(source) and not _is_plain(source) else source for source in sources)


def hide_addresses(text: str) -> str:
    """What is written of a text that may quote URLs: each as `saved_sources` would write it."""
    return re.sub(r"https?://[^\s'\"<>]*", lambda found: saved_sources([found[0]])[0], text, flags=re.IGNORECASE)


def named_sources(sources: Sequence[str]) -> str:
    """What is published of sources: no addresses, no paths."""
    return ", ".join("a service" if is_service(source) else Path(source).name for source in sources)


def secrets_of(url: str) -> tuple[str, ...]:
    """What of a URL is not shown where a service echoes it: the query, and its values as they are and decoded."""
    query = urlsplit(url).query
    values = [value for _, value in parse_qsl(query)] + [pair.partition("=")[2] for pair in query.split("&")]
    return tuple(dict.fromkeys(one for one in (query, *values) if len(one) > 3))


def _is_plain(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.netloc.rpartition(":")[0] or parts.netloc
    return not (parts.query or parts.fragment) and host in LOOPBACK
