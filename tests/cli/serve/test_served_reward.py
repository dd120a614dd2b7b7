"""A served reward model called by the HTTP reward: both ends of docs/rewards.md, over a real socket."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import serve_load
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.rewards.api import APIConfig
from ppo_jax.rewards.loading import Scorer, load_scorer
from ppo_jax.rewards.options import RewardOptions, choose_reward
from tests.cli.serve.test_server import running, score_rows
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import CONFIG, random_params

MODEL = Model("tiny", CONFIG, random_params(CONFIG), make_tokenizer(), "0" * 64)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/evaluation"])
def test_served_and_called_scores_are_the_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str):
    """Four requests at once to a server that batches them: none lost, none swapped, and the token goes along."""
    monkeypatch.setenv("SCORES_TOKEN", "s3cret")
    scorer = load_scorer(serve_load.tiny_model(tmp_path / "reward"), batch_sizes=(4,))
    prompts = ["the film", "a", "really", "the plot was"] * 4
    responses = [f" is{' very' * i} dull and lovely" for i in range(16)]
    expected = scorer.score(prompts, responses)
    assert len(set(expected.round(4))) > 8
    options = RewardOptions(token_env="SCORES_TOKEN", api=APIConfig(rows_per_request=2))
    with running(scorer, token="s3cret") as url:
        chosen = choose_reward([url + path], options, MODEL, MODEL.stop_ids)
        assert chosen.host is not None
        found = chosen.host(prompts, responses, [{"id": i} for i in range(16)])
        refused = choose_reward([url + path], RewardOptions(), MODEL, MODEL.stop_ids)
        assert refused.host is not None and not refused.host(["a"], ["b"], [{}]).valid.any()
    np.testing.assert_allclose(found.reward, expected, atol=1e-5)
    assert found.valid.all() and chosen.failures.counts == {}
    assert refused.failures.counts == {"the service answered HTTP 401": 1}


def test_a_lora_model_is_served_on_its_base(tmp_path: Path):
    """Adapter, head and base of three places; the adapter counts, and HTTP changes nothing."""
    hf.save(tmp_path / "base", CONFIG, MODEL.params, make_tokenizer())
    model = load_model(tmp_path / "base")
    plain = init_adapter(jax.random.key(1), model.params, CONFIG, AdapterConfig(layers=1, rank=2))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), plain)
    head = RewardHead().init(jax.random.key(3), jnp.zeros((1, CONFIG.hidden_size)))["params"]
    for name, tree in (("plain", plain), ("lora", adapter)):
        artifacts.save(tmp_path / name, "reward", tree, head, model.base)
    prompts, responses = ["ab", "c", "de fg"], ["cd", " e.", "h"]
    scorer = load_scorer(tmp_path / "lora", batch_sizes=(4,))
    expected, without = scorer.score(prompts, responses), load_scorer(tmp_path / "plain").score(prompts, responses)
    assert np.abs(expected - without).min() > 1e-3
    with running(scorer) as url:
        chosen = choose_reward([f"{url}/v1/score"], RewardOptions(), MODEL, MODEL.stop_ids)
        assert chosen.host is not None
        found = chosen.host(prompts, responses, [{}] * 3)
    np.testing.assert_allclose(found.reward, expected, atol=1e-5)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/evaluation"])
def test_a_row_that_the_model_cannot_score_fails_alone(path: str):
    """The stand-in model gives NaN for a text with q: that row is invalid here, by either protocol, and never 0."""
    with running(Scorer("plain", make_tokenizer(), [], 20, score_rows, {})) as url:
        chosen = choose_reward([url + path], RewardOptions(), MODEL, MODEL.stop_ids)
        assert chosen.host is not None
        found = chosen.host(["ab", "q", "c"], ["c", "a", "d"], [{}, {}, {}])
    np.testing.assert_array_equal(found.valid, [True, False, True])
    np.testing.assert_array_equal(found.reward, np.array([2 + 3 + 4, np.nan, 4 + 5], np.float32))
    assert sum(chosen.failures.counts.values()) == 1
