"""Each check on records that show it and on records that do not; and what a run says while it goes on."""

import json
from pathlib import Path

import pytest

from ppo_jax.runs import health
from ppo_jax.runs.health import CHECKS, Known, examine, known_from, watch

RECORDED = Path(__file__).parent / "recorded"


def ppo(count: int = 12, **curves) -> list[dict]:
    """Records of a run that is well, but for `curves`: a number, or a function of the update from 1 on."""
    well = {
        "reward": lambda i: i / 10, "reward_std": 1.0, "kl": lambda i: 0.3 * i, "kl_per_token": 0.05,
        "clip_fraction": 0.05, "entropy": lambda i: 2.0 - 0.02 * i, "explained_variance": lambda i: 0.05 * i,
        "value_clip_fraction": 0.01, "value_loss": 0.5, "loss": 0.1, "grad_norm": lambda i: 1.0 + i % 3,
        "eos_rate": 0.6, "response_length": 20.0, "invalid_scores": 0.0, "nonfinite_updates": 0.0,
        "learning_rate": 1e-3, "kl_coef": 0.05, "return_std": 1.0,
    }  # fmt: skip
    values = {name: value if callable(value) else lambda i, v=value: v for name, value in (well | curves).items()}
    return [{"step": i, "phase": "ppo"} | {n: v(i) for n, v in values.items()} for i in range(1, count + 1)]


def evaluation(step: int, reward: float, judge: float = 0.0, **values) -> dict:
    well = {"reward_std": 1.0, "judge_std": 1.0, "kl": 0.3 * step, "kl_per_token": 0.02 * step, "response_length": 20.0}
    return {"step": step, "phase": "eval", "reward": reward, "judge": judge, **well, "invalid_scores": 0.0, **values}


WELL = [evaluation(0, 0.0), *ppo(), evaluation(12, 1.2, 1.0)]
KNOWN = Known(held_out=64, judges={"judge": "the judge"}, reward_accuracy=0.8, reward_mean=0.0, reward_std=1.0)

# check -> (records and what is known that show it, what has to be said), (records just beyond which it is silent)
SHOWN = {
    "all_rewards_fail": [
        (([evaluation(0, float("nan"), invalid_scores=1.0)], KNOWN), ["the evaluation at update 0"], ["log.txt"]),
        ((ppo(3, invalid_scores=1.0, reward=None), KNOWN), ["update 3"], ["Mend the reward"]),
    ],
    "constant_reward": [
        ((ppo(3, reward=2.0, reward_std=0.0), KNOWN), ["update 3", "the same score, 2."], ["tell responses apart"]),
        (([evaluation(0, 1.5, reward_std=0.0)], KNOWN), ["evaluation at update 0"], ["prompts"]),
    ],
    "reward_at_chance": [
        ((WELL, KNOWN._replace(reward_accuracy=0.51)), ["51.0% of the pairs", "50%"], ["--reward.epochs"]),
        (([{"step": 9, "phase": "reward", "heldout_accuracy": 0.5}], Known()), ["50.0%"], ["--reward.lora-layers"]),
    ],
    "scores_far_from_known": [
        (([evaluation(0, 31.0)], KNOWN), ["scores 31.00, 31 standard deviations", "0.00 ± 1.00"], ["--reference"]),
    ],
    "exploded": [
        ((ppo(grad_norm=lambda i: 10213.0 if i == 9 else 1.3), KNOWN), ["step 9", "10,213", "1.3"], ["learning rate"]),
        ((ppo(nonfinite_updates=lambda i: float(i == 4)), KNOWN), ["update 4", "not finite"], ["max-grad-norm"]),
        (([{"step": i, "phase": "sft", "loss": 2.0 if i < 8 else 900.0} for i in range(9)], Known()), ["sft"], [""]),
    ],
    "nothing_moves": [
        ((ppo(5, clip_fraction=0.0, kl=1e-4), KNOWN), ["After 5 updates", "clip fraction 0"], ["at most 0.001 so far"]),
    ],
    "policy_dead": [
        (([*WELL, evaluation(20, 1.2, 1.0, kl=0.3 * 12)], KNOWN), ["12 and 20 are"], ["--hyper.learning-rate"]),
    ],
    "kl_explodes": [
        ((ppo(kl=60.0, kl_per_token=2.5), KNOWN), ["update 12", "60 nats", "2.5 per token"], ["(now 0.05)"]),
        (([evaluation(12, 1.0, kl=40.0, kl_per_token=1.2)], KNOWN), ["evaluation at update 12"], ["--hyper.kl-coef"]),
    ],
    "entropy_collapses": [
        ((ppo(entropy=lambda i: 2.0 / i**2), KNOWN), ["fell from 0.91 to 0.017"], ["--hyper.entropy-coef"]),
    ],
    "responses_shrink": [
        ((ppo(response_length=lambda i: 24.0 - 2 * i), KNOWN), ["from 20.0 to 2.0 tokens"], ["short texts"]),
    ],
    "responses_all_cut": [
        ((ppo(3, eos_rate=0.0), KNOWN), ["cut at 20 tokens"], ["--ppo.sampling.response-length"]),
    ],
    "critic_dead": [
        ((ppo(explained_variance=0.004), KNOWN), ["12 updates", "nothing", "variance 0.00"], ["--hyper.vf-coef"]),
        (
            (ppo(explained_variance=0.0, value_clip_fraction=0.9, return_std=20.0), KNOWN),
            ["90% of its tokens are at the value clip"],
            ["--hyper.value-clip", "standard deviation is 20"],
        ),
    ],
    # errors of 64 prompts: sqrt(2 / 64) = 0.18; the reward rose by 5 of them, the judge fell by 2
    "gamed": [
        (([evaluation(0, 0.0, 1.0), evaluation(9, 0.9, 0.6)], KNOWN), ["the judge"], ["--loop.best-metric judge"]),
    ],
    "few_prompts": [
        ((WELL, KNOWN._replace(held_out=16)), ["16 held-out prompts", "is 0.25, 25% of its spread"], ["--held-out"]),
    ],
}  # fmt: skip
SILENT = {
    "all_rewards_fail": [(ppo(3, invalid_scores=0.9), KNOWN)],
    "constant_reward": [(ppo(2, reward_std=0.0), KNOWN), (ppo(3, reward_std=lambda i: i == 2), KNOWN)],
    "reward_at_chance": [(WELL, KNOWN._replace(reward_accuracy=0.56)), (WELL, Known())],
    "scores_far_from_known": [([evaluation(0, 4.9)], KNOWN), ([evaluation(0, 31.0)], Known())],
    "exploded": [
        (ppo(grad_norm=lambda i: 999.0 if i == 9 else 20.0), KNOWN),
        (ppo(grad_norm=lambda i: 9999.0 if i == 1 else 1.0), KNOWN),  # a start, no explosion
    ],
    "nothing_moves": [
        (ppo(4, clip_fraction=0.0, kl=0.0), KNOWN),
        (ppo(clip_fraction=0.0), KNOWN),
        (ppo(kl=0.0), KNOWN),
    ],
    "policy_dead": [([*WELL, evaluation(20, 1.2, 1.0, kl=3.61)], KNOWN), ([WELL[0], WELL[0]], KNOWN)],
    "kl_explodes": [(ppo(kl=60.0, kl_per_token=0.5), KNOWN), (ppo(kl=19.0, kl_per_token=3.0), KNOWN)],
    "entropy_collapses": [(ppo(5, entropy=lambda i: 2.0 / i**2), KNOWN), (ppo(entropy=lambda i: 2 / i**0.5), KNOWN)],
    "responses_shrink": [(ppo(response_length=lambda i: 24.0 - i), KNOWN)],
    "responses_all_cut": [(ppo(2, eos_rate=0.0), KNOWN), (ppo(eos_rate=lambda i: 0.1 * (i % 2)), KNOWN)],
    "critic_dead": [
        (ppo(9, explained_variance=0.0), KNOWN),
        (ppo(explained_variance=0.04), KNOWN),
        (ppo(explained_variance=0.0, clip_fraction=0.0, kl=0.0), KNOWN),  # nothing moves, and that is said
    ],
    "gamed": [
        ([evaluation(0, 0.0, 1.0), evaluation(9, 0.3, 0.6)], KNOWN),  # 1.7 errors: the reward may not have risen
        ([evaluation(0, 0.0, 1.0), evaluation(9, 0.9, 0.9)], KNOWN),  # 0.6 errors: the judge may not have fallen
        ([evaluation(0, 0.0, 1.0, b=0.0, b_std=1.0), evaluation(9, 0.9, 0.6, b=1.0, b_std=1.0)], KNOWN),
    ],
    "few_prompts": [(WELL, KNOWN._replace(held_out=32)), (WELL, Known()), ([], KNOWN._replace(held_out=4))],
}  # fmt: skip


def test_every_check_has_both_cases() -> None:
    names = [check.__name__ for check in CHECKS]
    assert sorted(names) == sorted(SHOWN) == sorted(SILENT) and len(set(names)) == len(names)


def test_the_documentation_has_every_check() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "health.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "--" not in line] == [
        check.__name__ for check in CHECKS
    ]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in SHOWN.items() for case in cases])
def test_what_is_wrong_is_said_with_its_numbers_and_the_option(name: str, case: tuple) -> None:
    given, said, advised = case
    found = {finding.check: finding for finding in examine(*given)}
    assert name in found, found
    assert all(part in found[name].text for part in said), found[name].text
    assert all(part in found[name].advice for part in advised), found[name].advice
    assert found[name].text.endswith(".") and found[name].advice.endswith(".")


@pytest.mark.parametrize(("name", "given"), [(name, case) for name, cases in SILENT.items() for case in cases])
def test_what_is_not_there_is_not_said(name: str, given: tuple) -> None:
    assert name not in [finding.check for finding in examine(*given)]


def test_a_run_that_is_well_has_no_findings() -> None:
    assert examine(WELL, KNOWN) == [] and examine([], KNOWN) == [] and examine([]) == []


def test_records_of_any_kind_break_no_check() -> None:
    nulls = dict.fromkeys(WELL[1])
    broken = [nulls | {"step": i, "phase": phase} for phase in ("ppo", "eval") for i in range(9)]
    extremes = {"reward": "Infinity", "kl": "-Infinity", "grad_norm": "Infinity"}
    infinite = [{"step": i, "phase": "ppo", **extremes} for i in range(9)]
    assert examine(broken, KNOWN) == [] and examine(infinite, KNOWN) == []


def test_a_finding_is_said_when_it_first_holds_and_once() -> None:
    said: list[str] = []
    write = watch(KNOWN, said.append)
    for record in ppo(8, eos_rate=lambda i: 0.0 if i > 4 else 0.5):
        write(record["step"], "ppo", {n: v for n, v in record.items() if n not in ("step", "phase")})
        assert len(said) == (record["step"] >= 7)  # three batches in a row
    assert said[0].startswith("health: No response ends by itself")


def test_a_run_that_goes_on_does_not_say_again_what_held_before() -> None:
    said: list[str] = []
    earlier = ppo(5, eos_rate=0.0)
    write = watch(KNOWN, said.append, earlier)
    write(6, "ppo", {"eos_rate": 0.0, "response_length": 20.0})
    assert said == [] and len(earlier) == 5
    write(6, "eval", {"reward": 1.0, "reward_std": 0.0})
    assert len(said) == 1 and "same score" in said[0]


def test_what_is_known_is_read_from_facts_that_may_be_missing() -> None:
    assert known_from({}) == Known()
    facts = {"held_out": 8, "judges": {"a": "A"}, "reward_accuracy": None, "reward_mean": 0.5, "reward_std": 2}
    assert known_from(facts) == Known(8, {"a": "A"}, None, 0.5, 2.0)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_runs_that_were_made_to_show_it(path: Path) -> None:
    """The first line says what the checks have to find in the metrics of a real run; the rest are its records."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected, records = lines[0], lines[1:]
    found = [finding.check for finding in health.examine(records, known_from(expected["known"]))]
    assert found == expected["findings"], expected["run"]
