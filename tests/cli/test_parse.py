"""The command line as a person types it: presets, a file, options, and what is said of a mistake."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.cli.parse import parse
from ppo_jax.runs.output.config import to_yaml
from ppo_jax.train.loop import LoopConfig
from ppo_jax.types import Hyper
from tests.settings import Resumable, Run, Span

PRESETS = {"smoke": Run(name="smoke", hyper=Hyper(lam=0.1, gamma=0.2)), "full": Run(name="full")}


def test_preset_then_file_then_options(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("hyper: {gamma: 0.3, kl_coef: 0.4}")
    words = ["--hyper.kl-coef", "0.5", "--config", str(path), "--preset", "smoke"]
    run = parse(Run, words, presets=PRESETS)
    assert run == Run(name="smoke", hyper=Hyper(lam=0.1, gamma=0.3, kl_coef=0.5))
    assert parse(Run, ["--preset=full"], presets=PRESETS) == PRESETS["full"]
    assert parse(Run, [], presets=PRESETS) == Run()


def test_options_of_every_kind(tmp_path: Path) -> None:
    words = "--out /o --overwrite --target 1e-3 --sizes 4 5 6 --pair 2 b --optimiser.kind k2 --hyper.learning_rate 3"
    run = parse(Run, words.split())
    assert run.out == Path("/o") and run.overwrite and run.target == 1e-3
    assert run.sizes == (4, 5, 6) and run.pair == (2, "b")
    assert run.optimiser.kind == "k2" and run.hyper.learning_rate == 3.0
    # What was resolved can be passed back.
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    assert parse(Run, ["--config", str(tmp_path / "config.yaml")]) == run


def test_fields_without_default_come_from_the_file_or_the_options(tmp_path: Path) -> None:
    (tmp_path / "span.yaml").write_text("start: 4")
    assert parse(Span, ["--config", str(tmp_path / "span.yaml")]) == Span(4)
    assert parse(Span, ["--start", "5"]) == Span(5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hyper.kl-coeff 0.1", "train: there is no option --hyper.kl-coeff; did you mean --hyper.kl-coef?"),
        ("--hyper.kl_coeff=0.1", "train: there is no option --hyper.kl_coeff; did you mean --hyper.kl-coef?"),
        ("--kl-coef 0.1", "train: there is no option --kl-coef; did you mean --hyper.kl-coef?"),
        ("--prest smoke", "train: there is no option --prest; did you mean --preset?"),
        ("--no-overwrit", "did you mean --no-overwrite?"),
        ("--qqqq 1", "train: there is no option --qqqq; --help-all shows all options"),
        ("--preset smok", "full"),
        ("--optimiser.kind k9", "k1"),
        ("--hyper.gamma much", "gamma"),
        ("--optimiser.epochs 0", "epochs=0 must be at least 1"),
        ("--config absent.yaml", "absent.yaml: no such configuration file"),
        ("--config", "--config"),
        ("surplus", "surplus"),
    ],
)
def test_a_mistyped_command_is_one_message_and_status_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Run, words.split(), presets=PRESETS, prog="train")
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err + captured.out


def test_a_mistake_in_the_file_is_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("hyper:\n  kl: 1\n")
    with pytest.raises(SystemExit) as exit_:
        parse(Run, ["--config", str(path)], prog="train")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train: {path}, line 2: hyper.kl: unknown key; did you mean hyper.")


def test_help_tells_presets_fields_and_comments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Run, ["--help", "--config", "absent.yaml"], presets=PRESETS)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for part in ("smoke", "A run of everything", "Where the run goes.", "Passes over", "Beta weighs the KL penalty"):
        assert part in shown


def test_a_command_of_its_own_process(tmp_path: Path) -> None:
    """No traceback reaches a person who mistypes."""
    code = "from ppo_jax.cli.parse import parse; from ppo_jax.types import Hyper; print(parse(Hyper))"
    run: Any = subprocess.run([sys.executable, "-c", code, "--lam", "0.5"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "lam=0.5" in run.stdout
    run = subprocess.run([sys.executable, "-c", code, "--lamb", "0.5"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "--lam" in run.stderr + run.stdout and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "no"),
        (["--resume"], "yes"),
        (["--resume", "--steps", "2"], "yes"),
        (["--steps", "2", "--resume", "auto"], "auto"),
        (["--resume", "no"], "no"),
    ],
)
def test_an_option_whose_choices_have_a_yes_may_stand_alone(args: list[str], expected: str):
    assert parse(Resumable, args).resume == expected


@pytest.mark.parametrize("name", ["-kl", "-reward", "reward", "- a", "", "-1"])
def test_a_text_may_begin_with_a_dash(name: str) -> None:
    for words in (["--best-metric", name], [f"--best-metric={name}"]):
        assert parse(LoopConfig, [*words, "--updates", "7"]) == LoopConfig(best_metric=name, updates=7)
    assert parse(Hyper, ["--missing-eos", "-0.5"]) == Hyper(missing_eos=-0.5)


def test_help_after_an_option_that_takes_text_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("-h", "--help", "--help-all"):
        with pytest.raises(SystemExit) as exit_:
            parse(LoopConfig, ["--best-metric", word])
        assert exit_.value.code == 0 and "--best-metric" in capsys.readouterr().out


def test_home_is_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("out: ~/b")
    assert parse(Run, ["--out", "~/a"]).out == parse(Run, ["--out=~/a"]).out == tmp_path / "a"
    assert parse(Run, ["--config=~/run.yaml"]).out == tmp_path / "b"
