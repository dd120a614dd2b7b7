"""What happens to a failed score, by every way that a score can come: it is invalid and NaN, and never 0."""

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax.models.heads import last_token
from ppo_jax.models.roles import role_hidden
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.api import APIConfig, api_reward
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rewards.combine import scaled, weighted_sum
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rewards.function import FunctionConfig, function_reward
from ppo_jax.rewards.model import FullReward, model_reward, row_scorer, text_reward
from ppo_jax.rewards.scores import as_scores, only_finite, to_scores
from ppo_jax.types import Frozen, PyTree, Rollout, Scores
from tests.models.tiny import CONFIG, random_params
from tests.rewards.faulty_server import says, serving
from tests.train import toy

BAD = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "too large": 1e39}
TEXTS = (["p", "p"], ["good", "bad"], [{}, {}])
BASE = random_params(CONFIG)
ROWS = [[3, 5], [3, 9]]  # the second of each is the response: 5 is scored well, 9 is not


def rollout() -> Rollout:
    on, zeros = jnp.ones((2, 1), bool), jnp.zeros((2, 1))
    return Rollout(jnp.array(ROWS, jnp.int32), on, on, zeros, zeros, zeros, jnp.zeros(2, bool), jnp.arange(2))


def model(bad: float) -> tuple[PyTree, PyTree]:
    """Base and head of a reward model whose score of the second row is not finite; that of the first is 2^126."""
    drawn = rollout()
    hidden = last_token(role_hidden(BASE, {}, CONFIG, drawn.tokens, drawn.mask), drawn.mask)
    kernel = np.linalg.lstsq(np.asarray(hidden, np.float64), np.array([1.0, 4.0]), rcond=None)[0]
    gain = 2.0**126 * (1 if np.isnan(bad) else np.sign(bad))
    head = {"reward": {"kernel": jnp.asarray(kernel[:, None], jnp.float32)}, "gain": jnp.float32(gain)}
    base = BASE | ({"embedding": BASE["embedding"].at[9].set(jnp.nan)} if np.isnan(bad) else {})
    return base, head | {"bias": jnp.float32(0)}


def on_device(reward: DeviceReward, frozen: Frozen) -> Scores:
    return jax.jit(partial(reward, prefix=None, prefix_layers=0))(frozen, rollout())


def adapter(bad: float) -> Scores:
    base, head = model(bad)
    return on_device(adapter_reward(CONFIG, ()), Frozen(base, RewardRole({}, head)))


def adapter_times_a_weight(bad: float) -> Scores:
    base, head = model(bad)
    return on_device(scaled(adapter_reward(CONFIG, ()), 0.5), Frozen(base, RewardRole({}, head)))


def full(bad: float) -> Scores:
    return on_device(model_reward(CONFIG, ()), Frozen({}, FullReward(*model(bad))))


def text(bad: float) -> Scores:
    base, head = model(bad)
    rows = row_scorer(base, RewardRole({}, head), CONFIG, 16)
    return text_reward(rows, lambda prompts, responses: ROWS)(*TEXTS)


def function(bad: float) -> Scores:
    return function_reward(lambda *_: [0.25, bad], FunctionConfig(), FailureLog())(*TEXTS)


def service(bad: float) -> Scores:
    with serving(always=says([{"score": 0.25}, {"score": bad}])) as server:  # Python's JSON writes NaN and Infinity
        return api_reward(server.url, APIConfig(protocol="ppo_jax"), FailureLog())(*TEXTS)


def anybody(bad: float) -> Scores:
    """A host reward of somebody else, which says that all is well."""
    return as_scores(Scores(np.array([0.25, bad]), np.ones(2, bool), {}), 2)


def anybody_on_the_device(bad: float) -> Scores:
    with np.errstate(over="ignore"):
        reward = jnp.asarray(np.array([0.25, bad]).astype(np.float32))
    return jax.jit(only_finite)(Scores(reward, jnp.ones(2, bool), {}))


def summed(bad: float) -> Scores:
    def one(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
        return Scores(np.array([0.25, bad]), np.ones(2, bool), {})

    def other(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
        return to_scores([1, 2])

    return weighted_sum({"one": (one, 0.0), "other": (other, 1.0)})(*TEXTS)


WAYS = [adapter, adapter_times_a_weight, full, text, function, service, anybody, anybody_on_the_device, summed]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_a_failed_score_is_invalid_and_never_0(way: Callable[[float], Scores], bad: str):
    scores = way(BAD[bad])
    assert np.asarray(scores.valid).tolist() == [True, False], scores
    assert np.isfinite(scores.reward[0]) and np.isnan(scores.reward[1])
    assert scores.reward.dtype == np.float32


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_row_fails_by_its_own_word_or_that_of_one_of_its_tokens(xp: Any):
    tokens = xp.array([[0.0, 1.0], [0.0, np.inf], [0.0, 1.0]])
    scores = to_scores(xp.array([1.0, 2.0, 3.0]), {"x": xp.array([4, 5, 6])}, tokens, xp.array([1, 1, 0]))
    assert isinstance(scores.reward, jax.Array) == (xp is jnp)
    np.testing.assert_array_equal(scores.reward, [1, np.nan, np.nan])
    np.testing.assert_array_equal(scores.valid, [True, False, False])
    assert scores.parts["x"].dtype == np.float32 and scores.parts["x"].tolist() == [4, 5, 6]


def test_nothing_is_learnt_from_a_failed_score_whatever_its_reward_says_of_it():
    """An iteration with a reward that calls its NaN valid is one with a reward that calls the same row invalid."""

    def says_all_is_well(frozen: Frozen, rollout: Rollout, prefix: Any, depth: int) -> Scores:
        scores = toy.worth(frozen, rollout, prefix, depth)
        return scores._replace(reward=scores.reward.at[3].set(jnp.inf))

    def says_so(frozen: Frozen, rollout: Rollout, prefix: Any, depth: int) -> Scores:
        scores = toy.worth(frozen, rollout, prefix, depth)
        return scores._replace(valid=scores.valid.at[3].set(False))

    results = []
    for reward in (says_all_is_well, says_so):
        run = ppo_jax.make_iteration(toy.CONFIG, toy.ONCE, ppo_jax.make_optimizer(), reward)
        results.append(run(toy.start(), toy.FROZEN, toy.prompts(), toy.HYPER))
    (state, metrics), (other, others) = results
    assert toy.numbers(metrics)["invalid_scores"] == 1 / toy.B
    toy.assert_close((state.policy, metrics), (other.policy, others), rtol=0, atol=0)


def finiteness(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("isfinite", "isnan", "isinf", "nan_to_num"):
            yield ast.unparse(node)


def test_no_other_module_of_the_rewards_decides_what_is_finite():
    folder = Path(ppo_jax.__file__).parent
    users = [*folder.glob("rewards/*.py"), *folder.glob("cli/serve/*.py")]
    users += [folder / name for name in ("train/host.py", "train/evaluate.py", "runs/evaluation.py", "runs/ppo.py")]
    found = {path.stem: list(finiteness(path)) for path in users}
    assert found.pop("scores") and len(found) > 15
    assert found.pop("options") == ["math.isfinite"]  # of a weight, which is no score
    assert not any(found.values()), found
