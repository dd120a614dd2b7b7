"""The options of `ppo-jax serve-reward`."""

import dataclasses
from pathlib import Path

from ppo_jax.rewards.reading import At


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Serve a reward model over HTTP."""

    reward: Path
    """Run directory of `ppo-jax reward`, the model in it, or a Hugging Face sequence classifier with one label."""
    model: str | None = None
    """The base of a LoRA reward model, where the one that it names has moved."""
    at: At = "auto"
    """Where the score is read; auto: ours at the last token of the text, others where their template closes it."""
    host: str = "127.0.0.1"
    """Address to listen at; only this machine reaches the default."""
    port: int = 8000
    """Port to listen at; 0: any free one, which is printed."""
    token_env: str = ""
    """Environment variable that holds a bearer token; requests without it are refused."""
    token_file: Path | None = None
    """Or the file that holds it."""
    batch_size: int = 32
    """Rows scored at once."""
    wait_ms: float = 2.0
    """How long a batch that is not full waits for more rows."""
    max_length: int = 0
    """Longest text in tokens, of longer ones the last are read; 0: the model's limit."""
    max_rows: int = 256
    """Rows of one request."""
    max_body: int = 8 * 2**20
    """Bytes of one request."""
    max_waiting: int = 4096
    """Rows that wait at most; beyond that requests are told to come back (503)."""
    body_timeout: float = 30.0
    """Seconds in which a request's body must have arrived."""
    grace: float = 60.0
    """Seconds that a stop by SIGTERM or SIGINT gives the requests in flight."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_rows", "max_body", "max_waiting", "body_timeout", "grace"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.port < 2**16 or self.wait_ms < 0:
            raise ValueError(f"port={self.port} must be from 0 to 65535, wait_ms={self.wait_ms} not negative")
        if self.max_rows > self.max_waiting:
            raise ValueError(f"max_rows={self.max_rows} must not be above max_waiting={self.max_waiting}")
        if self.token_env and self.token_file:
            raise ValueError("give token_env or token_file, not both")
