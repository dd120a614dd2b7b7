"""Reward models of other people: the score is transformers' own for the closed conversation, wherever it is made."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.loading import load_reward, load_scorer
from ppo_jax.rewards.options import RewardOptions, choose_reward
from ppo_jax.rewards.reading import choose_reading, close_rows
from ppo_jax.types import Frozen, Rollout
from tests.data.test_chat import BLANKS, CHATML, END
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params

SHAPES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
CONFIG = ModelConfig(
    vocab_size=40, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
)
CHATS = [("hi", "good day"), ("a", "b"), ("who is it", "")]
KINDS = ("chatml", "pads with its end", "plain")


def tokenizer_of(kind: str) -> Any:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END, "[", "]"]})
    tokenizer.add_special_tokens({"pad_token": "</s>" if kind == "pads with its end" else "<|pad|>"})
    tokenizer.chat_template = {"chatml": CHATML, "pads with its end": BLANKS.replace("INST", "i"), "plain": None}[kind]
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, as transformers writes it."""
    found = {}
    for kind in KINDS:
        torch.manual_seed(0)
        tokenizer = tokenizer_of(kind)
        config = transformers.LlamaConfig(**SHAPES, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        model = transformers.LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.4)
        found[kind] = tmp_path_factory.mktemp("models") / kind.replace(" ", "-")
        model.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


def logit(path: Path, text: str) -> float:
    """transformers' own of one text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def texts(kind: str) -> tuple[list[str], list[str], list[str]]:
    """(prompts, responses as the policy writes them, closed conversations) of CHATS."""
    tokenizer = tokenizer_of(kind)
    if kind == "plain":
        return [p for p, _ in CHATS], [r for _, r in CHATS], [p + r for p, r in CHATS]
    prompts, closed = [], []
    for asked, answer in CHATS:
        messages = [{"role": "user", "content": asked}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": answer})
        closed.append(tokenizer.apply_chat_template(messages, tokenize=False))
    blank = " " if kind == "pads with its end" else ""  # which that template writes before an answer
    return prompts, [f"{blank}{answer}" for _, answer in CHATS], closed


def rollout(kind: str, ends: list[str], slots: int = 48) -> Rollout:
    """The chats as a policy's responses, ended by the tokens of these texts; "" was cut."""
    tokenizer, (prompts, responses, _) = tokenizer_of(kind), texts(kind)
    tokens, mask = np.full((len(prompts), 2 * slots), 3, np.int32), np.zeros((len(prompts), 2 * slots), bool)
    for i, sides in enumerate(zip(prompts, responses, ends, strict=True)):
        before, answer, end = (tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in sides)
        both = slice(slots - len(before), slots + len(answer) + len(end))
        tokens[i, both], mask[i, both] = before + answer + end, True
    masks = jnp.asarray(mask[:, :slots]), jnp.asarray(mask[:, slots:])
    zeros, count = jnp.zeros((len(prompts), slots)), len(prompts)
    return Rollout(jnp.asarray(tokens), *masks, zeros, zeros, zeros, jnp.ones(count, bool), jnp.arange(count))


def policy(kind: str) -> Model:
    tokenizer = tokenizer_of(kind)
    return Model("policy", CONFIG, random_params(CONFIG), tokenizer, "0" * 64)


def on_device(kind: str, path: Path, ends: list[str], at: str = "auto") -> np.ndarray:
    tokenizer, model = tokenizer_of(kind), policy(kind)
    stops = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END))
    found = load_reward(path, model, stops, micro_batch=2, at=at)
    assert found.device is not None
    score = jax.jit(partial(found.device, prefix=None, prefix_layers=0))
    return np.asarray(score(Frozen(model.params, found.params), rollout(kind, ends)).reward)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_transformers_for_the_closed_conversation(models: dict[str, Path], kind: str) -> None:
    """On the device, whatever ended the response, and on the host; read from text by a service as well."""
    prompts, responses, closed = texts(kind)
    if kind == "pads with its end":  # transformers takes that token for padding and reads the one before
        assert logit(models[kind], closed[0]) == pytest.approx(logit(models[kind], closed[0].removesuffix("</s>")))
    expected = [logit(models[kind], text) for text in closed]
    assert np.ptp(expected) > 0.05
    for ends in ([END, "</s>", ""], ["", END, "</s>"]):
        np.testing.assert_allclose(on_device(kind, models[kind], ends), expected, rtol=1e-4, atol=1e-5)
    scorer = load_scorer(models[kind], batch_sizes=(4,))
    np.testing.assert_allclose(scorer.score(prompts, responses), expected, rtol=1e-4, atol=1e-5)
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    for given in (whole, closed):  # a text that is closed already is not closed twice
        found = scorer.score_rows(scorer.encode_texts(given))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_at_the_last_token_of_the_text_where_the_user_says_so(models: dict[str, Path]) -> None:
    prompts, responses, closed = texts("chatml")
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    expected = [logit(models["chatml"], text) for text in whole]
    assert np.abs(np.array(expected) - [logit(models["chatml"], text) for text in closed]).min() > 1e-3
    found = on_device("chatml", models["chatml"], [END, "</s>", ""], "last-text")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    scorer = load_scorer(models["chatml"], batch_sizes=(4,), at="last-text")
    np.testing.assert_allclose(scorer.score(prompts, responses), expected, rtol=1e-4, atol=1e-5)
    plain = load_scorer(models["plain"], batch_sizes=(4,), at="end-token")  # without a template EOS closes a text
    assert plain.score(["hi"], [" you"])[0] == pytest.approx(logit(models["plain"], "hi you</s>"), rel=1e-4)


def test_it_is_said_and_a_run_goes_on_with_the_same_only(models: dict[str, Path]) -> None:
    chosen = {
        at: choose_reward([str(models["chatml"])], RewardOptions(at=at), policy("chatml"), (1,))
        for at in ("auto", "last-text", "end-token")
    }
    assert "read at the end of the closed answer, behind ['<|im_end|>', '\\n']" in chosen["auto"].notices[0]
    assert "read at the last token of the text" in chosen["last-text"].notices[0]
    assert chosen["auto"].name == chosen["end-token"].name != chosen["last-text"].name == "1 x a reward model"
    ours = choose_reading("ours", "auto", tokenizer_of("chatml"), ours=True)
    assert (ours.closing, ours.notice) == ((), "")
    without = tokenizer_of("plain")
    without.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an EOS token"):
        choose_reading("x", "end-token", without, ours=False)


def test_rows_are_closed_behind_their_last_token() -> None:
    tokens = jnp.array([[9, 5, 6, 9], [5, 6, 7, 8], [9, 9, 5, 9]])
    mask = jnp.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    closed, on = close_rows(tokens, mask, (1, 2))
    rows = [row[m].tolist() for row, m in zip(np.asarray(closed), np.asarray(on), strict=True)]
    assert rows == [[5, 6, 1, 2], [5, 6, 7, 8, 1, 2], [9, 5, 1, 2]]
    assert close_rows(tokens, mask, ())[0] is tokens
