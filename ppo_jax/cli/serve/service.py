"""The endpoints of the reward server: what they answer, and what they count."""

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ppo_jax.cli.serve.batching import Answer, Batcher, Full
from ppo_jax.cli.serve.protocol import AGAIN, Refused, entry, read_json, read_messages, read_samples
from ppo_jax.cli.serve.room import Held, Room
from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.rewards.loading import Scorer
from ppo_jax.rewards.scores import to_scores

CHARACTERS = 4  # of a token, about
KEPT = 256  # answers whose clients left before they came; their retries find them
LOG = logging.getLogger(__name__)


class Text(NamedTuple):
    """A text to be scored."""

    prompt: str
    response: str
    max_length: int | None = None


def count_characters(text: Text) -> int:
    """Count the characters of both sides."""
    return len(text.prompt) + len(text.response)


Ask = Callable[[Sequence[Text]], Awaitable[list[float | str]]]  # texts -> their scores, or why there is none
Handle = Callable[[dict[str, Any], Ask], Awaitable[dict[str, Any]]]


class Unreadable(Exception):
    """The tokenizer raised."""


class Service:
    """The endpoints: what they answer, and what they count.

    A request waits as texts, of which no more is kept than can matter; they are tokenised when their turn comes. Those
    of a client that left are passed over, and a request for the same texts waits for the first one's scores.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings) -> None:
        self.scorer, self.settings = scorer, settings
        wait, most = settings.wait_ms / 1000, settings.max_waiting
        total = CHARACTERS * settings.batch_tokens
        self.batcher = Batcher(self._judge, settings.batch_size, wait, most, count_characters, total)
        self.room = Room(settings.max_waiting_bytes, self.batcher.drop_abandoned)
        self.count: Counter[str] = Counter()
        self.seconds, self.in_flight, self.started = 0.0, 0, time.monotonic()
        self._answers: dict[bytes, tuple[Answer, asyncio.Future[list[float | str]]]] = {}

    async def score(self, body: dict[str, Any], ask: Ask) -> dict[str, Any]:
        """Answer a request in our protocol."""
        samples = read_samples(body, self.settings.max_rows)
        scores = await ask([Text(*self.scorer.cut((sample["prompt"], sample["response"]))) for sample in samples])
        return {"scores": [entry(score) for score in scores]}

    async def evaluation(self, body: dict[str, Any], ask: Ask) -> dict[str, Any]:
        """Answer a request in LLaMA-Factory's protocol."""
        name, texts, max_length = read_messages(body, self.settings.max_rows)
        scores = await ask([Text(*self.scorer.cut(("", text)), max_length) for text in texts])
        numbers = [None if isinstance(score, str) else score for score in scores]
        return {"id": f"scoreval-{uuid.uuid4().hex}", "object": "score.evaluation", "model": name, "scores": numbers}

    async def health(self, request: Request) -> Response:
        """Say that the server lives, and what it serves."""
        return JSONResponse({"status": "ok", "model": self.scorer.name, "max_length": self.scorer.max_length})

    async def metrics(self, request: Request) -> Response:
        """Write counters and gauges, a line each, as Prometheus reads them."""
        values = {
            **self.count,
            "ppo_jax_batches_total": self.batcher.batches,
            "ppo_jax_bytes_waiting": self.room.used,
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
                response: Response = JSONResponse(await self._handle(request, handle))
            except Refused as error:
                response = JSONResponse({"detail": error.detail}, error.status, error.headers)
            except asyncio.CancelledError:  # by the server, which gave the requests in flight some time to end
                response = JSONResponse({"detail": "the server is shutting down"}, 503, AGAIN)
            except Exception as error:  # a defect of ours, or of a tokenizer: one request fails, by name and as JSON
                LOG.exception("a request failed")
                response = JSONResponse({"detail": f"the request failed: {type(error).__name__}"}, 500)
            finally:
                self.in_flight -= 1
                self.seconds += time.monotonic() - began
            self.count[f'ppo_jax_responses_total{{status="{response.status_code}"}}'] += 1
            return response

        return answer

    async def _handle(self, request: Request, handle: Handle) -> dict[str, Any]:
        settings = self.settings
        with Held(self.room) as held:
            body = await read_json(request, settings.max_body, settings.body_timeout, held)

            async def ask(texts: Sequence[Text]) -> list[float | str]:
                body.clear()  # what was cut off, and metadata, is kept no longer
                return await self._scores(texts, request, held)

            return await handle(body, ask)

    async def _scores(self, texts: Sequence[Text], request: Request, held: Held) -> list[float | str]:
        """Wait for the texts' scores, in order, or until the client leaves."""
        held.keep(sum(map(count_characters, texts)))
        self.count["ppo_jax_rows_total"] += len(texts)
        answer, scores = self._find_answer(texts, held)
        gone = asyncio.ensure_future(request.receive())  # the body was read: only the disconnect is left to come
        either: set[asyncio.Future[Any]] = {scores, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            self.batcher.leave(answer)
        if not scores.done():
            raise Refused(400, "the client went away")
        try:
            found = scores.result()
        except Full as error:
            raise Refused(503, str(error), AGAIN) from error
        except Unreadable as error:
            assert error.__cause__ is not None
            raise error.__cause__ from None
        except Exception as error:  # whatever the device or the model raised: this request failed, the server did not
            raise Refused(500, f"scoring failed: {type(error).__name__}: {error}") from error
        self.count["ppo_jax_rows_failed_total"] += sum(isinstance(score, str) for score in found)
        return found

    def _find_answer(self, texts: Sequence[Text], held: Held) -> tuple[Answer, "asyncio.Future[list[float | str]]"]:
        """Find the answer that comes to these texts already, or ask for one."""
        key = hashlib.blake2b(repr(list(texts)).encode(), digest_size=32).digest()
        if key in self._answers and self.batcher.join(self._answers[key][0]):
            self.count["ppo_jax_requests_joined_total"] += 1
            return self._answers[key]
        try:
            answer = self.batcher.submit(texts)
        except Full as error:
            raise Refused(503, str(error), AGAIN) from error
        answer.add_done_callback(held.hand_over())
        scores = asyncio.wrap_future(answer)
        found = self._answers[key] = answer, scores

        def keep_or_forget(_: object) -> None:
            if scores.cancelled() or scores.exception() is not None or answer.clients:
                if self._answers.get(key) is found:
                    del self._answers[key]
            else:
                left = [key for key, (_, scores) in self._answers.items() if scores.done()]
                for old in left[: max(len(left) - KEPT, 0)]:
                    del self._answers[old]

        scores.add_done_callback(keep_or_forget)
        return found

    def _judge(self, texts: Sequence[Text]) -> list[float | str]:
        """Score texts, in the thread that scores; a text where a text has no score, for why."""
        try:
            rows = self.scorer.encode_sides([text[:2] for text in texts], [text.max_length for text in texts])
        except Exception as error:
            raise Unreadable from error
        judged = to_scores(self.scorer.score_rows(rows))
        self.count["ppo_jax_rows_scored_total"] += len(rows)
        return [
            float(score) if good else "the score is not finite" if row else "the text has no tokens"
            for row, score, good in zip(rows, judged.reward, judged.valid, strict=True)
        ]
