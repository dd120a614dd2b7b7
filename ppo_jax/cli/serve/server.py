"""`ppo-jax serve-reward DIR`: a reward model over HTTP, by both protocols of docs/rewards.md.

    request --texts, cut--> queue --batch--> one thread: tokens, scores on the device --> response

Requests that wait at the same time are scored together, padded to few lengths and numbers of rows, so that few programs
are compiled. A score does not depend on what it was batched with.
"""

import asyncio
import contextlib
import hmac
import math
import os
import signal
import socket
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ppo_jax.cli.serve.connections import ACCEPTED, BACKLOG, Server, count_possible, limited_connection
from ppo_jax.cli.serve.service import Service
from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.data.disk import read_bytes
from ppo_jax.rewards.loading import Scorer, load_scorer

OPEN_PATHS = ("/health",)  # need no token
STOPPING = 5.0  # seconds that the last batch has at the end, when nobody waits for its answer any more


def serve(settings: ServeSettings) -> None:
    """Listen until SIGTERM or SIGINT, then finish what is in flight."""
    token = read_token(settings)
    listening = _listen(settings.host, settings.port)
    sizes = sorted({1, min(8, settings.batch_size), settings.batch_size})
    scorer = load_scorer(
        settings.reward, settings.model, settings.max_length, sizes, settings.at, settings.batch_tokens
    )
    if scorer.reading.notice:
        print(scorer.reading.notice, flush=True)
    scorer.score(["a"], ["b"])  # loads the device; every other program is compiled when it is first needed
    app = make_app(scorer, settings, token)
    server = make_server(app, settings)
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    if not token and not _is_loopback(host):
        print(
            f"anybody who reaches {host} can use this server: no token is set (--token-env, --token-file)", flush=True
        )
    # uvicorn stops gracefully, then sends itself the signal once more, for the handlers that were there before: these.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    listening.listen(BACKLOG)
    print(f"serving {scorer.name} at http://{where}:{port}/v1/score and /v1/score/evaluation", flush=True)
    server.run(sockets=[listening])
    print("stopped", flush=True)


def make_server(app: ASGIApp, settings: ServeSettings) -> uvicorn.Server:
    """Make the server of an application, with limits on what clients may hold."""
    connections = count_possible(settings.max_connections)
    if connections < settings.max_connections:
        print(
            f"at most {connections} connections stand at once, since this process may not open more files (ulimit -n)"
        )
    config = uvicorn.Config(
        app,
        http=limited_connection(connections, settings.head_timeout),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="error",  # whoever sends rubbish would fill the log with warnings
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=ACCEPTED,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=math.ceil(settings.grace),
    )
    return Server(config)


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
    app.router.redirect_slashes = False  # the new address would be at the host that the client names
    return _guarded(app, token) if token else app


def read_token(settings: ServeSettings) -> str:
    """Read the bearer token, "" for none. Raise ValueError where one is asked for and is not there."""
    if settings.token_env:
        token = os.environ.get(settings.token_env, "").strip()
        if not token:
            raise ValueError(f"the environment variable {settings.token_env} (token_env) is not set")
    elif settings.token_file:
        try:
            token = read_bytes(settings.token_file.expanduser()).decode().strip()
        except (OSError, ValueError) as error:
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
