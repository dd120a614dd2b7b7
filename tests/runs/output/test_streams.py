"""Words that nobody reads, or that cannot be written: the run goes on, and its log has them all."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.cli import main as cli
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.output.streams import claim_streams, flush_streams, unbreakable
from tests.small import write_stage_files


@contextlib.contextmanager
def stream(kind: str) -> Iterator[io.TextIOWrapper]:
    """A stream whose reader has gone, or that is on a full disk."""
    if kind == "full":
        with contextlib.suppress(OSError), open("/dev/full", "w") as file:
            yield file
        return
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(OSError), os.fdopen(write, "w") as file:
        yield file


@pytest.mark.parametrize("kind", ["nobody", "full"])
def test_what_is_printed_in_a_run_never_fails_and_the_log_has_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / rundir.LOG
    with stream(kind) as out, stream(kind) as error:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", error)
        with progress("test", log=log) as screen:
            for step in range(1, 4):
                screen.message(f"message {step}\n  of two lines [not markup]")
                screen.update(phase="sft", step=step, total=3, values={"loss": 1 / step})
                print("a reward that prints", "x" * 20_000, flush=True)
                print("and warns", file=sys.stderr, flush=True)
            screen.sample(["p"], ["before"], ["after"], [0.25], [0.5])
        assert sys.stdout is out
        wrong = flush_streams()
        assert wrong == "" if kind == "nobody" else "No space left" in wrong
        assert flush_streams() == ""  # nothing is left that would fail at the end of the process
        monkeypatch.undo()
    said = log.read_text()
    for step in range(1, 4):
        assert f"message {step}\n  of two lines [not markup]\n" in said
    assert "[sft]  1/3  loss 1.0000" in said and "[sft]  3/3  loss 0.3333" in said and "+0.50" in said
    stamp = time.strptime(said[:19], "%Y-%m-%d %H:%M:%S")
    assert abs(time.mktime(stamp) - time.time()) < 3600


def test_a_live_terminal_has_a_log_too(tmp_path: Path) -> None:
    with progress("test", live=True, log=tmp_path / "log") as screen:
        for step in (1, 2, 3):
            screen.update(phase="ppo", step=step, total=3, values={"reward": 1.0})
        screen.message("note")
    lines = [line[20:] for line in (tmp_path / "log").read_text().splitlines()]
    assert [line[:10] for line in lines] == ["test", "[ppo]  1/3", "[ppo]  3/3", "note"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with progress("test", log=tmp_path / "log") as screen:
        screen.message("note")


def test_other_processes_have_no_log(tmp_path: Path) -> None:
    with progress("test", main_process=False, log=tmp_path / "log") as screen:
        screen.message("note")
    assert not (tmp_path / "log").exists()


def test_streams_that_are_none_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they were closed when the interpreter started."""
    monkeypatch.setattr(sys, "stdout", None)
    with unbreakable():
        print("nothing")
        assert sys.stdout is None
    assert flush_streams() == ""


def test_closed_streams_are_not_given_to_the_next_file(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        os.closerange(0, 3)
        claim_streams()
        os._exit(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 2


# -- commands ----------------------------------------------------------------------------------------------------------


def exit_code(kind: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command ends with where standard output is a stream of that kind."""
    with stream(kind) as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        try:
            return cli.main(words)
        except SystemExit as leaving:
            return leaving.code


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sft", "--help"]])
def test_help_that_cannot_be_written_is_one_line_and_1(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code("full", words, monkeypatch) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


@pytest.mark.parametrize("words", [["--help"], ["sft", "--help"]])
def test_help_whose_reader_has_seen_enough(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code("nobody", words, monkeypatch) == 0


COMMAND = str(Path(sys.executable).with_name("ppo-jax"))


def test_a_process_leaves_no_noise() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == cli.FAILED
    assert done.stderr == "ppo-jax: standard output cannot be written: [Errno 28] No space left on device\n"


SFT = "sft --model model --data sft.jsonl --run-dir run --sft.steps 3 --sft.batch-size 8"


def check_trained(folder: Path) -> None:
    assert (folder / "run" / rundir.REPORT).is_file()
    said = (folder / "run" / rundir.LOG).read_text()
    assert "[sft]  3/3" in said and "the model is at run/export/model" in said


def test_a_run_whose_reader_has_gone_trains_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stage_files(tmp_path)
    with stream("nobody") as out, stream("nobody") as error, monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        assert cli.main(SFT.split()) == 0
    check_trained(tmp_path)


@pytest.mark.long
def test_a_process_whose_reader_goes_trains_to_its_end(tmp_path: Path) -> None:
    """`ppo-jax sft ... 2>&1 | head -1`"""
    write_stage_files(tmp_path)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": tmp_path, "env": environment}
    run = subprocess.Popen([COMMAND, *SFT.split()], **pipes)  # type: ignore[call-overload]
    assert run.stdout.readline()
    run.stdout.close()
    assert run.wait(240) == 0
    check_trained(tmp_path)
