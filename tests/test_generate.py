"""`ppo-jax generate`: who answers, and that a response does not depend on the prompts beside it."""

import json
from pathlib import Path

import pytest

from ppo_jax import cli
from tests import finished_run

REST = ["--temperature", "0", "--sampling.response-length", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("generate"))


def answers(run: Path, *args: str, prompts: tuple[str, ...] = ("ab", "hello")) -> list[dict]:
    output = run.parent / "answers.jsonl"
    output.unlink(missing_ok=True)
    assert cli.main(["generate", *args, "--prompt", *prompts, *REST, "--output", str(output)]) == 0
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
