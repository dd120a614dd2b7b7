"""Connections of the reward server: how many there are, how long a request's head may take, and errors in JSON.

uvicorn has neither limit: its own for connections answers 503 in plain text and closes none, and half a request's head
is waited for without end. hypercorn has no limit on connections, granian none that a half head counts for.
"""

import asyncio
import dataclasses
import json
import resource
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED = 192  # files that are no connections: of Python, JAX, the model, and as many as may be accepted at once
BACKLOG = 64  # connections that the system holds until they are accepted


@dataclasses.dataclass(eq=False)
class Limits:
    """What the connections of one server share."""

    connections: int
    head_timeout: float
    # Those that wait for their clients, longest first: with no request answered so far, and with one.
    new: "dict[Connection, None]" = dataclasses.field(default_factory=dict)
    known: "dict[Connection, None]" = dataclasses.field(default_factory=dict)


def count_possible(wanted: int) -> int:
    """How many connections there may be: `wanted`, or fewer where this process may not open as many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(files - RESERVED, 8))


def limited_connection(connections: int, head_timeout: float) -> type[H11Protocol]:
    """Make the class of connections for a server with these limits."""
    return type("LimitedConnection", (Connection,), {"limits": Limits(connections, head_timeout)})


class Connection(H11Protocol):
    """A connection of HTTP/1.1.

    It waits for its client until a request has come whole, and again when it is answered. A connection too many takes
    the place of the one that has waited longest, rather of one that has never been answered; it is refused (503) only
    where all others are being answered.
    """

    limits: ClassVar[Limits]
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            oldest = next(iter(self.limits.new or self.limits.known), None)
            if oldest is None:
                self.refuse(503, "too many connections; come back later", retry=True)
                return
            oldest.give_up()
        self._look()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._look()
            if self.cycle is None or self.cycle.response_complete:
                self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is not HTTP/1.1")

    def refuse(self, status: int, detail: str, retry: bool = False) -> None:
        """Answer with an error where an answer can still begin, and close."""
        self._leave()
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever answers the request has nobody to tell
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"detail": detail}).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            answer = h11.Response(status_code=status, headers=headers + [("Retry-After", "1")] * retry)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def give_up(self) -> None:
        """Close for a newer connection: its client has not sent a whole request."""
        self._leave()
        self.transport.abort()

    def _look(self) -> None:
        """See whether the client or the server is waited for."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing() or (answering and not self.cycle.more_body):
            self._leave()
        else:
            (self.limits.new if self.cycle is None or answering else self.limits.known).setdefault(self)
            if answering and self.deadline is not None:  # the body has a deadline of its own (`read_json`)
                self.deadline.cancel()
                self.deadline = None

    def _await_head(self) -> None:
        if self.deadline is None and not self.transport.is_closing():
            self.deadline = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self.refuse(408, f"the request's head did not arrive within {self.limits.head_timeout} s")
        else:
            self.give_up()

    def _leave(self) -> None:
        self.limits.new.pop(self, None)
        self.limits.known.pop(self, None)
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
