"""`ppo-jax generate`: who answers, and that a response does not depend on the prompts beside it."""

import json
from pathlib import Path

import pytest

from ppo_jax import cli
from ppo_jax.data import PromptRecord
from ppo_jax.generate import prompt_set
from ppo_jax.runs import Model
from tests import finished_run
from tests.data.tokenizer import BOS, ids, make_tokenizer
from tests.models.tiny import CONFIG

REST = ["--temperature", "0", "--sampling.response-length", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("generate"))


def answers(run: Path, *args: str, prompts: tuple[str, ...] = ("ab", "hello")) -> list[dict]:
    output = run.parent / "answers.jsonl"
    output.unlink(missing_ok=True)
    assert cli.main(["generate", *REST, *args, "--prompt", *prompts, "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_run_by_position_or_by_option_and_an_adapter_in_it(run: Path) -> None:
    by_run = answers(run, str(run))
    assert [set(line) for line in by_run] == [{"prompt", "response", "finished"}] * 2
    assert answers(run, "--policy", str(run)) == by_run
    assert answers(run, str(run / "export" / "policy")) == by_run


def test_steps_and_the_base_differ(run: Path) -> None:
    said = [answers(run, str(run), "--step", step) for step in ("2", "3")]
    said.append(answers(run, "--model", str(run.parent / "model")))
    assert len({json.dumps(lines) for lines in said}) == 3
    assert answers(run, str(run)) == said[1]


def test_batches_are_an_implementation_detail(run: Path) -> None:
    prompts = ("ab", "hello", "one two", "a", "xyz")
    whole = answers(run, str(run), prompts=prompts)
    assert answers(run, str(run), "--batch-size", "2", prompts=prompts) == whole
    assert [line["prompt"] for line in whole] == list(prompts)


def test_the_terminal_gets_text(run: Path, capsys: pytest.CaptureFixture) -> None:
    expected = answers(run, str(run), prompts=("ab",))[0]["response"]
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--prompt", "ab", *REST]) == 0
    assert capsys.readouterr().out == f"ab\n>>> {expected}\n\n"


@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_cut_where_the_tokens_are(bos: bool) -> None:
    """What is left of a prompt that is too long; others and those that just fit are whole."""
    model = Model("tiny", CONFIG, {}, make_tokenizer(bos), "0" * 64)
    prompts = ["hello world", "abcdefg"[: 6 - bos], "ab", [{"role": "user", "content": "xyz"}]]
    records = [PromptRecord(prompt, {}, "") for prompt in prompts]
    found, too_long = prompt_set(records, model, 6, "truncate_left")
    start = [BOS] if bos else []
    world = "world" if bos else " world"
    assert found.rows[0] == start + ids(world) and found.texts[0] == world
    assert found.texts[1:3] == prompts[1:3] and too_long == 2
    assert len(found.rows[3]) == 6 and found.texts[3] == ("ant: " if bos else "tant: ")


@pytest.mark.parametrize("mesh", ["--mesh.data 8", "--mesh.data 2 --mesh.fsdp 4"])
def test_every_mesh_says_the_same(run: Path, mesh: str) -> None:
    """Sampled, from a run and from a checkpoint; one full batch, and one that does not divide over the devices."""
    prompts = ("ab", "hello", "one two", "a", "xyz", "b", "c", "do", "re", "mi")
    for who in ([str(run)], [str(run), "--step", "2"]):
        args = [*who, "--temperature", "1.5", "--batch-size", "8"]
        assert answers(run, *args, *mesh.split(), prompts=prompts) == answers(run, *args, prompts=prompts)


def test_how_the_model_is_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert answers(run, str(run), "--compute.dtype", "bfloat16", "--compute.attention", "xla")
    assert answers(run, "--model", str(run.parent / "model"), "--compute.dtype", "bfloat16")
    assert cli.main(["generate", str(run), "--prompt", "ab", "--mesh.data", "3"]) == cli.MISTAKE
    assert "needs 3 devices, but there are 8" in capsys.readouterr().err
