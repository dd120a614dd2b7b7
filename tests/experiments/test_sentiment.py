"""The sentiment experiment on the toy world: one whole run, one that was killed and resumed, and what they leave."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import movie_reviews, sentiment, smoke
from experiments.sentiment import PRESETS, SMOKE, SentimentConfig, main, prompt_set, sentence_ends, vader_score, world
from ppo_jax.cli.parse import parse
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import init_adapter
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.state import init_state

UPDATES = SMOKE.loop.updates
TIMES = ("time", "seconds", "tokens_per_second")


class Runs(NamedTuple):
    whole: Path  # ran to its end
    resumed: Path  # a copy that lost its last checkpoint, with the records of updates that it must do again
    cache: Path
    trained: dict[str, int]  # file of the reward models' cache -> when it was written, after the first run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sentiment")
    whole, resumed, cache = folder / "whole", folder / "resumed", folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPO_JAX_CACHE", str(cache))
        main(["--preset", "smoke", "--run-dir", str(whole)])
        trained = {str(file): file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / rundir.CHECKPOINTS / str(UPDATES))
        for name in (rundir.REPORT, rundir.SUMMARY):
            (resumed / name).unlink()
        with (resumed / rundir.METRICS).open("a") as file:
            file.write('{"step": 5, "phase": "ppo", "rew')  # torn by the kill
        main(["--preset", "smoke", "--run-dir", str(resumed), "--resume"])
    return Runs(whole, resumed, cache, trained)


def records(run: Path) -> list[dict]:
    return read_jsonl(run / rundir.METRICS)


def timeless(run: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records(run)]


def samples(run: Path) -> list[dict]:
    return read_jsonl(run / rundir.SAMPLES)


def test_config_file_repeats_the_run(runs: Runs):
    again = parse(SentimentConfig, ["--config", str(runs.whole / rundir.CONFIG)], presets=PRESETS)
    assert again == SMOKE.__class__(**{**SMOKE.__dict__, "run_dir": runs.whole})


def test_metrics_hold_each_update_and_evaluation_once(runs: Runs):
    for run in (runs.whole, runs.resumed):
        steps = [(record["phase"], record["step"]) for record in records(run)]
        assert [step for phase, step in steps if phase == "ppo"] == [1, 2, 3, 4]
        assert [step for phase, step in steps if phase == "eval"] == [0, 2, 4]
        assert len(set(steps)) == len(steps)
    for record in records(runs.whole):
        if record["phase"] == "ppo":
            wanted = {"reward", "kl", "entropy", "clip_fraction", "explained_variance", "response_length", "eos_rate"}
            assert wanted <= record.keys()
            assert all(isinstance(record[name], float) for name in wanted)
    rates = [record["learning_rate"] for record in records(runs.whole) if record["phase"] == "ppo"]
    np.testing.assert_allclose(rates, np.array([4, 3, 2, 1]) / 4 * SMOKE.hyper.learning_rate, rtol=1e-6)


def test_resumed_run_equals_the_one_that_was_never_interrupted(runs: Runs):
    """Defect 18: nothing that decides the future was missing from the checkpoint. Bit by bit, reports included."""
    assert timeless(runs.resumed) == timeless(runs.whole)
    assert samples(runs.resumed) == samples(runs.whole)
    kept = [read_jsonl(run / rundir.EVALUATIONS) for run in (runs.whole, runs.resumed)]
    assert kept[0] == kept[1] and [line["step"] for line in kept[0]] == [0, 2, 4]
    assert len(rundir.read_facts(runs.whole)["sessions"]) == 1 and len(rundir.read_facts(runs.resumed)["sessions"]) == 2
    final = [artifacts.load(run / EXPORT / "policy") for run in (runs.whole, runs.resumed)]
    for left, right in zip(*(jax.tree.leaves((found.adapter, found.head)) for found in final), strict=True):
        np.testing.assert_array_equal(left, right)
    summaries = [rundir.read_summary(run) for run in (runs.whole, runs.resumed)]
    assert summaries[0]["before"] == summaries[1]["before"] and summaries[0]["after"] == summaries[1]["after"]


def test_second_run_reuses_the_reward_models(runs: Runs):
    now = {str(file): file.stat().st_mtime_ns for file in runs.cache.rglob("*") if file.is_file()}
    assert now == runs.trained and now
    assert len({Path(file).parent for file in now}) == 2  # the reward and its judge


def test_a_directory_that_holds_a_run_is_refused_and_untouched(runs: Runs):
    before = {str(file): file.stat().st_mtime_ns for file in runs.whole.rglob("*")}
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        main(["--preset", "smoke", "--run-dir", str(runs.whole)])
    assert {str(file): file.stat().st_mtime_ns for file in runs.whole.rglob("*")} == before


def test_everything_promised_is_there(runs: Runs):
    assert all((runs.whole / name).exists() for name in rundir.LAYOUT)
    pictures = {path.stem: path.read_bytes()[:5] for path in (runs.whole / rundir.PLOTS).glob("*.svg")}
    of_evaluations = {"reward_kl", "reward_sqrt_kl", "judges", "scores", "reward_distribution", "length_distribution"}
    assert of_evaluations | {"explained_variance", "response_length"} <= pictures.keys()
    assert set(pictures.values()) == {b"<svg "} and (runs.whole / rundir.README).exists()
    assert store.all_steps(runs.whole / rundir.CHECKPOINTS) == [2, 4]
    phases = {path.parent.name for path in (runs.whole / rundir.TENSORBOARD).rglob("*tfevents*")}
    assert {"ppo", "eval"} <= phases


def test_report_is_one_file_with_curves_samples_and_numbers(runs: Runs):
    page = (runs.whole / rundir.REPORT).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|[\w./-]+\.(png|css|js)\b)""", page), "loads nothing"
    assert "@import" not in page and "<link" not in page
    assert page.count("<svg") >= 10
    assert sentiment.TOY_TASK in page
    for claim in ("SmolLM2", "human rater", "People rated", "people did"):
        assert claim not in page, "a smoke run says nothing of these"
    first = samples(runs.whole)[0]
    assert first["prompt"] in page and first["response"].strip() in page
    summary = rundir.read_summary(runs.whole)
    evaluations = {r["step"]: r for r in records(runs.whole) if r["phase"] == "eval"}
    for when, step in (("before", 0), ("after", UPDATES)):
        assert summary[when]["reward"] == pytest.approx(evaluations[step]["reward"])
        assert f"{abs(summary[when]['reward']):.2f}" in page


def test_samples_are_of_the_same_held_out_prompts_at_every_evaluation(runs: Runs):
    by_step: dict[int, list[dict]] = {}
    for sample in samples(runs.whole):
        by_step.setdefault(sample["step"], []).append(sample)
    assert list(by_step) == [0, 2, 4]
    prompts = [[sample["prompt"] for sample in found] for found in by_step.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) == SMOKE.eval_prompts
    _, splits = world(SMOKE)
    assert all(any(review.text.startswith(prompt) for review in splits.test) for prompt in prompts[0])
    assert [s["response"] for s in by_step[0]] != [s["response"] for s in by_step[4]], "the policy has moved"


@pytest.mark.parametrize("column", ["reward", "judge"])
def test_scores_are_what_the_saved_models_say_of_the_text_alone(runs: Runs, column: str):
    """From samples.jsonl and the cache: tokenised anew, unpadded, without the stop token."""
    (folder,) = (runs.cache / "reward-models").glob(f"{column}-*")
    found = artifacts.load(folder, "reward")
    model = smoke.model(SMOKE.seed)
    artifacts.check_base(found, model.fingerprint, model.config)
    score = jax.jit(score_tokens, static_argnums=2)
    for sample in [s for s in samples(runs.whole) if s["step"] == UPDATES][:4]:
        ids = model.tokenizer(f"{sample['prompt']} {sample['response']}", add_special_tokens=False)["input_ids"]
        tokens = jnp.asarray([ids + [0] * (24 - len(ids))], jnp.int32)
        mask = jnp.arange(24)[None] < len(ids)
        role = RewardRole(found.adapter, found.head)
        alone = score(model.params, role, found.trunk(model.config), tokens, mask)[0]
        assert sample["scores"][column] == pytest.approx(float(alone), rel=1e-3, abs=1e-4)


def test_vader_judges_prompt_and_response_together(runs: Runs):
    for sample in samples(runs.whole):
        assert sample["scores"]["vader"] == vader_score(sample["prompt"] + sample["response"])
    assert vader_score("a great and lovely film") > 0.5 > -0.5 > vader_score("an awful, boring film")


def test_export_is_the_policy_of_the_last_checkpoint(runs: Runs):
    model = smoke.model(SMOKE.seed)
    adapter = init_adapter(jax.random.key(1), model.params, model.config, SMOKE.policy)
    target = init_state(jax.random.key(1), adapter, model.config, make_optimizer(), 0.0)
    state, step = store.restore(runs.whole / rundir.CHECKPOINTS, target)
    assert step == int(state.step) == UPDATES
    found = artifacts.load(runs.whole / EXPORT / "policy", "policy")
    artifacts.check_base(found, model.fingerprint, model.config)
    saved = jax.tree.leaves((found.adapter, found.head))
    for left, right in zip(saved, jax.tree.leaves((state.policy.adapter, state.policy.value_head)), strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(found.head)), "the value head was trained"


def test_summary_is_strict_json(runs: Runs):
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((runs.whole / rundir.SUMMARY).read_text(), parse_constant=refuse)


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_presets_fit_their_batches_and_prompts():
    for name, preset in PRESETS.items():
        preset.ppo.check_batch(preset.loop.batch_size)
        assert preset.run_dir.name.startswith("sentiment"), name
    assert len({preset.run_dir for preset in PRESETS.values()}) == len(PRESETS)


def test_parts_of_the_world_are_disjoint():
    _, splits = world(SMOKE)
    parts = [{review.text for review in part} for part in splits]
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_prompts_are_openings_that_fit():
    model, splits = world(SMOKE)
    prompts = prompt_set(model, splits.prompts, 4, np.random.default_rng(0))
    assert 0 < len(prompts.rows) == len(prompts.texts) == len(prompts.metadata)
    assert all(1 <= len(row) <= 4 for row in prompts.rows)
    assert [model.decode(np.array(row)) for row in prompts.rows] == list(prompts.texts)
    assert len(prompt_set(model, splits.prompts, 4, np.random.default_rng(0), count=3).rows) == 3
    with_all = prompt_set(model, splits.prompts, 99, np.random.default_rng(0))
    assert len(with_all.rows) == len(movie_reviews.openings(splits.prompts, np.random.default_rng(0)))


def test_a_response_ends_at_the_end_token():
    model = smoke.model()
    assert model.tokenizer.eos_token_id in sentence_ends(model)
    assert not {model.tokenizer.convert_tokens_to_ids(word) for word in smoke.GOOD + smoke.BAD} & {
        *sentence_ends(model)
    }
