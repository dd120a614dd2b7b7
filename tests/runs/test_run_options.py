"""Options that a whole run has to carry: pretraining texts, a critic of its own, an average of the policy."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smoke
from ppo_jax.data import right_pad
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig, init_adapter, unembedding
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.heads import RewardHead, last_token, score
from ppo_jax.models.roles import role_hidden
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.train.options import CriticConfig
from ppo_jax.types import Scores
from tests.runs.test_ppo import MODEL, SETUP, run
from tests.train.toy import assert_close, noisy

TEXTS = [row for row in SETUP.prompts.rows if len(row) > 1]
SHORT = dataclasses.replace(SETUP.loop, updates=2)
OWN = AdapterConfig(layers=2, rank=2)


def reward_role() -> RewardRole:
    head = RewardHead().init(jax.random.key(5), jnp.zeros((1, MODEL.config.hidden_size)))["params"]
    return RewardRole(noisy(init_adapter(jax.random.key(6), MODEL.params, MODEL.config, OWN)), head)


def test_pretraining_texts_go_through_a_run(tmp_path: Path) -> None:
    """As many texts as an update has responses, so each is in it once: their mean negative log-likelihood per token."""
    texts, one = TEXTS[:8], dataclasses.replace(SHORT, updates=1)
    run(tmp_path, hyper=_still()._replace(ptx_coef=0.5), pretrain=texts, loop=one)
    (line,) = [record for record in read_jsonl(tmp_path / rundir.METRICS) if record["phase"] == "ppo"]
    tokens, mask = right_pad(texts, max(map(len, texts)), 0)
    hidden = role_hidden(MODEL.params, {}, MODEL.config, jnp.asarray(tokens), jnp.asarray(mask))
    logits = np.asarray(hidden @ unembedding(MODEL.params, {}).T, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    said = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert line["ptx_loss"] == pytest.approx(-said[mask[:, 1:]].mean(), rel=1e-4)


def test_a_critic_of_its_own_and_the_average_go_through_a_run(tmp_path: Path) -> None:
    ppo = dataclasses.replace(SETUP.ppo, critic=CriticConfig(own=True, adapter=OWN), ema_decay=0.5)
    result = run(tmp_path, ppo=ppo, loop=SHORT)
    found = {name: artifacts.load(tmp_path / EXPORT / name, "policy") for name in ("policy", "critic", "ema")}
    assert_close(found["critic"].adapter, result.policy.critic)
    assert_close(found["critic"].head, result.policy.value_head)
    average, last, first = (x.adapter["lora"]["q"].b for x in (found["ema"], found["policy"], SETUP))
    gone = [float(np.abs(np.asarray(x) - np.asarray(first)).mean()) for x in (average, last)]
    assert 0 < gone[0] < gone[1], "the average is on its way from the start to the last policy"

    again = dataclasses.replace(ppo, critic=CriticConfig(own=True, init=str(tmp_path / EXPORT / "critic")))
    continued = run(tmp_path / "again", ppo=again, loop=dataclasses.replace(SHORT, updates=1), hyper=_still())
    assert_close(continued.policy.critic, result.policy.critic, atol=1e-5)
    assert_close(continued.policy.value_head, result.policy.value_head, atol=1e-5)


def test_a_critic_from_the_reward_model_values_states_by_their_score(tmp_path: Path) -> None:
    role = reward_role()
    ppo = dataclasses.replace(SETUP.ppo, critic=CriticConfig(own=True, init="reward"))
    setup = SETUP._replace(
        ppo=ppo,
        hyper=_still(),
        loop=dataclasses.replace(SHORT, updates=1),
        reward=Reward(adapter_reward(MODEL.config, MODEL.stop_ids), params=role),
    )
    with progress("test", main_process=False) as screen:
        result = run_ppo(rundir.open_run(tmp_path), setup, screen)
    tokens = jnp.array([TEXTS[0][:2]], jnp.int32)
    mask = jnp.ones_like(tokens, bool)
    hidden = [role_hidden(MODEL.params, x, MODEL.config, tokens, mask) for x in (result.policy.critic, role.adapter)]
    kernel, bias = (result.policy.value_head["value"][name] for name in ("kernel", "bias"))
    said = last_token(hidden[0], mask) @ kernel + bias
    np.testing.assert_allclose(said[:, 0], score(role.head, last_token(hidden[1], mask)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("special_tokens", ["drop", "keep"])
def test_special_tokens_reach_the_hosts_reward_where_they_are_kept(tmp_path: Path, special_tokens: str) -> None:
    """In updates and evaluations. "great" stands for <think>; the token that ended a response is never part of it."""
    tokenizer = copy.deepcopy(MODEL.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["great"]})
    assert len(tokenizer) == len(MODEL.tokenizer)
    read: dict[int, str] = {}  # all that was read of batches with so many rows: 8 in updates, 6 in evaluations

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
        read[len(prompts)] = read.get(len(prompts), "") + " ".join(responses)
        return Scores(np.ones(len(prompts)), np.ones(len(prompts), bool), {})

    setup = SETUP._replace(
        model=MODEL._replace(tokenizer=tokenizer),
        reward=Reward(host=reward, special_tokens=special_tokens),
        loop=dataclasses.replace(SHORT, updates=1),
    )
    with progress("test", main_process=False) as screen:
        run_ppo(rundir.open_run(tmp_path), setup, screen)
    assert read.keys() == {8, 6} and not any(smoke.END in text for text in read.values())
    assert all(("great" in text) == (special_tokens == "keep") for text in read.values())


def test_a_critic_does_not_start_from_a_reward_model_on_a_cut_trunk(tmp_path: Path, screen: Any) -> None:
    """Its adapter touches the last of the layers that it reads, which are others than the last of the base."""
    trunk = dataclasses.replace(MODEL.config, num_layers=1)
    reward = Reward(adapter_reward(trunk, MODEL.stop_ids), params=reward_role(), layers=1)
    ppo = dataclasses.replace(SETUP.ppo, critic=CriticConfig(own=True, init="reward"))
    with pytest.raises(ValueError, match="needs a reward model that reads all 4 layers of the base; this one reads 1"):
        run_ppo(tmp_path, SETUP._replace(reward=reward, ppo=ppo), screen)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hyper.ptx_coef=0.5 and 0 pretraining texts: give both"):
        run(tmp_path / "a", hyper=SETUP.hyper._replace(ptx_coef=0.5))
    with pytest.raises(ValueError, match="2 pretraining texts, but an update has 8 responses: give more"):
        run(tmp_path / "b", hyper=SETUP.hyper._replace(ptx_coef=0.5), pretrain=TEXTS[:2])
    with pytest.raises(ValueError, match='critic.init="reward" needs a LoRA reward model'):
        run(tmp_path / "c", ppo=dataclasses.replace(SETUP.ppo, critic=CriticConfig(own=True, init="reward")))


def _still():
    """A run whose parameters all but stay where they start."""
    return SETUP.hyper._replace(learning_rate=1e-12, critic_lr_scale=1.0)
