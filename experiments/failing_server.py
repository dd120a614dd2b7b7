"""A reward server that fails in several ways, for `experiments.soak`: good words less bad ones, over HTTP."""

import json
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from experiments import smoke

Mode = Literal["works", "503", "drops connections", "is slow", "is down"]
MODES: tuple[Mode, ...] = ("503", "drops connections", "is slow", "is down")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is nothing to print."""


class RewardServer:
    """Good words less bad ones, over HTTP; `mode` says how it fails."""

    def __init__(self) -> None:
        self.mode: Mode = "works"
        self.takes = 0.0  # seconds, for a score
        self.failures: Counter[str] = Counter()
        self.port = 0

    def __enter__(self) -> "RewardServer":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    def fail(self, mode: Mode, seconds: float) -> None:
        """Fails for a while."""
        self.mode = mode
        if mode == "is down":
            self._stop()
            self.failures[mode] += 1
        time.sleep(seconds)
        if mode == "is down":
            self._start()
        self.mode = "works"

    def _start(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with suppress(ConnectionError):
                    owner.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def _stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, in the mode of the moment."""
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        mode = self.mode
        if mode != "works":
            self.failures[mode] += 1
        if mode == "drops connections":
            handler.close_connection = True
            return
        if mode == "is slow":
            time.sleep(1.0)
        time.sleep(self.takes)
        failed = mode == "503"
        scores = [{"score": goodness(sample["response"])} for sample in asked["samples"]]
        body = json.dumps({"detail": "out of luck"} if failed else {"scores": scores}).encode()
        handler.send_response(503 if failed else 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


def goodness(text: str) -> float:
    words = text.split()
    return float(sum(word in smoke.GOOD for word in words) - sum(word in smoke.BAD for word in words))
