"""Nothing that a run, an export or a report writes holds a key, an internal address or where a token is kept."""

import json
import shlex
from pathlib import Path

import pytest

from ppo_jax.cli import main as cli
from ppo_jax.cli.common import repeatable_yaml
from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.report import page
from ppo_jax.rewards import addresses
from ppo_jax.runs.output import rundir
from tests.rewards import faulty_server as faulty
from tests.small import save_sampled

HOST, KEY, TOKEN = "127.0.0.77", "qk-5ecret/ke+y", "tk-0123456789abcdef"
QUERY = "key=qk-5ecret%2Fke%2By&team=nightingale"
SECRETS = (HOST, KEY, TOKEN, "5ecret", "nightingale", "hunter2")
PPO = (
    "ppo --model {0}/model --prompts {0}/prompts.txt --run-dir {0}/runs/ppo --loop.batch-size 4 --policy.rank 2 "
    "--ppo.sampling.response-length 3 --ppo.epochs 1 --ppo.num-minibatches 1 --loop.checkpoint-every 1 "
    "--scoring.api.backoff 0.01 --held-out 4"
)


def run(folder: Path, args: str) -> int:
    return cli.main(shlex.split(args.format(folder)))


def holders(folder: Path, *wanted: str) -> list[str]:
    """Files, by name or content, that hold one of these texts."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found += [f"{path}: {one}" for one in wanted if one.encode() in content or one in path.name]
    return found


def test_a_run_an_export_and_a_report_hold_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """A key in the URL, an address inside, a token; some answers echo them. The run goes on when the URL is given."""
    save_sampled(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"{a}{b}\n" for a in "abcde" for b in "abcde"))
    (tmp_path / "vault").mkdir()
    (tmp_path / "vault" / "tok.txt").write_text(TOKEN)
    echo = faulty.status(403, f"{TOKEN} of {KEY} at http://{HOST}/v1/score?{QUERY} is not welcome")
    with faulty.serving(host=HOST) as server:
        url = f"http://{HOST}:{server.port}/v1/score?{QUERY}"
        server.faults = [faulty.works, echo]
        first = f"{PPO} --loop.updates 1 --scoring.token-file {{0}}/vault/tok.txt"
        assert run(tmp_path, f"{first} --reward '{url}'") == 0
        assert server.requests and all(f"?{QUERY}" in path for path, *_ in server.requests)
        written = (tmp_path / "runs" / "ppo" / rundir.CONFIG).read_text()
        assert addresses.NOT_SAVED in written
        capfd.readouterr()

        again = "ppo --config {0}/runs/ppo/config.yaml --resume --loop.updates 2"
        assert run(tmp_path, again) == cli.MISTAKE
        assert "give it again (--reward URL)" in capfd.readouterr().err
        assert run(tmp_path, f"{again} --reward '{url}'") == 0
        said = capfd.readouterr()
    assert not any(secret in text for secret in SECRETS for text in said)
    steps = [json.loads(line) for line in (tmp_path / "runs" / "ppo" / rundir.METRICS).read_text().splitlines()]
    assert [line["step"] for line in steps if line["phase"] == "ppo"] == [1, 2]

    assert run(tmp_path, "export {0}/runs/ppo --to {0}/runs/merged") == 0
    assert run(tmp_path, "export {0}/runs/ppo --to {0}/runs/peft --format peft") == 0
    page.write(tmp_path / "runs" / "ppo", rundir.read_summary(tmp_path / "runs" / "ppo"))
    assert not holders(tmp_path / "runs", *SECRETS)
    for export in ("merged", "peft"):
        card = tmp_path / "runs" / export / "README.md"
        assert "a service" in card.read_text() and "base_model: model" in card.read_text()
        assert not holders(card.parent, "tok.txt", "vault", f"{tmp_path}/prompts", "token_file")
        for place in (str(tmp_path), "http://", "prompts.txt/"):
            assert place not in card.read_text()
    assert holders(tmp_path / "vault", TOKEN), "the search finds what is there"


@pytest.mark.parametrize(
    ("source", "saved", "named"),
    [
        ("http://127.0.0.1:8000/v1/score", "http://127.0.0.1:8000/v1/score", "a service"),
        ("http://localhost/v1/score", "http://localhost/v1/score", "a service"),
        ("http://[::1]:8000/v1/score", "http://[::1]:8000/v1/score", "a service"),
        ("http://127.0.0.1:8000/v1/score?key=hunter2", addresses.NOT_SAVED, "a service"),
        ("http://127.0.0.1:8000/v1/score#hunter2", addresses.NOT_SAVED, "a service"),
        ("http://me:hunter2@127.0.0.1/", addresses.NOT_SAVED, "a service"),
        ("HTTPS://scores.intern/v1", addresses.NOT_SAVED, "a service"),
        ("http://10.0.0.7/hook/hunter2", addresses.NOT_SAVED, "a service"),
        ("env:URL", "env:URL", "a service"),
        ("file:/etc/url", "file:/etc/url", "a service"),
        ("/home/anna/rewards.py:score", "/home/anna/rewards.py:score", "rewards.py:score"),
        ("runs/reward", "runs/reward", "reward"),
        ("package.module:function", "package.module:function", "package.module:function"),
    ],
)
def test_what_is_saved_and_published_of_a_source(source: str, saved: str, named: str) -> None:
    assert addresses.saved_sources([source, "m:f"]) == (saved, "m:f")
    assert addresses.named_sources([source]) == named
    text = repeatable_yaml(PPOSettings("m", Path("p"), (source,)))
    assert saved in text and "hunter2" not in text


def test_a_url_is_read_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_URL", f" https://h/x?{QUERY}\n")
    file = tmp_path / "url"
    file.write_text("http://h/y\n")
    assert addresses.read_source("env:OUR_URL") == f"https://h/x?{QUERY}"
    assert addresses.read_source(f"file:{file}") == "http://h/y"
    assert addresses.read_source("m:f") == "m:f"
    file.write_text("hunter2")
    monkeypatch.setenv("OUR_URL", "hunter2")
    for source, said in {
        "env:NO_SUCH": "NO_SUCH is not set",
        "env:OUR_URL": "does not begin with http",
        f"file:{file}": "does not begin with http",
        f"file:{tmp_path}": "cannot be read as text",
        addresses.NOT_SAVED: "give it again",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            addresses.read_source(source)
        assert "hunter2" not in str(error.value)
