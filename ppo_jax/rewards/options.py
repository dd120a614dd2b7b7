"""Where PPO's reward comes from, as a user says it: `--reward SOURCE [SOURCE ...]`.

    runs/reward                        a reward model: a LoRA adapter on the policy's base, or a model of its own
    http://127.0.0.1:8000/v1/score     a service (docs/rewards.md); env:NAME, file:PATH: its URL is there
    package.module:function            any Python function (prompts, responses, metadata) -> numbers
    rewards.py:function                the same, in a file

Several are summed with weights. All that is of the environment (variables, files, imports) is read here.
"""

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from ppo_jax.data.disk import read_bytes
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.addresses import LOOPBACK, is_url, read_source
from ppo_jax.rewards.api import APIConfig, api_reward
from ppo_jax.rewards.base import HostReward, Reward, SpecialTokens
from ppo_jax.rewards.combine import scaled, sum_rewards
from ppo_jax.rewards.failures import FailureLog, Report
from ppo_jax.rewards.function import FunctionConfig, function_reward
from ppo_jax.rewards.importing import load_function
from ppo_jax.rewards.loading import find_reward, load_reward
from ppo_jax.rewards.protocols import check_url
from ppo_jax.rewards.reading import At
from ppo_jax.types import Scores

FORMS = (
    "a reward model's directory, http://HOST:PORT/PATH (env:NAME or file:PATH where the URL is there), "
    "package.module:function or file.py:function"
)


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """How the sources of the reward are called and summed."""

    weights: tuple[float, ...] = ()
    """A sum weighs each source by one of these, by default by 1. Each is logged before its weight, as reward/NAME."""
    token_env: str = ""
    """This environment variable holds the bearer token of the service; the token itself is never saved or logged."""
    token_file: Path | None = None
    """This file holds the bearer token instead."""
    api: APIConfig = APIConfig()
    """These options say how HTTP services are called."""
    function: FunctionConfig = FunctionConfig()
    """These options say how Python functions are called."""
    at: At = "auto"
    """A reward model is read there; auto: ours at the last token of the text, others where their template closes it."""
    special_tokens: SpecialTokens = "drop"
    """A response has its special tokens (<think>) where a reward reads its text: keep; or is read without: drop."""


def choose_reward(sources: Sequence[str], options: RewardOptions, model: Model, stop_ids: tuple[int, ...]) -> Reward:
    """The reward that a user named.

    Reward models whose tokens are the policy's run on the device, on the tokens that were sampled; everything else
    reads text, on the host. A sum of both kinds has both functions.

    Args:
      model: the policy's base.
      stop_ids: what ends a response (`Sampling.stop_ids`).

    Raises:
      ValueError or FileNotFoundError: a source is none of these or cannot be used, or the weights or the token do not
        fit; the message says which and what to do.
    """
    weights = _weights(sources, options.weights)
    sources = [read_source(source) for source in sources]
    identities = [_identity(source) for source in sources]
    failures, token = FailureLog(), read_token(options)
    urls = [source for source in sources if kind_of(source) == "url"]
    notices = _check_token(urls, token)
    names = part_names(sources)  # they differ, so none is lost
    found = [_load(source, options, token, model, stop_ids, failures) for source in sources]
    chosen, weight = found[0], weights[0]
    if len(found) == 1 and chosen.device is not None:
        identities = ["a reward model"]  # which one its arrays tell
        chosen = dataclasses.replace(chosen, device=chosen.device if weight == 1 else scaled(chosen.device, weight))
    elif len(found) > 1 or weight != 1:
        chosen = sum_rewards(dict(zip(names, zip(found, weights, strict=True), strict=True)))
    special = options.special_tokens
    if special == "keep" and chosen.host is None:
        raise ValueError("--scoring.special-tokens keep has no effect: all of --reward reads tokens, none reads text")
    notices += tuple(notice for one in found for notice in one.notices)
    said = [f", {one.name}" if one.name else "" for one in found]
    name = " + ".join(f"{w:g} x {one}{more}" for w, one, more in zip(weights, identities, said, strict=True))
    metadata = found[0].metadata if len(found) == 1 else {}
    chosen = dataclasses.replace(chosen, name=name, failures=failures, special_tokens=special)
    return dataclasses.replace(chosen, notices=notices, metadata=metadata)


def kind_of(source: str) -> Literal["url", "function", "directory"]:
    """Which of the forms a source has."""
    if is_url(source):
        return "url"
    if ":" in source and not Path(source).expanduser().exists():
        return "function"
    return "directory"


def part_names(sources: Sequence[str]) -> list[str]:
    """A short name for each source, all different: folder, function, or "service"."""
    names: list[str] = []
    for source in sources:
        kind = kind_of(source)
        if kind == "url":
            name = "service"  # its host is in no file of the run
        elif kind == "function":
            name = source.rpartition(":")[2]
        else:
            path = Path(source).expanduser().resolve()
            name = path.parent.parent.name if path.parts[-2:] == ("export", "reward") else path.name
        numbered = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(one for one in numbered if one not in names))
    return names


def read_token(options: RewardOptions) -> str | None:
    """The bearer token that the options name, or None. Errors name the variable or file, never what it holds."""
    if options.token_env and options.token_file is not None:
        raise ValueError("--scoring.token-env and --scoring.token-file exclude each other: choose one")
    if options.token_env:
        token = os.environ.get(options.token_env, "").strip()
        if not token:
            raise ValueError(f"--scoring.token-env: the environment variable {options.token_env} is not set, or empty")
        return token
    if options.token_file is None:
        return None
    path = options.token_file.expanduser()
    try:
        token = read_bytes(path).decode().strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"--scoring.token-file: {path} is not a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--scoring.token-file: {path} cannot be read: {type(error).__name__}") from None
    if not token:
        raise ValueError(f"--scoring.token-file: {path} is empty")
    return token


def _weights(sources: Sequence[str], weights: Sequence[float]) -> list[float]:
    if not sources:
        raise ValueError(f"no reward: give {FORMS}")
    if len(weights) not in (0, len(sources)):
        raise ValueError(f"--scoring.weights has {len(weights)} numbers for {len(sources)} rewards: give one for each")
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"--scoring.weights: {weight} must be finite")
    return list(weights) or [1.0] * len(sources)


def _identity(source: str) -> str:
    """What stays the same when a run is resumed: of a model its weights, wherever they lie by then."""
    kind = kind_of(source)
    if kind != "directory":
        return "a service" if kind == "url" else source
    where = _explained(source, lambda: find_reward(source))
    arrays = sorted(where.glob("*.safetensors")) or sorted(where.glob("*.bin"))
    arrays = [path for path in arrays if path.is_file()]
    digest = hashlib.sha256()
    for path in arrays:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"model {digest.hexdigest()[:16]}"


def _check_token(urls: Sequence[str], token: str | None) -> tuple[str, ...]:
    """Notices; ValueError for a token that nobody, or more than one service, would get."""
    hosts = {urlsplit(check_url(url))[:2] for url in urls}
    if token is None:
        return ()
    if not hosts:
        raise ValueError("a bearer token is given, but no --reward is a URL")
    if len(hosts) > 1:
        raise ValueError("a bearer token belongs to one service, but the URLs of --reward name several")
    ((scheme, _),) = hosts
    host = urlsplit(urls[0]).hostname or ""
    if scheme == "http" and host not in (*LOOPBACK, "::1"):
        return ("the bearer token goes to the service unencrypted, since the URL begins with http://",)
    return ()


def _load(
    source: str, options: RewardOptions, token: str | None, model: Model, stop_ids: tuple[int, ...], report: FailureLog
) -> Reward:
    """One source, without its weight."""
    kind = kind_of(source)
    if kind == "url":
        return Reward(host=api_reward(source, options.api, report, token))
    if kind == "function":
        function = load_function(source, options.function.per_sample)
        return Reward(host=function_reward(function, options.function, report))
    found: Reward = _explained(source, lambda: load_reward(source, model, stop_ids, at=options.at))
    return found if found.host is None else dataclasses.replace(found, host=_reported(found.host, source, report))


def _reported(reward: HostReward, source: str, report: Report) -> HostReward:
    """The same reward; rows that it could not score are told of."""

    def told(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        scores = reward(prompts, responses, metadata)
        report(f"the reward model {source} gave no finite score", int(np.sum(~np.asarray(scores.valid, bool))), "")
        return scores

    return told


def _explained(source: str, load: Callable[[], Any]) -> Any:
    """`load()`; where nothing is at `source` the error also says what else a source may be."""
    path = Path(source).expanduser()
    if path.is_file():
        hint = f"; name the function in it, {source}:FUNCTION" if path.suffix == ".py" else ""
        raise ValueError(f"--reward {source} is a file{hint or f'; give {FORMS}'}")
    try:
        return load()
    except FileNotFoundError as error:
        if path.exists():
            raise
        raise FileNotFoundError(f"--reward: {error}. It takes {FORMS}") from error
