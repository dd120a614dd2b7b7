"""`ppo-jax serve-reward DIR`: a reward model over HTTP, by both protocols of docs/rewards.md.

    request --tokenise--> queue --batch--> one thread on the device --scores--> response

Requests that wait at the same time are scored together, padded to few lengths and numbers of rows, so that few programs
are compiled. A score does not depend on what it was batched with.
"""

import asyncio
import contextlib
import hmac
import logging
import math
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ppo_jax.cli.serve.batching import Batcher, Full
from ppo_jax.cli.serve.protocol import Refused, entry, read_json, read_messages, read_samples
from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.rewards.loading import Scorer, load_scorer
from ppo_jax.rewards.scores import to_scores

Handle = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
OPEN_PATHS = ("/health",)  # need no token
STOPPING = 5.0  # seconds that the last batch has at the end, when nobody waits for its answer any more
LOG = logging.getLogger(__name__)


def serve(settings: ServeSettings) -> None:
    """Listen until SIGTERM or SIGINT, then finish what is in flight."""
    token = read_token(settings)
    listening = _listen(settings.host, settings.port)
    sizes = sorted({1, min(8, settings.batch_size), settings.batch_size})
    scorer = load_scorer(settings.reward, settings.model, settings.max_length, sizes, settings.at)
    if scorer.reading.notice:
        print(scorer.reading.notice, flush=True)
    scorer.score(["a"], ["b"])  # loads the device; every other program is compiled when it is first needed
    app = make_app(scorer, settings, token)
    config = uvicorn.Config(
        app,
        http="h11",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=math.ceil(settings.grace),
    )
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    if not token and not _is_loopback(host):
        print(
            f"anybody who reaches {host} can use this server: no token is set (--token-env, --token-file)", flush=True
        )
    server = uvicorn.Server(config)
    # uvicorn stops gracefully, then sends itself the signal once more, for the handlers that were there before: these.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    listening.listen(2048)
    print(f"serving {scorer.name} at http://{where}:{port}/v1/score and /v1/score/evaluation", flush=True)
    server.run(sockets=[listening])
    print("stopped", flush=True)


class Service:
    """The endpoints: what they answer, and what they count."""

    def __init__(self, scorer: Scorer, settings: ServeSettings) -> None:
        self.scorer, self.settings = scorer, settings
        wait, most = settings.wait_ms / 1000, settings.max_waiting
        self.batcher = Batcher(scorer.score_rows, settings.batch_size, wait, most)
        self.count: Counter[str] = Counter()
        self.seconds, self.in_flight, self.started = 0.0, 0, time.monotonic()
        self._tokenising = asyncio.Lock()  # tokenizers are not made for several threads at once

    async def score(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request in our protocol."""
        samples = read_samples(body, self.settings.max_rows)
        prompts, responses = ([sample[side] for sample in samples] for side in ("prompt", "response"))
        rows = await self._tokenise(self.scorer.encode, prompts, responses)
        scores = await self._scores(rows)
        return {"scores": [entry(row, score) for row, score in zip(rows, scores, strict=True)]}

    async def evaluation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request in LLaMA-Factory's protocol."""
        name, texts, max_length = read_messages(body, self.settings.max_rows)
        scores = await self._scores(await self._tokenise(self.scorer.encode_texts, texts, max_length))
        return {"id": f"scoreval-{uuid.uuid4().hex}", "object": "score.evaluation", "model": name, "scores": scores}

    async def health(self, request: Request) -> Response:
        """Say that the server lives, and what it serves."""
        return JSONResponse({"status": "ok", "model": self.scorer.name, "max_length": self.scorer.max_length})

    async def metrics(self, request: Request) -> Response:
        """Write counters and gauges, a line each, as Prometheus reads them."""
        values = {
            **self.count,
            "ppo_jax_batches_total": self.batcher.batches,
            "ppo_jax_requests_in_flight": self.in_flight,
            "ppo_jax_request_seconds_total": round(self.seconds, 6),
            "ppo_jax_rows_waiting": self.batcher.waiting,
            "ppo_jax_uptime_seconds": round(time.monotonic() - self.started, 3),
        }
        return PlainTextResponse("".join(f"{name} {value}\n" for name, value in sorted(values.items())))

    def endpoint(self, handle: Handle) -> Callable[[Request], Awaitable[Response]]:
        """Make a POST endpoint: JSON in, JSON or an error out, counted."""

        async def answer(request: Request) -> Response:
            self.count["ppo_jax_requests_total"] += 1
            self.in_flight += 1
            began = time.monotonic()
            try:
                body = await read_json(request, self.settings.max_body, self.settings.body_timeout)
                response: Response = JSONResponse(await handle(body))
            except Refused as error:
                response = JSONResponse({"detail": error.detail}, error.status, error.headers)
            except Exception as error:  # a defect of ours, or of a tokenizer: one request fails, by name and as JSON
                LOG.exception("a request failed")
                response = JSONResponse({"detail": f"the request failed: {type(error).__name__}"}, 500)
            finally:
                self.in_flight -= 1
                self.seconds += time.monotonic() - began
            self.count[f'ppo_jax_responses_total{{status="{response.status_code}"}}'] += 1
            return response

        return answer

    async def _tokenise(self, encode: Callable[..., list[list[int]]], *args: Any) -> list[list[int]]:
        async with self._tokenising:
            return await asyncio.to_thread(encode, *args)

    async def _scores(self, rows: list[list[int]]) -> list[float | None]:
        """Compute scores in order; None for a row that has none."""
        self.count["ppo_jax_rows_total"] += len(rows)
        try:
            scores = await asyncio.wrap_future(self.batcher.submit(rows))
        except Full as error:
            raise Refused(503, str(error), {"Retry-After": "1"}) from error
        except Exception as error:  # whatever the device or the model raised: this request failed, the server did not
            raise Refused(500, f"scoring failed: {type(error).__name__}: {error}") from error
        judged = to_scores(scores)
        self.count["ppo_jax_rows_failed_total"] += int(np.sum(~judged.valid))
        return [float(score) if good else None for score, good in zip(judged.reward, judged.valid, strict=True)]


def make_app(scorer: Scorer, settings: ServeSettings, token: str = "") -> ASGIApp:
    """Make the ASGI application; its lifespan runs the thread that scores."""
    service = Service(scorer, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.batcher.stop, min(STOPPING, settings.grace))

    async def as_json(request: Request, error: Exception) -> Response:  # 404 and 405 of the router
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    routes = [
        Route("/v1/score", service.endpoint(service.score), methods=["POST"]),
        Route("/v1/score/evaluation", service.endpoint(service.evaluation), methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: as_json, 405: as_json})
    return _guarded(app, token) if token else app


def read_token(settings: ServeSettings) -> str:
    """Read the bearer token, "" for none. Raise ValueError where one is asked for and is not there."""
    if settings.token_env:
        token = os.environ.get(settings.token_env, "").strip()
        if not token:
            raise ValueError(f"the environment variable {settings.token_env} (token_env) is not set")
    elif settings.token_file:
        try:
            token = settings.token_file.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the token in {settings.token_file}: {error}") from error
        if not token:
            raise ValueError(f"{settings.token_file} (token_file) is empty")
    else:
        return ""
    return token


def _guarded(app: ASGIApp, token: str) -> ASGIApp:
    """Put the application behind `Authorization: Bearer TOKEN`; compared in constant time."""
    wanted = token.encode()

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, found = given.partition(b" ")
            if not (hmac.compare_digest(found.strip(), wanted) and kind.lower() == b"bearer"):
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse({"detail": "token missing or wrong"}, 401, headers)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def _listen(host: str, port: int) -> socket.socket:
    """Open a listening socket before the model is loaded: a port that is taken is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    return found


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
