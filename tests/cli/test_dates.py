"""Chat templates that write today's date: a run's prompts are those of its first day, on whatever day it goes on."""

import dataclasses
import datetime
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from ppo_jax.cli import common, sweep
from ppo_jax.cli import main as cli
from ppo_jax.cli.common import use_run_date
from ppo_jax.cli.dpo import DPOSettings
from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.cli.reward import RewardSettings
from ppo_jax.cli.sft import SFTSettings
from ppo_jax.data.chat import render, use_date
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.files import hf
from ppo_jax.runs.output import config, rundir
from tests.data.tokenizer import CHAT, make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

ASK = [{"role": "user", "content": "ab"}]
FRIDAY, SATURDAY = "2026-11-27", "2026-11-28"


def dated_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%A') | lower }}\n" + CHAT
    return tokenizer


def set_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """The clock of templates, and that of the commands."""

    class Moment(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromisoformat(day)

    class Day(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Moment)
    for module in (common, sweep):
        monkeypatch.setattr(module, "date", Day)


def test_a_template_gets_the_day_that_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = dated_tokenizer(), []
    set_clock(monkeypatch, SATURDAY)
    weekday = lambda: render(ASK, tokenizer).partition("\n")[0]
    assert weekday() == "saturday"
    with use_date(FRIDAY):
        assert weekday() == "friday"
        thread = threading.Thread(target=lambda: seen.append(weekday()))
        thread.start()
        thread.join()
        with use_date("2026-11-26T13:00"):
            assert weekday() == "thursday"
        with use_date(""):
            assert weekday() == "friday"
    assert seen == ["friday"] and weekday() == "saturday"
    with pytest.raises(ValueError, match="date='yesterday' must be a day, as 2026-11-28"), use_date("yesterday"):
        pass


def test_a_template_gets_what_the_clock_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """By every way to ask, also from within a macro; blanks at the beginning of the template stay."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "\n  {%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} {% macro say(f) %}"
        "{{ strftime_now(f) + '!' }}{% endmacro %}{{ say('%-d/%-m/%y') }} {{ strftime_now('%H:%M' + ' %A') }}\n x"
    )
    set_clock(monkeypatch, "2026-03-05T07:08")
    expected = render(ASK, tokenizer)
    assert expected.strip() == "05 Mar 2026 5/3/26! 07:08 Thursday\n x"
    set_clock(monkeypatch, SATURDAY)
    with use_date("2026-03-05T07:08"):
        assert render(ASK, tokenizer) == expected


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (PPOSettings, {"prompts": Path("p"), "reward": ("r",)}),
        (SFTSettings, {"data": Path("d")}),
        (DPOSettings, {"pairs": Path("p")}),
        (RewardSettings, {}),
    ],
)
def test_every_stage_goes_on_with_the_day_that_its_settings_keep(
    cls: Any, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cls(model="m", run_dir=tmp_path, **data)
    tokenizer = dated_tokenizer()

    def day(clock: str, **more: Any) -> tuple[str, str]:
        set_clock(monkeypatch, clock)
        with use_run_date(cls(model="m", run_dir=tmp_path, **data, **more)) as dated:
            return dated.date, render(ASK, tokenizer).partition("\n")[0]

    assert day(FRIDAY) == day(FRIDAY, resume="auto") == (FRIDAY, "friday")
    (tmp_path / rundir.CONFIG).write_text(config.to_yaml(settings))
    assert day(SATURDAY, resume="yes") == (SATURDAY, "saturday"), "of an earlier version: it has kept no day"
    set_clock(monkeypatch, FRIDAY)
    with use_run_date(settings) as dated:
        (tmp_path / rundir.CONFIG).write_text(config.to_yaml(dated))
    assert day(SATURDAY, resume="yes") == day(SATURDAY, resume="auto") == (FRIDAY, "friday")
    assert day(SATURDAY, overwrite=True) == day(SATURDAY) == (SATURDAY, "saturday")
    assert day(SATURDAY, resume="yes", date="2026-11-26") == ("2026-11-26", "thursday")


def test_a_sweep_has_one_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its first slice, which sweep.yaml keeps; settings without a date, of an experiment, stay as they are."""
    settings = SFTSettings(model="m", run_dir=tmp_path, data=Path("d"))
    set_clock(monkeypatch, FRIDAY)
    first = sweep.fix_date(settings)
    assert first.date == FRIDAY
    (tmp_path / "sweep.yaml").write_text(config.to_yaml(first))
    set_clock(monkeypatch, SATURDAY)
    assert sweep.fix_date(settings) == first
    assert sweep.fix_date(dataclasses.replace(settings, run_dir=tmp_path / "other")).date == SATURDAY
    assert sweep.fix_date(AdapterConfig()) == AdapterConfig()


@pytest.mark.long  # the day that a run has kept: above
def test_ppo_resumes_after_midnight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf.save(tmp_path / "model", SMALL, random_params(SMALL), dated_tokenizer())
    lines = [json.dumps({"prompt": [{"role": "user", "content": letter}]}) for letter in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "score.py").write_text("def score(prompts, responses, metadata):\n    return [0.0] * len(prompts)\n")
    short = ["--ppo.sampling.response-length", "2", "--ppo.epochs", "1", "--ppo.num-minibatches", "1"]
    command = ["ppo", "--model", "model", "--prompts", "prompts.jsonl", "--reward", "score.py:score", "--run-dir",
               "run", "--held-out", "1", "--loop.batch-size", "2", "--loop.eval-every", "0", *short]  # fmt: skip
    set_clock(monkeypatch, FRIDAY)
    assert cli.main([*command, "--loop.updates", "1"]) == 0
    set_clock(monkeypatch, SATURDAY)
    assert cli.main([*command, "--loop.updates", "2", "--resume"]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / rundir.SAMPLES).read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 1, 2]
    assert all(sample["prompt"].startswith("friday\n") for sample in samples)
    assert cli.main([*command, "--loop.updates", "3", "--resume", "--date", SATURDAY]) == 2, "other prompts"
