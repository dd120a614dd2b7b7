"""`ppo-jax generate`: who answers, and that a response does not depend on the prompts beside it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_jax.cli import main as cli
from ppo_jax.cli.generate import Response, write
from ppo_jax.data import PromptRecord
from ppo_jax.models.pretrained import Model
from ppo_jax.rollout import Sampling
from ppo_jax.runs.prompts import check_room, encode_prompt_set
from ppo_jax.runs.setup import with_stops
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
    found, too_long = encode_prompt_set(records, model, 6, "truncate_left")
    start = [BOS] if bos else []
    world = "world" if bos else " world"
    assert found.rows[0] == start + ids(world) and found.texts[0] == world
    assert found.texts[1:3] == prompts[1:3] and too_long == 2
    assert len(found.rows[3]) == 6 and found.texts[3] == ("ant: " if bos else "tant: ")


@pytest.mark.parametrize("mesh", [pytest.param("--mesh.data 8", marks=pytest.mark.long), "--mesh.data 2 --mesh.fsdp 4"])
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


# -- the file --------------------------------------------------------------------------------------------------------


def test_where_the_responses_go_is_known_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(output: Path) -> str:
        assert cli.main(["generate", "--model", "nowhere", "--prompt", "a", "--output", str(output)]) == cli.MISTAKE
        return capsys.readouterr().err

    assert f"there is no directory {tmp_path / 'none'}; make it first" in said(tmp_path / "none" / "a.jsonl")
    assert "nowhere" in said(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.partial").write_text("mine")
    assert "a.jsonl.partial holds the responses of a command that did not end" in said(tmp_path / "a.jsonl")


def test_what_stops_early_leaves_what_was_finished(tmp_path: Path) -> None:
    output, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"

    def found(count: int) -> Iterator[Response]:
        for i in range(count):
            yield Response("p", f"r{i}\n\u00e4", True)
            assert len(partial.read_text().splitlines()) == i + 1  # on the disk before the next one is sampled
        if count < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(found(2), output)
    lines = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    assert [line["response"] for line in lines] == ["r0\n\u00e4", "r1\n\u00e4"] and not output.exists()
    with pytest.raises(FileExistsError):  # is not lost to the next command either
        write(found(3), output)
    partial.unlink()
    assert write(found(3), output) == 3
    assert len(output.read_text().splitlines()) == 3 and not partial.exists()


# -- options that would do nothing, and limits -----------------------------------------------------------------------


def test_chat_is_not_for_a_file(capsys: pytest.CaptureFixture) -> None:
    args = ["generate", "--model", "nowhere", "--prompts", "p.jsonl", "--chat"]
    assert cli.main(args) == cli.MISTAKE
    assert "--chat is for --prompt TEXT and changes nothing in --prompts p.jsonl" in capsys.readouterr().err


def test_the_pad_id_is_the_models() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token_id = 7
    model = Model("tiny", CONFIG, {}, tokenizer, "0" * 64)
    assert with_stops(Sampling(), model).pad_id == with_stops(Sampling(pad_id=7), model).pad_id == 7
    with pytest.raises(ValueError, match="sampling.pad_id=5 has no effect: tiny pads with 7; leave it out"):
        with_stops(Sampling(pad_id=5), model)


@pytest.mark.parametrize(
    ("longest", "response", "advice"),
    [
        (40, 30, f"Lower --max-prompt to {64 - 30} and choose --too-long"),
        (10, 64, "Lower --x.response-length to 54$"),
        (3, 63, "Lower --x.response-length to 61$"),
        (10, 100, "Lower --x.response-length to 54$"),
        (70, 100, "Lower --x.response-length to 32$"),  # and then the prompts
        (65, 0, "Lower --max-length to 64 and choose --too-long"),
    ],
)
def test_what_does_not_fit_brings_advice_that_can_be_followed(longest: int, response: int, advice: str) -> None:
    model = Model("tiny", dataclasses.replace(CONFIG, max_positions=64), {}, make_tokenizer(), "0" * 64)
    with pytest.raises(ValueError, match=f"the longest text has {longest} tokens; .*{advice}"):
        check_room(model, [[2], [3] * longest], response, "--x.response-length")
    check_room(model, [[3] * (64 - min(response, 63))], min(response, 63))


def test_what_stops_before_the_first_response_leaves_nothing(tmp_path: Path) -> None:
    def none() -> Iterator[Response]:
        raise MemoryError
        yield

    with pytest.raises(MemoryError):
        write(none(), tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []
