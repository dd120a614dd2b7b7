"""The reward server: real sockets, real processes. Scores as here, status codes, limits, load, and how it ends."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from experiments import serve_load
from ppo_jax.cli import main as cli
from ppo_jax.cli.serve.server import make_app, make_server, read_token
from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.rewards.loading import Scorer, load_scorer
from tests.data.tokenizer import make_tokenizer

ROWS = [("the film", " is lovely"), ("a", " very dull plot and a boring cast"), ("really", "")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serve_load.tiny_model(tmp_path_factory.mktemp("serve") / "reward")


# -- the process -------------------------------------------------------------------------------------------------------


def test_scores_over_http_are_the_local_ones_under_load_and_to_the_end(world: Path) -> None:
    """250 requests from 16 clients, none lost, none swapped, memory flat; then SIGTERM with requests in flight."""
    table = serve_load.texts(world, 60)
    assert len(table) > 50, "a swapped row would be seen"
    with serve_load.server(world, "--batch-size", "8", "--max-rows", "4000") as (url, process):
        assert url.startswith("http://127.0.0.1:")
        result = asyncio.run(serve_load.load(url, table, 250, 16, process.pid))
        assert (result.answered, result.failed, result.swapped, result.inexact) == (250, 0, 0, 0)
        assert result.rows > 500 and result.worst_error < 1e-5
        assert result.megabytes[-1] - result.megabytes[2] < 60, result.megabytes  # of these 40 for programs
        counts = metrics_of(url)
        assert counts['ppo_jax_responses_total{status="200"}'] == 250 and counts["ppo_jax_rows_total"] == result.rows
        assert counts["ppo_jax_batches_total"] < 250, "requests were batched"

        samples = [{"prompt": text.prompt, "response": text.response, "metadata": {}} for text in table] * 60
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/score", json={"samples": samples}, timeout=120))
        )
        asking.start()
        while metrics_of(url)["ppo_jax_rows_total"] < result.rows + len(samples):  # it is being scored
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking.join(120)
        assert process.wait(120) == 0 and process.stdout is not None and "stopped" in process.stdout.read()
    found = [entry["score"] for entry in answers[0].json()["scores"]]
    np.testing.assert_allclose(found, [text.score for text in table] * 60, atol=1e-5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def metrics_of(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_mistakes_of_the_user_are_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve-reward", "--reward", str(world), "--port", str(port)]) == cli.MISTAKE
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    assert cli.main(["serve-reward", "--reward", str(tmp_path), "--port", "0"]) == cli.MISTAKE
    assert "holds no reward model" in capsys.readouterr().err
    assert cli.main(["serve-reward", "--reward", str(world), "--token-env", "NO_SUCH_VARIABLE_HERE"]) == cli.MISTAKE
    assert "NO_SUCH_VARIABLE_HERE (token_env) is not set" in capsys.readouterr().err


# -- one server in a thread of this process for each setting -----------------------------------------------------------


@contextlib.contextmanager
def running(scorer: Scorer, token: str = "", **settings: object) -> Iterator[str]:
    made = ServeSettings(reward=Path("unused"), **settings)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    server = make_server(make_app(scorer, made, token), made)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def score_rows(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Stands in for a model where only the protocol matters: the sum of the ids; q gives NaN, z fails."""
    if any(27 in row for row in rows):
        raise RuntimeError("no z")
    return np.array([np.nan if 18 in row or not row else sum(row) for row in rows], np.float32)


@pytest.fixture(scope="module")
def plain() -> Scorer:
    return Scorer("plain", make_tokenizer(), [], 20, score_rows, {})


@pytest.fixture(scope="module")
def url(plain: Scorer) -> Iterator[str]:
    with running(plain, max_rows=4, max_body=2000) as url:
        yield url


def test_both_protocols_answer_as_the_model_does(world: Path) -> None:
    scorer = load_scorer(world, batch_sizes=(1, 4))
    prompts, responses = map(list, zip(*ROWS, strict=True))
    expected = scorer.score(prompts, responses)
    assert np.ptp(expected) > 0.1
    with running(scorer) as url:
        samples = [{"prompt": p, "response": r, "metadata": {"id": 7}} for p, r in ROWS]
        ours = httpx.post(f"{url}/v1/score", json={"model": "x", "samples": samples}).json()
        np.testing.assert_allclose([entry["score"] for entry in ours["scores"]], expected, atol=1e-5)
        messages = {"model": "mine", "messages": [p + r for p, r in ROWS]}
        theirs = httpx.post(f"{url}/v1/score/evaluation", json=messages).json()
        np.testing.assert_allclose(theirs["scores"], expected, atol=1e-5)
        assert theirs.keys() == {"id", "object", "model", "scores"}
        assert theirs["object"] == "score.evaluation" and theirs["model"] == "mine"
        assert theirs["id"].startswith("scoreval-") and len(theirs["id"]) == len("scoreval-") + 32
        health = httpx.get(f"{url}/health").json()
        assert health["status"] == "ok" and health["model"] == str(world)


def test_rows_fail_alone_and_by_name(url: str) -> None:
    """NaN and a text without tokens: null or an error for that row, never a number."""
    texts = ["ab", "q", "", "b"]
    samples = [{"prompt": text, "response": "", "metadata": {}} for text in texts]
    ours = httpx.post(f"{url}/v1/score", json={"samples": samples}).json()["scores"]
    assert ours == [
        {"score": 5},
        {"error": "the score is not finite"},
        {"error": "the text has no tokens"},
        {"score": 3},
    ]
    theirs = httpx.post(f"{url}/v1/score/evaluation", json={"model": "m", "messages": texts}).json()["scores"]
    assert theirs == [5, None, None, 3]
    assert metrics_of(url)["ppo_jax_rows_failed_total"] >= 4


def test_a_model_that_fails_is_a_500_and_the_server_lives_on(url: str) -> None:
    broken = httpx.post(f"{url}/v1/score/evaluation", json={"model": "m", "messages": ["z"]})
    assert broken.status_code == 500 and broken.json()["detail"] == "scoring failed: RuntimeError: no z"
    assert httpx.post(f"{url}/v1/score/evaluation", json={"model": "m", "messages": ["a"]}).json()["scores"] == [2]


def test_what_nobody_thought_of_is_a_counted_500_in_json(plain: Scorer) -> None:
    """Here a tokenizer that raises; the server lives on, and what it said stays on its own machine."""

    def broken(*_: object, **__: object) -> dict:
        raise LookupError("a secret of the tokenizer")

    with running(plain._replace(tokenizer=broken)) as url:
        for path, body in (
            (OURS, {"samples": [{"prompt": "a", "response": "b"}]}),
            (THEIRS, {"model": "m", "messages": ["a"]}),
        ):
            answer = httpx.post(f"{url}{path}", json=body)
            assert answer.status_code == 500 and answer.json() == {"detail": "the request failed: LookupError"}
        counts = metrics_of(url)
        assert counts['ppo_jax_responses_total{status="500"}'] == 2 and counts["ppo_jax_requests_in_flight"] == 0


def test_max_length_keeps_the_end(url: str) -> None:
    body = {"model": "m", "messages": ["abc"], "max_length": 2}
    assert httpx.post(f"{url}/v1/score/evaluation", json=body).json()["scores"] == [3 + 4]


OURS, THEIRS = "/v1/score", "/v1/score/evaluation"


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        (OURS, {"samples": []}, 400, "samples is empty"),
        (THEIRS, {"model": "m", "messages": []}, 400, "messages is empty"),
        (OURS, {}, 422, "samples must be a list"),
        (OURS, {"samples": ["a"]}, 422, r"samples\[0\] must be an object"),
        (OURS, {"samples": [{"prompt": "a"}]}, 422, r"samples\[0\].response must be text"),
        (OURS, {"samples": [{"prompt": "a", "response": "b", "metadata": 1}]}, 422, "metadata must be an object"),
        (THEIRS, {"messages": ["a"]}, 422, "model must be text"),
        (THEIRS, {"model": "m", "messages": "a"}, 422, "messages must be a list"),
        (THEIRS, {"model": "m", "messages": ["a", 1]}, 422, r"messages\[1\] must be text"),
        (THEIRS, {"model": "m", "messages": ["\ud800"]}, 422, "surrogate"),
        (THEIRS, {"model": "\ud800", "messages": ["a"]}, 422, "model holds half of a surrogate pair"),
        (THEIRS, {"model": "m", "messages": ["a"], "max_length": 0}, 422, "max_length"),
        (THEIRS, {"model": "m", "messages": ["a"] * 5}, 413, "5 rows; this server takes at most 4"),
        (OURS, {"samples": [{"prompt": "a" * 2000, "response": ""}]}, 413, "larger than 2000 bytes"),
        (OURS, {"samples": [{"prompt": "a" * 50_000, "response": ""}]}, 413, "larger than 2000 bytes"),
        (OURS, [1], 422, "must be a JSON object, not list"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_requests_that_are_refused(path: str, body: object, status: int, detail: str, url: str) -> None:
    response = httpx.post(f"{url}{path}", content=json.dumps(body))
    assert response.status_code == status
    assert response.json().keys() == {"detail"} and re.search(detail, response.json()["detail"])


def test_what_is_no_json_and_what_comes_in_pieces(url: str) -> None:
    for content in (b"", b"{", b"\xff", b"[" * 1900, b'{"model": NaN}', b'{"messages": ["a"], "messages": ["b"]}'):
        response = httpx.post(f"{url}{OURS}", content=content)
        assert response.status_code == 422 and "not JSON" in response.json()["detail"]

    def pieces(count: int) -> Iterator[bytes]:
        """Without a Content-Length: only counting tells that it is too large."""
        yield b'{"model": "m", "messages": ["'
        yield from [b"a" * 10] * count
        yield b'"]}'

    assert httpx.post(f"{url}{THEIRS}", content=pieces(2)).json()["scores"] == [40]
    assert httpx.post(f"{url}{THEIRS}", content=pieces(300)).status_code == 413
    assert httpx.get(f"{url}{OURS}").status_code == 405


def test_a_body_that_does_not_come_ends(plain: Scorer) -> None:
    with (
        running(plain, body_timeout=0.2) as url,
        socket.create_connection(("127.0.0.1", int(url.split(":")[2]))) as peer,
    ):
        peer.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in peer.recv(1000).split(b"\r\n")[0]


def test_a_busy_server_says_when_to_come_back(plain: Scorer) -> None:
    """One request is being scored, one waits, the third finds no room."""
    go = threading.Event()

    def slow(rows: Sequence[Sequence[int]]) -> np.ndarray:
        go.wait(60)
        return score_rows(rows)

    statuses: list[int] = []

    def ask(text: str) -> None:
        body = {"model": "m", "messages": [text]}
        statuses.append(httpx.post(f"{url}{THEIRS}", json=body, timeout=60).status_code)

    with running(plain._replace(score_rows=slow), batch_size=1, max_rows=1, max_waiting=1, wait_ms=0.0) as url:
        asking = [threading.Thread(target=ask, args=[text]) for text in "ab"]
        asking[0].start()
        while not (metrics_of(url).get("ppo_jax_rows_total") == 1 and metrics_of(url)["ppo_jax_rows_waiting"] == 0):
            time.sleep(0.01)
        asking[1].start()
        while metrics_of(url)["ppo_jax_rows_waiting"] != 1:
            time.sleep(0.01)
        refused = httpx.post(f"{url}{THEIRS}", json={"model": "m", "messages": ["c"]})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        go.set()
        for thread in asking:
            thread.join(60)
    assert statuses == [200, 200]


def test_a_token_guards_all_but_health(plain: Scorer) -> None:
    body = {"model": "m", "messages": ["a"]}
    with running(plain, token="secret") as url:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic secret"},
            {"Authorization": "secret"},
        ):
            refused = httpx.post(f"{url}{THEIRS}", json=body, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
        good = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}{THEIRS}", json=body, headers=good).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert "secret" not in httpx.get(f"{url}/metrics", headers=good).text


def test_tokens_come_from_an_environment_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Path("r")
    assert read_token(ServeSettings(reward)) == ""
    monkeypatch.setenv("OUR_TOKEN", " abc\n")
    assert read_token(ServeSettings(reward, token_env="OUR_TOKEN")) == "abc"
    file = tmp_path / "token"
    with pytest.raises(ValueError, match="cannot read the token"):
        read_token(ServeSettings(reward, token_file=file))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"\(token_file\) is empty"):
        read_token(ServeSettings(reward, token_file=file))
    file.write_text("xyz\n")
    assert read_token(ServeSettings(reward, token_file=file)) == "xyz"


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"port": 70000},
        {"max_body": -1},
        {"max_rows": 9, "max_waiting": 8},
        {"grace": 0.0},
        {"head_timeout": 0.0},
        {"max_connections": 0},
        {"max_waiting_bytes": 15 * 2**20},
    ],
)
def test_impossible_settings_name_the_field(fields: dict) -> None:
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"{name}={fields[name]}"):
        ServeSettings(Path("r"), **fields)
