"""Connections of the reward server: how many there are, how long a request's head may take, and errors in JSON.

uvicorn has neither limit: its own for connections answers 503 in plain text and closes none, and half a request's head
is waited for without end. hypercorn has no limit on connections, granian none that a half head counts for.
"""

import asyncio
import dataclasses
import json
import resource
import socket
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED = 192  # files that are no connections: of Python, JAX, the model, and as many as may be accepted at once
ACCEPTED = 64  # connections that are accepted at once
BACKLOG = 1024  # connections that the system holds until they are accepted; one too many is tried again after 1, 3, 7 s
# A client that is answered before it has said all may go on for so long: closed at once, the answer would be lost.
LINGER_SECONDS, LINGER_BYTES, MOST_LINGER = 2.0, 2**20, 32


@dataclasses.dataclass(eq=False)
class Limits:
    """What the connections of one server share."""

    connections: int
    head_timeout: float
    # Those that wait for their clients, longest first: with no request answered so far, and with one.
    new: "dict[Connection, None]" = dataclasses.field(default_factory=dict)
    known: "dict[Connection, None]" = dataclasses.field(default_factory=dict)
    ending: "dict[Connection, None]" = dataclasses.field(default_factory=dict)  # those that are answered and linger


def count_possible(wanted: int) -> int:
    """How many connections there may be: `wanted`, or fewer where this process may not open as many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(files - RESERVED, 8))


def limited_connection(connections: int, head_timeout: float) -> type[H11Protocol]:
    """Make the class of connections for a server with these limits."""
    return type("LimitedConnection", (Connection,), {"limits": Limits(connections, head_timeout)})


class Server(uvicorn.Server):
    """A server for which the system holds BACKLOG connections (asyncio accepts as many at once as it listens for)."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)


class Lingering:
    """A transport whose `close` lets the connection linger."""

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self._transport = transport
        self.connection: Connection | None = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.connection is None or self.connection.discarded is not None or self._transport.is_closing()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.end(self._transport)


class Connection(H11Protocol):
    """A connection of HTTP/1.1.

    It waits for its client until a request has come whole, and again when it is answered. A connection too many takes
    the place of the one that has waited longest, rather of one that has never been answered; it is refused (503) only
    where all others are being answered.
    """

    limits: ClassVar[Limits]
    deadline: asyncio.TimerHandle | None = None
    discarded: int | None = None  # bytes, once it lingers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Lingering(transport, self))  # type: ignore[arg-type]
        if len(self.connections) - len(self.limits.ending) > self.limits.connections:
            oldest = next(iter(self.limits.new or self.limits.known), None)
            if oldest is None:
                self.refuse(503, "too many connections; come back later", retry=True)
                return
            oldest.give_up()
        self._look()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.discarded is not None:
            self.discarded += len(data)
            if self.discarded > LINGER_BYTES:
                self.transport.abort()
        elif not self.transport.is_closing():
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
        self.transport.connection = None  # type: ignore[attr-defined]
        if self.cycle is not None:  # both refer to each other until the garbage is collected: hundreds of megabytes
            self.cycle.body = bytearray()

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
        self.linger()

    def end(self, transport: asyncio.Transport) -> None:
        """Close, at once unless the client has more to say."""
        if self.discarded is None and self.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            self.linger()
        else:
            transport.close()

    def linger(self) -> None:
        """Say no more, discard what the client still says, and close when it has left or LINGER_SECONDS are over."""
        if not self.transport.is_closing():
            self._leave()
            self.discarded = 0
            self.limits.ending[self] = None
            if len(self.limits.ending) > MOST_LINGER:
                next(iter(self.limits.ending)).give_up()
            self.deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)
            self.transport.write_eof()
            if self.cycle is not None:
                self.cycle.body = bytearray()
            self.flow.resume_reading()

    def shutdown(self) -> None:
        if self.discarded is not None:
            self.transport.close()
        else:
            super().shutdown()

    def give_up(self) -> None:
        """Close for a newer connection: its client has not sent a whole request, or lingers."""
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
        self.limits.ending.pop(self, None)
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
