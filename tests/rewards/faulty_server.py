"""A real reward service on 127.0.0.1 that fails on demand: each request takes the next fault, if there is one."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def score(text: str) -> float:
    """What the service says of a text: never a whole number, and never 0."""
    return len(text) + sum(map(ord, text)) / 1000 + 0.125


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked = json.loads(body)
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), self.asked))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        with contextlib.suppress(ConnectionError):
            fault(self)

    def scores(self) -> list[float]:
        texts = self.asked.get("messages") or [s["prompt"] + s["response"] for s in self.asked["samples"]]
        return [score(text) for text in texts]

    def entries(self) -> list[Any]:
        """The right answer, in the protocol of the path."""
        if self.path.endswith("/score/evaluation"):
            return list(self.scores())
        return [{"score": value} for value in self.scores()]

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def say(self, scores: Any) -> None:
        self.answer(json.dumps({"scores": scores}).encode())

    def log_message(self, *_: Any) -> None:
        pass


Fault = Callable[[Handler], None]


def works(handler: Handler) -> None:
    handler.say(handler.entries())


def status(code: int, body: str = '{"detail": "out of luck"}', **headers: str) -> Fault:
    return lambda handler: handler.answer(body.encode(), code, **headers)


def says(scores: Any) -> Fault:
    """An answer with these scores, whatever was asked."""
    return lambda handler: handler.say(scores)


def raw(body: str, kind: str = "application/json") -> Fault:
    return lambda handler: handler.answer(body.encode(), Content_Type=kind)


def entry(index: int, value: Any) -> Fault:
    """The right answer but for one entry."""

    def fault(handler: Handler) -> None:
        entries = handler.entries()
        entries[index] = value
        handler.say(entries)

    return fault


def reset(handler: Handler) -> None:
    """The connection is torn down before a word of answer (RST, not FIN)."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def truncated(handler: Handler) -> None:
    """Half of the body that was announced, then the end."""
    body = json.dumps({"scores": handler.entries()}).encode()
    handler.answer(body[: len(body) // 2], length=len(body))
    handler.close_connection = True


def hangs(handler: Handler) -> None:
    """Nothing is ever said."""
    handler.server.over.wait()
    handler.close_connection = True


def drips(handler: Handler) -> None:
    """The right answer, a byte now and then: no silence is long, and the end never comes."""
    handler.answer(b"", length=10**6)
    for byte in b" " * 10**6:
        if handler.server.over.wait(0.02):
            break
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
    handler.close_connection = True


def drips_headers(handler: Handler) -> None:
    """Not even the headers come to an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()
    handler.close_connection = True


def floods(handler: Handler) -> None:
    """An answer without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not handler.server.over.is_set():
        handler.wfile.write(b" " * 65536)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0, always: Fault = works, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), Handler)
        self.faults: list[Fault] = []
        self.always = always
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/score"

    @property
    def theirs(self) -> str:
        return f"{self.url}/evaluation"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is what the tests are about."""


@contextlib.contextmanager
def serving(port: int = 0, always: Fault = works, host: str = "127.0.0.1") -> Iterator[Server]:
    """A service for the length of the block; afterwards its port is closed and the next connection refused."""
    server = Server(port, always, host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
