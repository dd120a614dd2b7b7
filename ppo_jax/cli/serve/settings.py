"""The options of `ppo-jax serve-reward`."""

import dataclasses
from pathlib import Path

from ppo_jax.cli.parse import Brief
from ppo_jax.rewards.reading import At

POSITIVE = (
    *("batch_size", "batch_tokens", "max_rows", "max_body", "max_waiting", "max_waiting_bytes", "max_connections"),
    *("head_timeout", "body_timeout", "grace"),
)


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Serve a reward model over HTTP."""

    reward: Path
    """The model is that of a run directory of `ppo-jax reward`, or a Hugging Face sequence classifier with one
    label."""
    model: str | None = None
    """The base of a LoRA reward model is here, where the one that it names has moved."""
    at: At = "auto"
    """The score is read there; auto: ours at the last token of the text, others where their template closes it."""
    host: str = "127.0.0.1"
    """The server listens at this address; only this machine reaches the default."""
    port: int = 8000
    """The server listens at this port; 0 means any free one, which is printed."""
    token_env: str = ""
    """This environment variable holds a bearer token; requests without it are refused."""
    token_file: Path | None = None
    """This file holds the bearer token instead."""
    batch_size: int = 32
    """At most this many rows are scored at once."""
    batch_tokens: int = 8192
    """At most this many tokens are scored at once, padding counted, unless a single text has more."""
    wait_ms: float = 2.0
    """A batch waits this many milliseconds for more rows, unless it is full."""
    max_length: int = 0
    """This many tokens of a text are read, the last ones of a longer text; 0 means the model's limit."""
    max_rows: int = 256
    """A request may have at most this many rows."""
    max_body: int = 8 * 2**20
    """The body of a request may have at most this many bytes."""
    max_waiting: int = 4096
    """At most this many rows wait; beyond that requests are told to come back (503)."""
    max_waiting_bytes: int = 32 * 2**20
    """Bodies of at most this many bytes wait; beyond half of what is left a request is told to come back (503)."""
    max_connections: int = 512
    """At most this many connections stand; the next one takes the place of one that waits for its client."""
    head_timeout: float = 10.0
    """The head of a request must arrive within this many seconds."""
    body_timeout: float = 30.0
    """The body of a request must arrive within this many seconds."""
    grace: float = 60.0
    """A stop by SIGTERM or SIGINT gives the requests in flight this many seconds."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.port < 2**16 or self.wait_ms < 0:
            raise ValueError(f"port={self.port} must be from 0 to 65535, wait_ms={self.wait_ms} not negative")
        if self.max_rows > self.max_waiting:
            raise ValueError(f"max_rows={self.max_rows} must not be above max_waiting={self.max_waiting}")
        if 2 * self.max_body > self.max_waiting_bytes:
            raise ValueError(
                f"max_waiting_bytes={self.max_waiting_bytes} must be twice max_body={self.max_body} or more"
            )
        if self.token_env and self.token_file:
            raise ValueError("give token_env or token_file, not both")


BRIEF = Brief(
    (
        "ppo-jax serve-reward --reward runs/reward",
        "ppo-jax serve-reward --reward classifier --host 0.0.0.0 --port 8080 --token-env SCORES_TOKEN",
    )
)
