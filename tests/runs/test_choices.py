"""What `ppo-jax ppo` chooses where it is left open, and that a run which goes on keeps what it began with."""

import math
from pathlib import Path

import pytest

from ppo_jax.cli.common import repeatable_yaml
from ppo_jax.cli.parse import parse
from ppo_jax.cli.ppo import PPOSettings, check_settings
from ppo_jax.rewards.base import Reward
from ppo_jax.runs.choices import choose_rate, fill_in
from ppo_jax.runs.output.config import from_yaml
from ppo_jax.types import Hyper

NORMALISED = Reward(host=lambda p, r, m: None, metadata={"reward": {"normalise": True}})  # type: ignore[arg-type, return-value]
FUNCTION = Reward(host=lambda p, r, m: None)  # type: ignore[arg-type, return-value]


def settings(*words: str) -> PPOSettings:
    return parse(PPOSettings, ["--model", "m", "--prompts", "p", "--reward", "r", *words], prog="x")


@pytest.mark.parametrize(
    ("kind", "width", "rate"),
    [("lora", 32, 1e-3), ("lora", 4096, 1e-3), ("full", 32, 1e-4), ("top_k", 32, 1e-4), ("full", 4096, 7.8e-7)],
)
def test_the_rate_is_that_of_what_is_trained_and_the_values_are_not_clipped(kind: str, width: int, rate: float) -> None:
    filled, told = fill_in(settings("--policy.kind", kind), width, NORMALISED)
    assert filled.hyper == Hyper(learning_rate=rate, value_clip=math.inf)
    assert f"hyper.learning_rate {rate:g} (policy.kind {kind})" in told and "hyper.value_clip off" in told


def test_scores_of_any_scale_are_divided_by_their_std_and_those_that_have_std_1_are_not() -> None:
    assert fill_in(settings(), 32, NORMALISED)[0].ppo.score.normalise == "off"
    assert (
        fill_in(settings(), 32, FUNCTION)[0].ppo.score.normalise
        == fill_in(settings())[0].ppo.score.normalise
        == "scale"
    )


def test_what_is_given_stays_and_is_not_told_of() -> None:
    given = settings(
        *(
            "--hyper.learning-rate",
            "1e-4",
            "--hyper.value-clip",
            "0.2",
            "--ppo.score.normalise",
            "off",
            "--policy.kind",
        ),
        "full",
    )
    assert fill_in(given, 32, FUNCTION) == (given, "")


def test_without_a_critic_the_value_clip_is_left_alone() -> None:
    given = settings("--ppo.advantage", "rloo", "--ppo.group-size", "4")
    filled, told = fill_in(given, 32, NORMALISED)
    assert filled.hyper.value_clip == Hyper().value_clip and "value_clip" not in told
    check_settings(given)


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path: Path) -> None:
    """Here one of code that had 1e-4, 0.2 and no normalisation as its defaults."""
    old = settings("--hyper.learning-rate", "1e-4", "--hyper.value-clip", "0.2", "--ppo.score.normalise", "off")
    (tmp_path / "config.yaml").write_text(repeatable_yaml(old))
    for resume in ("yes", "auto"):
        filled, _ = fill_in(settings("--run-dir", str(tmp_path), "--resume", resume), 32, FUNCTION)
        assert (filled.hyper, filled.ppo) == (old.hyper, old.ppo)
    fresh, _ = fill_in(settings("--run-dir", str(tmp_path), "--overwrite"), 32, FUNCTION)
    assert fresh.hyper.learning_rate == choose_rate("lora", 32)
    other, _ = fill_in(settings("--run-dir", str(tmp_path), "--resume", "--hyper.learning-rate", "1e-3"), 32, FUNCTION)
    assert other.hyper == old.hyper._replace(learning_rate=1e-3)


def test_what_was_chosen_is_in_the_settings_that_repeat_the_run() -> None:
    filled, _ = fill_in(settings(), 32, FUNCTION)
    again = from_yaml(PPOSettings, repeatable_yaml(filled))
    assert again == filled == fill_in(again, 32, NORMALISED)[0]
