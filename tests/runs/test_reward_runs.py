"""Whole runs of `ppo-jax ppo` whose rewards come from a service that fails, and from Python functions."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ppo_jax.cli import main as cli
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts, classifiers
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.layout import init_params
from ppo_jax.runs.checkpoints import store
from tests.data.tokenizer import make_tokenizer
from tests.processes import forks
from tests.rewards import faulty_server as faulty
from tests.rewards.faulty_server import Handler, serving
from tests.small import SAMPLED, save_sampled

# Batches of 8 in 4 requests, and so the held-out prompts; requests in order.
OPTIONS = (
    "--model model --prompts prompts.jsonl --held-out 8 --loop.batch-size 8 --ppo.sampling.response-length 5 "
    "--ppo.epochs 1 --ppo.num-minibatches 2 --loop.eval-every 0 --loop.schedule constant --policy.layers 1 "
    "--policy.rank 2 "
)
API = "--scoring.api.rows-per-request 2 --scoring.api.connections 1 --scoring.api.backoff 0.01 "
CONSTANT = 2.5  # what a working service says of every text here: any failed row that counted as 0 would lower a mean
SECRET = "tok-8d1f6a77c0"
RESUME = "--resume"


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and 40 prompts; 8 of them are held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_sampled(tmp_path / "model")
    words = ["abcdefgh"[: 2 + i % 6] + "abcdefg"[i // 6] for i in range(40)]
    lines = [json.dumps({"prompt": word, "metadata": {"n": i}}) for i, word in enumerate(words)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def constant(handler: Handler) -> None:
    handler.say([{"score": CONSTANT} for _ in handler.entries()])


def one_bad(entry: object) -> faulty.Fault:
    """The first of the request's rows has this entry."""
    return lambda handler: handler.say([entry, *[{"score": CONSTANT} for _ in handler.entries()][1:]])


def updates(run: str) -> list[dict]:
    return [record for record in read_jsonl(f"{run}/metrics.jsonl") if record["phase"] == "ppo"]


def evaluations(run: str) -> list[dict]:
    return [record for record in read_jsonl(f"{run}/metrics.jsonl") if record["phase"] == "eval"]


def test_a_run_goes_on_through_every_fault(capsys: pytest.CaptureFixture):
    """Defect 19 in a whole run: in each update the mean is that of the scored rows, and the others are counted."""
    row = {"score": CONSTANT}
    batches: list[list[Callable[[Handler], None]]] = [
        [constant] * 4,  # the evaluation before
        [faulty.status(500), constant, faulty.reset, constant, faulty.truncated, constant, constant],  # all pass
        [
            faulty.raw("<html>busy</html>", "text/html"),
            constant,
            faulty.status(429, Retry_After="0"),
            constant,
            constant,
        ],
        [one_bad({"score": "NaN"}), one_bad({"score": True}), one_bad({"error": "too rude"}), one_bad({"score": 1e99})],
        [faulty.says([row]), faulty.status(404), constant, faulty.raw("[")],
        [constant, constant, constant, faulty.drips],
        [faulty.hangs],
    ]
    with serving(always=constant) as server:
        server.faults = [fault for batch in batches for fault in batch]
        args = f"ppo --reward {server.url} --run-dir run --loop.updates 7 --loop.max-failed 1 --scoring.api.deadline 1 "
        assert cli.main((args + OPTIONS + API).split()) == 0
    found = updates("run")
    assert [record["invalid_scores"] for record in found] == [0, 0.25, 0.5, 0.75, 0.25, 1.0, 0]
    assert [record["reward"] for record in found] == [CONSTANT] * 5 + [None, CONSTANT]
    for record in evaluations("run"):
        assert record["reward"] == CONSTANT and record["invalid_scores"] == 0
    said = " ".join(capsys.readouterr().out.split())
    for cause in (
        "not JSON (text/html): 2 rows",
        "a score is the text NaN or Infinity in place of a number: 1 row",
        "a score is bool in place of a number: 1 row",
        "the service could not score the row: 1 row could not be scored (too rude)",
        "a score is too large for float32: 1 row",
        "a wrong number of scores: 2 rows could not be scored (1 for 2 rows)",
        "HTTP 404: 2 rows",
        "not JSON (application/json): 2 rows",
        "no answer before the deadline of 1 s: 2 rows",
    ):
        assert said.count(cause) == 1, said
    assert said.count("no answer before the deadline") == 2  # once when it came, once in the last line's counts
    assert "no answer before the deadline of 1 s (10 rows)" in said


def test_a_run_whose_service_dies_stops_with_a_checkpoint_and_goes_on_when_it_is_back(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, world: Path
):
    monkeypatch.setenv("SCORES_TOKEN", SECRET)

    def dies(handler: Handler) -> None:
        handler.server.always = faulty.reset
        threading.Thread(target=lambda: (handler.server.shutdown(), handler.server.server_close())).start()
        faulty.reset(handler)

    args = f"{OPTIONS} {API} --run-dir run --loop.updates 7 --scoring.token-env SCORES_TOKEN --scoring.api.retries 1 "
    with serving(always=constant) as server:
        port = server.port
        server.faults = [constant] * 10 + [dies]  # the evaluation, one update, and half of the second
        assert cli.main((f"ppo --reward {server.url} " + args).split()) == cli.FAILED
    said = capsys.readouterr()
    assert [record["invalid_scores"] for record in updates("run")] == [0, 0.5, 1, 1]
    assert [record["reward"] for record in updates("run")] == [CONSTANT, CONSTANT, None, None]
    assert store.latest_step("run/checkpoints") == 4  # where it stopped, though none was due
    error = " ".join(said.err.split())
    assert "update 4: 100 % of the rewards failed" in error and "--resume" in error and "Traceback" not in error
    assert "the service cannot be reached" in error

    with serving(port, always=constant) as again:
        resume = (f"ppo --reward {again.url} " + args + RESUME).split()
        assert cli.main(resume) == 0
        assert all(headers["Authorization"] == f"Bearer {SECRET}" for _, headers, _ in again.requests)
    assert [record["step"] for record in updates("run")] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["reward"] for record in updates("run")] == [CONSTANT] * 2 + [None] * 2 + [CONSTANT] * 3
    assert [record["step"] for record in evaluations("run")] == [0, 7]
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    files = [path for path in (world / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert "SCORES_TOKEN" in Path("run/config.yaml").read_text()


def test_batches_without_any_score_change_no_parameter():
    """From the first to the last: the adapter's second factors and the value head are still their zeros."""
    with serving(always=faulty.status(404)) as server:
        args = f"ppo --reward {server.url} --run-dir run --loop.updates 2 --ppo.whiten-advantages --loop.max-failed 1 "
        args += OPTIONS + API
        assert cli.main(args.split()) == 0
    found = artifacts.load(Path("run/export/policy"), "policy")
    moved = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found.adapter["lora"]) if leaf.any()}
    assert moved and all(str(path[-1]) in ("['a']", ".a", "['scale']", ".scale") for path in moved), list(moved)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found.head))
    assert [record["reward"] for record in evaluations("run")] == [None, None]
    assert [record["invalid_scores"] for record in evaluations("run")] == [1, 1]
    assert Path("run/report.html").exists()


def test_a_sum_of_functions_logs_its_parts(world: Path):
    (world / "mine.py").write_text(
        "def brief(prompts, responses, metadata):\n    return [-len(r) / 4 for r in responses]\n"
        "def number(prompts, responses, metadata):\n    return [m['n'] + 0.5 for m in metadata]\n"
    )
    args = "ppo --reward mine.py:brief mine:number --scoring.weights 1 0.5 --run-dir run --loop.updates 2 " + OPTIONS
    assert cli.main(args.split()) == 0
    for record in updates("run") + evaluations("run"):
        total = record["reward/brief"] + 0.5 * record["reward/number"]
        assert record["reward"] == pytest.approx(total, abs=1e-5)
        assert record["reward/brief"] < 0 < record["reward/number"]
        assert (8 * record["reward/number"]) % 1 == 0  # a mean of eight halves


def swapped() -> PreTrainedTokenizerFast:
    """Another tokenizer: a and b have each other's ids."""
    parts = json.loads(make_tokenizer().backend_tokenizer.to_str())
    ids = parts["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    backend = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("retokenised", [False, True])
def test_a_reward_model_of_its_own(world: Path, capsys: pytest.CaptureFixture, retokenised: bool):
    """On the device where its tokenizer is the policy's, else on the text; the logged mean is that of its scores."""
    head = RewardHead().init(jax.random.key(2), jnp.zeros((1, SAMPLED.hidden_size)))["params"]
    params = jax.tree.map(lambda x: 4 * x, init_params(jax.random.key(1), SAMPLED))
    classifiers.save(
        world / "rm", SAMPLED, params, head | {"bias": jnp.float32(7.0)}, swapped() if retokenised else make_tokenizer()
    )
    assert cli.main(f"ppo --reward rm --run-dir run --loop.updates 2 {OPTIONS}".split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("has another tokenizer than" in said) == retokenised
    assert len(updates("run")) == 2 and len(evaluations("run")) == 2
    for record in updates("run") + evaluations("run"):
        assert record["invalid_scores"] == 0 and 0 < abs(record["reward"] - 7) < 20  # 7 and what the model says


@pytest.mark.long  # a process ends while a call hangs: rewards/test_function; a batch without scores: above
def test_a_function_that_hangs_holds_up_neither_the_run_nor_its_end(world: Path):
    """A process of its own: the second batch never returns, and the process still ends by itself."""
    (world / "hangs.py").write_text(
        "import time\ncalls = []\n"
        "def score(prompts, responses, metadata):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        time.sleep(3600)\n"
        "    return [2.5] * len(prompts)\n"
    )
    args = "ppo --reward hangs.py:score --scoring.function.timeout 0.5 --run-dir run --loop.updates 3 " + OPTIONS
    with forks.ending([forks.start(forks.command, args.split(), folder=world)]) as [process]:
        assert process.wait() == 0, process.text
    assert [record["reward"] for record in updates("run")] == [2.5, None, 2.5]
    assert "the function did not return within 0.5 s: 8 rows" in " ".join(process.text.split())
