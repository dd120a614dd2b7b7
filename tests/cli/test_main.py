"""The real `ppo-jax`: sft -> reward -> ppo -> generate in processes of their own, and the answers to mistakes."""

import dataclasses
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

from ppo_jax.cli import main as cli
from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.layout import init_params
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import config, rundir
from ppo_jax.runs.output.plain_yaml import ConfigError
from tests.data.tokenizer import EOS
from tests.processes import forks
from tests.small import SAMPLED, save_sampled

COMMAND = Path(sys.executable).with_name("ppo-jax")
SMALL_PPO = (
    "--loop.updates 2 --loop.batch-size 8 --ppo.sampling.response-length 5 --ppo.epochs 1 --ppo.num-minibatches 2 "
    "--loop.checkpoint-every 1"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the three files of data."""
    path = tmp_path_factory.mktemp("cli")
    save_sampled(path / "model")
    rng = np.random.default_rng(0)
    words = ["".join(word) for length in (1, 2, 3, 4) for word in itertools.product("abc", repeat=length)]
    different = iter(rng.permutation(words).tolist())
    ask = lambda: {"role": "user", "content": next(different)}
    say = lambda text: {"role": "assistant", "content": text}
    write_lines(
        path / "sft.jsonl", [{"messages": [ask(), say(rng.choice(["good day", "bad day"]))]} for _ in range(40)]
    )
    pair = lambda: {"prompt": [ask()], "chosen": [say("good day")], "rejected": [say("bad day")]}
    write_lines(path / "pairs.jsonl", [pair() for _ in range(40)])
    write_lines(path / "prompts.jsonl", [{"messages": [ask()], "metadata": {"n": i}} for i in range(40)])
    return path


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """The folder after `ppo-jax sft`, `reward` and `ppo`, each a process of its own."""
    run(world, "sft --model model --data sft.jsonl --run-dir sft --sft.batch-size 8 --sft.steps 12")
    run(world, "reward --model sft/export/model --pairs pairs.jsonl --run-dir rm --reward.lora-layers 1")
    run(world, "ppo --model sft/export/model --prompts prompts.jsonl --reward rm --run-dir ppo " + SMALL_PPO)
    return world


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(folder: Path, args: str) -> str:
    """What the command says in a process of its own."""
    with forks.ending([forks.start(forks.command, shlex.split(args), folder=folder)]) as [process]:
        assert process.wait() == 0 and "Traceback" not in process.text, process.text
        return process.text


@pytest.fixture
def mistake(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    """Runs a command that has to fail as a user's mistake; returns what it said."""
    monkeypatch.chdir(world)

    def fail(args: str) -> str:
        try:
            code = cli.main(args.split())
        except SystemExit as error:  # tyro's, for a mistake in the options
            code = error.code
        said = capsys.readouterr().err
        assert code == cli.MISTAKE and said and "Traceback" not in said
        return " ".join(said.replace("│", " ").split())

    return fail


# -- the pipeline ------------------------------------------------------------------------------------------------------


def test_sft_leaves_a_model_for_everybody(trained: Path) -> None:
    values = read_jsonl(trained / "sft" / rundir.METRICS)
    perplexities = [r["heldout_perplexity"] for r in values if "heldout_perplexity" in r]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0]
    assert [r["step"] for r in values if "grad_norm" in r] == list(range(1, 13))
    transformers.AutoModelForCausalLM.from_pretrained(trained / "sft" / "export" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "sft" / "export" / "model")
    assert "<s>user: " in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_the_reward_model_belongs_to_the_fine_tuned_base(trained: Path) -> None:
    found = artifacts.load(trained / "rm" / "export" / "reward", "reward")
    assert found.base == "sft/export/model"
    assert found.fingerprint == fingerprint_of(trained / "sft" / "export" / "model")
    assert found.meta["accuracy"] == 1.0 and found.meta["heldout_pairs"] == 8  # a fifth of 40


def test_ppo_leaves_everything(trained: Path) -> None:
    names = {item.name for item in (trained / "ppo").iterdir()}
    assert names >= {*rundir.FILES, rundir.README, "checkpoints", "export"}
    log = (trained / "ppo" / rundir.LOG).read_text()
    assert "[ppo]  2/2" in log and "report: ppo/report.html" in log
    (session,) = rundir.read_facts(trained / "ppo")["sessions"]
    assert session["command"].startswith("ppo-jax ppo --model sft/export/model --prompts prompts.jsonl --reward rm")
    updates = [r for r in read_jsonl(trained / "ppo" / rundir.METRICS) if r["phase"] == "ppo"]
    assert [r["step"] for r in updates] == [1, 2] and all(np.isfinite(r["reward"]) for r in updates)
    assert "<s>user: " in json.loads((trained / "ppo" / rundir.SAMPLES).read_text().splitlines()[0])["prompt"]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_report_is_drawn_again(trained: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(trained)
    page = trained / stage / rundir.REPORT
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert cli.main(["report", stage]) == 0 and capsys.readouterr().out == f"report: {stage}/report.html\n"
    assert page.read_text(encoding="utf-8").replace("report.html", "") == before.replace("report.html", "")
    assert "Base model" in before and "ppo-jax" in before


def test_a_report_of_nothing_is_a_mistake(mistake: Callable[[str], str]) -> None:
    assert "nowhere holds no run: give the directory that has its metrics.jsonl" in mistake("report nowhere")


def test_generate_in_a_process(trained: Path) -> None:
    said = run(trained, "generate --policy ppo --prompt ab 'b c' --sampling.response-length 4")
    assert said.startswith("ab\n>>> ") and "\nb c\n>>> " in said


def test_adapter_and_merged_model_write_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text of base + adapter, of the merged directory, and of that directory in transformers."""
    monkeypatch.chdir(trained)
    rest = "--prompts prompts.jsonl --temperature 0 --sampling.response-length 8 --batch-size 7"
    answers = {}
    for name, who in {"adapter": "--policy ppo", "merged": "--model ppo/export/model"}.items():
        assert cli.main(f"generate {who} {rest} --output {name}.jsonl".split()) == 0
        answers[name] = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
    assert answers["adapter"] == answers["merged"] and len(answers["merged"]) == 40
    theirs = transformers.AutoModelForCausalLM.from_pretrained("ppo/export/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("ppo/export/model")
    for answer in answers["merged"][:3]:
        ids = tokenizer(answer["prompt"], add_special_tokens=False, return_tensors="pt")
        out = theirs.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=EOS)[
            0, ids["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer["response"]
        assert answer["finished"] == (EOS in out.tolist())


def test_a_run_goes_on_and_is_repeated(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume adds the third update; the saved configuration alone repeats the first two."""
    monkeypatch.chdir(trained)
    shutil.copytree("ppo", "longer")
    again = ["--config", "longer/config.yaml", "--run-dir", "longer"]
    assert cli.main(["ppo", *again, "--resume", "--loop.updates", "3", "--loop.schedule", "constant"]) == 0
    records = [r for r in read_jsonl("longer/metrics.jsonl") if r["phase"] == "ppo"]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert cli.main(["ppo", "--config", "ppo/config.yaml", "--run-dir", "repeated"]) == 0
    first, second = (
        [(r["reward"], r["kl"], r["entropy"]) for r in read_jsonl(f"{name}/metrics.jsonl") if r["phase"] == "ppo"]
        for name in ("ppo", "repeated")
    )
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_mistake_in_a_process_is_one_line_and_exit_code_2(world: Path) -> None:
    """The real console command, started as a user starts it."""
    words = ["sft", "--model", "nowhere", "--data", "sft.jsonl", "--run-dir", "runs/x"]
    done = subprocess.run([COMMAND, *words], cwd=world, capture_output=True, text=True, timeout=forks.LIMIT)
    assert done.returncode == 2
    assert done.stderr == "ppo-jax sft: nowhere does not exist; give a Hugging Face directory or a .gguf file\n"
    assert not (world / "runs").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("stf --model model", "'stf' is not a command; did you mean sft?"),
        ("sweep pop --model model", "name what is swept: ppo, sft, reward, dpo; did you mean ppo?"),
        (
            "ppo --model m --policy.kind lroa",
            "--policy.kind 'lroa' must be one of lora, top_k, full; did you mean lora?",
        ),
        ("train", "'train' is not a command; there are: demo, sft, reward, ppo, generate"),
        ("sft --model model --data sft.jsonl --run-dir x --sft.batch-sise 4", "--sft.batch-size"),
        ("sft --model model", "--data"),
        ("sft --model model --data none.jsonl --run-dir x", "none.jsonl is not a file"),
        ("sft --model model --data prompts.jsonl --run-dir x", 'prompts.jsonl:1: unknown field "metadata"'),
        ("sft --model model --data sft.jsonl --run-dir x --max-length 20", "40 of 40|longer than 20 tokens"),
        ("sft --model model --data sft.jsonl --run-dir x --sft.batch-size 100", "leaves only 32 to train on"),
        ("sft --model model --data sft.jsonl --run-dir x --sft.accumulate 3", "not a multiple of accumulate=3"),
        ("sft --model model --data sft.jsonl --run-dir x --held-out -1", "--held-out -1 must not be negative"),
        (
            "reward --model model --pairs sft.jsonl --run-dir x --reward.lora-layers 1",
            'sft.jsonl:1: unknown field "messages"',
        ),
        (
            "reward --model model --pairs pairs.jsonl --run-dir x --reward.depth 3",
            "reward.depth=3: the base has 2 layers",
        ),
        ("generate", "nothing to answer"),
        ("generate --prompt a", "nobody to answer"),
        ("generate --model model --prompt a --temperature -1", "--temperature -1.0 must not be negative"),
        ("generate --model model --prompt abc --max-prompt 2", "--prompt 1"),
        ("generate --model model --prompt abc --sampling.response-length 63", "do not fit into the 64 positions"),
        ("generate --model model --prompt abc --sampling.pad-id 9", "sampling.pad_id=9 has no effect"),
        ("generate --model model --prompts prompts.jsonl --output sft.jsonl", "sft.jsonl already exists"),
        ("generate --policy model --prompt a", "artifact.json is missing"),
    ],
)
def test_mistakes_are_named(args: str, said: str, mistake: Callable[[str], str], world: Path) -> None:
    message = mistake(args)
    assert any(part in message for part in said.split("|")), message
    assert not (world / "x").exists()  # nothing was begun


def test_mistakes_of_a_ppo_run(trained: Path, mistake: Callable[[str], str]) -> None:
    (trained / "bad.jsonl").write_text('{"prompt": "a"}\nprompt: b\n')
    (trained / "empty.jsonl").write_text('{"prompt": " "}\n')
    given = "ppo --model sft/export/model --prompts {} --reward {} --run-dir x "
    whole = given.format("prompts.jsonl", "rm")
    assert "bad.jsonl:2: not JSON" in mistake(given.format("bad.jsonl", "rm"))
    assert 'empty.jsonl:1: "prompt" is empty' in mistake(given.format("empty.jsonl", "rm"))
    long = mistake(whole + "--loop.batch-size 8 --max-prompt 5")
    assert "are longer than 5 tokens" in long and "truncate_left" in long
    assert "use a multiple of 4" in mistake(whole + "--loop.batch-size 10")
    assert "--loop.batch-size 64, but prompts.jsonl leaves only 32" in mistake(whole)
    assert "nowhere does not exist" in (said := mistake(given.format("prompts.jsonl", "nowhere")))
    assert "a reward model's directory, http://HOST:PORT/PATH (env:NAME" in said
    assert "is a policy" in mistake(given.format("prompts.jsonl", "ppo/export/policy"))
    assert "did you mean loop.updates?" in mistake_in_config(trained, mistake)
    other = mistake("ppo --model model --prompts prompts.jsonl --reward rm --run-dir x --loop.batch-size 8")
    assert "was trained on other weights: those of sft/export/model" in other
    assert not (trained / "x").exists()


def mistake_in_config(folder: Path, mistake: Callable[[str], str]) -> str:
    text = (folder / "ppo" / "config.yaml").read_text()
    (folder / "wrong.yaml").write_text(text.replace("updates:", "updatse:"))
    return mistake("ppo --config wrong.yaml --run-dir x")


def test_a_run_directory_is_not_used_twice_and_survives_a_mistake(trained: Path, mistake: Callable[[str], str]) -> None:
    args = "ppo --config ppo/config.yaml "
    assert "pass --resume to go on, --overwrite to delete it" in mistake(args)
    before = (trained / "ppo" / rundir.METRICS).read_bytes()
    mistake(args + "--overwrite --prompts none.jsonl")
    mistake(args + "--overwrite --loop.batch-size 9")
    assert "exclude each other" in mistake(args + "--overwrite --resume")
    assert (trained / "ppo" / rundir.METRICS).read_bytes() == before


def test_a_tokenizer_of_another_model(world: Path, mistake: Callable[[str], str]) -> None:
    path = Path(shutil.copytree(world / "model", world / "small"))
    small = dataclasses.replace(SAMPLED, vocab_size=20)
    hf.save(path, small, init_params(jax.random.key(0), small), overwrite=True)
    assert "the model's vocab_size is 20" in mistake("sft --model small --data sft.jsonl --run-dir x")


# -- exit codes --------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("m"), 2),
        (FileNotFoundError("m"), 2),
        (ConfigError("m"), 2),
        (OSError(28, "No space left on device"), 1),
        (FloatingPointError("m"), 1),
        (store.CheckpointSaveError("m"), 1),
        (KeyboardInterrupt(), 130),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes."), 1),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), 1),  # of a program that is dispatched without Python
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture) -> None:
    assert cli.exit_code("prog", raising(error)) == code
    said = capsys.readouterr().err
    assert said.startswith("prog: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        *(TypeError("m"), RuntimeError("m"), AssertionError("m"), KeyError("m")),
        ValueError("INTERNAL: a program has failed"),  # of a program, not of what was given
    ],
)
def test_a_bug_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        cli.exit_code("prog", raising(error))


def test_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ValueError, match="m"):
        cli.exit_code("prog", raising(ValueError("m")))


def test_usage_and_version(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0
    said = capsys.readouterr()
    assert said.out == said.err and all(name in said.out for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("ppo_jax ")


# -- parts -------------------------------------------------------------------------------------------------------------


def test_settings_survive_yaml() -> None:
    settings = PPOSettings("m", Path("p"), ("r", "f.py:g"), Path("d"), too_long="drop")
    assert config.from_yaml(PPOSettings, config.to_yaml(settings)) == settings
