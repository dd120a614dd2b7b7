"""The full reward model on the device and on the host: padding, micro-batches, lengths, and what is compiled."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.heads import RewardHead
from ppo_jax.rewards import model as full
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.model import FullReward, full_scores, model_reward, row_scorer, same_tokens, text_reward
from ppo_jax.types import Frozen, Rollout
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import CONFIG, random_params
from tests.train.toy import noisy

# Another model than the policy's: fewer layers, narrower.
OTHER = dataclasses.replace(CONFIG, num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=2)
HEAD = noisy(RewardHead().init(jax.random.key(1), jnp.zeros((1, 16)))["params"], 3, 0.5)
MODEL = FullReward(random_params(OTHER, seed=5), HEAD)
PAD, STOP = 0, 2
alone_run = jax.jit(score_tokens, static_argnums=2)


def alone(row: list[int]) -> float:
    """The score of one text without padding."""
    tokens = jnp.asarray([row], jnp.int32)
    return float(alone_run(MODEL.params, RewardRole({}, HEAD), OTHER, tokens, jnp.ones(tokens.shape, bool))[0])


def rollout(rows: int = 5) -> Rollout:
    """Left-padded prompts, right-padded responses; some stopped, some were cut."""
    rng = np.random.default_rng(0)
    prompt_mask = np.arange(4) >= rng.integers(0, 4, rows)[:, None]
    lengths = rng.integers(1, 6, rows)
    response_mask = np.arange(5) < lengths[:, None]
    tokens = rng.integers(3, OTHER.vocab_size, (rows, 9))
    tokens[1::2, 4:][np.arange(rows // 2), lengths[1::2] - 1] = STOP
    tokens = np.where(np.concatenate([prompt_mask, response_mask], axis=1), tokens, 10_000)  # unknown to this model
    arrays = map(jnp.asarray, (tokens.astype(np.int32), prompt_mask, response_mask))
    zeros = jnp.zeros((rows, 5))
    return Rollout(*arrays, zeros, zeros, zeros, jnp.zeros(rows, bool), jnp.arange(rows))


def texts(drawn: Rollout) -> list[list[int]]:
    tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
    rows = [row[on].tolist() for row, on in zip(tokens, mask, strict=True)]
    return [row[:-1] if row[-1] == STOP else row for row in rows]


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 5, 9])
def test_rollouts_are_scored_as_their_texts_alone(micro_batch: int) -> None:
    """Whatever the micro-batch, the padding, and the ids that fill it."""
    reward, drawn = model_reward(OTHER, (STOP,), micro_batch), rollout()
    assert isinstance(reward, DeviceReward)
    scores = jax.jit(partial(reward, prefix=None, prefix_layers=0))(Frozen({}, MODEL), drawn)
    expected = [alone(row) for row in texts(drawn)]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores.reward, expected, rtol=1e-4, atol=1e-5)
    assert np.asarray(scores.valid).all()


def test_only_one_micro_batch_is_alive() -> None:
    """XLA's own plan: the temporaries of 32 rows in pieces of 2 are far below those of all at once."""
    shapes = jnp.zeros((32, 64), jnp.int32), jnp.ones((32, 64), bool)
    need = {}
    for micro_batch in (0, 2):
        lowered = jax.jit(full_scores, static_argnums=(1, 4)).lower(MODEL, OTHER, *shapes, micro_batch)
        need[micro_batch] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert need[2] < need[0] / 4


def test_a_score_that_is_not_finite_is_invalid() -> None:
    drawn = rollout()
    first = texts(drawn)[0][0]
    broken = MODEL.params | {"embedding": MODEL.params["embedding"].at[first].set(jnp.nan)}
    scores = model_reward(OTHER, (STOP,))(Frozen({}, FullReward(broken, HEAD)), drawn, None, 0)
    valid = np.asarray(scores.valid)
    assert not valid[0] and valid.any()
    assert valid.tolist() == [first not in row for row in texts(drawn)]


# -- on the host -------------------------------------------------------------------------------------------------------


def test_rows_of_all_lengths_are_scored_as_alone_by_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    real = score_tokens

    def spy(base, role, config, tokens, mask):  # runs when a program is traced
        shapes.add(tokens.shape)
        return real(base, role, config, tokens, mask)

    monkeypatch.setattr(full, "score_tokens", spy)
    score_rows = row_scorer(MODEL.params, RewardRole({}, HEAD), OTHER, 40, batch_sizes=(1, 4))
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, OTHER.vocab_size, n).tolist() for n in (3, 40, 1, 17, 16, 33, 12, 0, 2, 31, 40)]
    expected = [alone(row) if row else np.nan for row in rows]
    np.testing.assert_allclose(score_rows(rows), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score_rows(rows[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)
    assert shapes <= {(size, length) for size in (1, 4) for length in (16, 32, 40)} and len(shapes) < 6
    assert score_rows([]).shape == (0,)


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="a text has 9 tokens, the reward model reads at most 8"):
        row_scorer(MODEL.params, RewardRole({}, HEAD), OTHER, 8)([[1] * 9])


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (16, 16), (17, 32), (33, 64), (65, 100), (100, 100)])
def test_lengths_are_padded_to_powers_of_two(length: int, padded: int) -> None:
    assert full.padded_length(length, 100) == padded


def test_a_text_without_tokens_is_invalid_and_never_0() -> None:
    score_rows = row_scorer(MODEL.params, RewardRole({}, HEAD), OTHER, 40)
    reward = text_reward(
        score_rows,
        lambda prompts, responses: [[ord(c) % 60 for c in p + r] for p, r in zip(prompts, responses, strict=True)],
    )
    assert isinstance(reward, HostReward)
    scores = reward(["ab", ""], ["c", ""], [{}, {}])
    assert scores.valid.tolist() == [True, False] and np.isnan(scores.reward[1])
    assert scores.reward[0] == pytest.approx(alone([ord(c) % 60 for c in "abc"]), rel=1e-4)


def test_tokenizers_are_compared_by_what_they_do() -> None:
    ours = make_tokenizer()
    assert same_tokens(ours, ours) and same_tokens(ours, make_tokenizer(chat=False))
    larger, lower = make_tokenizer(), make_tokenizer()
    larger.add_tokens(["ab"])
    assert not same_tokens(ours, larger)
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not same_tokens(ours, lower)
