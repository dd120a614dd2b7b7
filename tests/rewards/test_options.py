"""How a user names the reward: the forms of a source, weights, tokens, and what is said of mistakes."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files import artifacts
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.api import APIConfig
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.combine import add_scores
from ppo_jax.rewards.function import FunctionConfig
from ppo_jax.rewards.importing import load_function
from ppo_jax.rewards.options import RewardOptions, choose_reward, kind_of, part_names
from ppo_jax.runs.output import config
from ppo_jax.types import Frozen, Rollout, Scores
from tests.data.tokenizer import EOS, ids, make_tokenizer
from tests.models.tiny import CONFIG, random_params
from tests.rewards.faulty_server import score, serving, status

CONFIG_40 = dataclasses.replace(CONFIG, vocab_size=40, eos_token_ids=(EOS,))
MODEL = Model("tiny", CONFIG_40, random_params(CONFIG_40), make_tokenizer(), "0" * 64)
TEXTS = (["ab", "c"], ["de", "fgh"], [{"n": 1}, {"n": 2}])
FUNCTIONS = """
import asyncio
from dataclasses import dataclass

@dataclass
class Scorer:
    factor: float
    def __call__(self, prompts, responses, metadata):
        return [self.factor * len(response) for response in responses]

length = Scorer(0.5)
constant = 3.0

def number(prompts, responses, metadata):
    return [row["n"] for row in metadata]

def one(prompt, response, metadata):
    return len(prompt) + metadata["n"] / 8

def nothing(prompts, responses, metadata):
    return [0.0 for _ in prompts]

def failing(prompts, responses, metadata):
    return [None for _ in prompts]

def two(prompts, responses):
    return []

async def later(prompts, responses, metadata):
    return []
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file of functions; what is put onto the import path is taken off again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "scores.py").write_text(FUNCTIONS)
    return tmp_path


def choose(*sources: str, **options) -> Reward:
    return choose_reward(sources, RewardOptions(**options), MODEL, MODEL.stop_ids)


@pytest.fixture
def reward_model(folder: Path) -> Path:
    """A LoRA reward model on MODEL, as `ppo-jax reward` leaves it in its run directory."""
    adapter = init_adapter(jax.random.key(1), MODEL.params, CONFIG_40, AdapterConfig(layers=1, rank=2))
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), adapter)
    head = RewardHead().init(jax.random.key(3), jnp.zeros((1, CONFIG_40.hidden_size)))["params"]
    head = jax.tree.map(lambda x: x + 0.3, head)
    artifacts.save(
        folder / "rm" / "export" / "reward", "reward", adapter, head, MODEL.base, {"accuracy": 0.75}
    )  # fmt: skip
    return folder / "rm"


def on_device(chosen: Reward, hidden: int | None = None) -> Scores:
    """Scores of TEXTS by a device reward: left-padded prompts, right-padded responses, a stop token at the end.

    hidden: an id in place of the first response token, such as one that no text has.
    """
    prompts, responses = [[0, *ids("ab")][1:], [0, *ids("c")]], [[*ids("de"), EOS, 0], [*ids("fgh"), EOS]]
    responses[0][0] = responses[0][0] if hidden is None else hidden
    zeros = jnp.zeros((2, 4))
    mask = jnp.array([[True, True, True, False], [True] * 4])
    fields = dict(
        tokens=jnp.array([p + r for p, r in zip(prompts, responses, strict=True)]),
        prompt_mask=jnp.array([[True, True], [False, True]]),
        response_mask=mask, logprobs=zeros, policy_logprobs=zeros, values=zeros,
        terminated=jnp.array([True, True]), index=jnp.arange(2),
    )  # fmt: skip
    rollout = Rollout(**{name: value for name, value in fields.items() if name in Rollout._fields})
    assert chosen.device is not None
    return chosen.device(Frozen(MODEL.params, chosen.params), rollout, None, 0)


# -- each kind ---------------------------------------------------------------------------------------------------------


def test_a_function_of_a_file_and_of_a_module():
    for source in ("scores.py:number", "scores:number"):
        chosen = choose(source)
        assert chosen.device is None and chosen.host is not None and chosen.notices == ()
        np.testing.assert_array_equal(chosen.host(*TEXTS).reward, [1, 2])
    np.testing.assert_array_equal(choose("scores.py:length").host(*TEXTS).reward, [1, 1.5])  # defect 2: not 1
    per_sample = FunctionConfig(per_sample=True)
    np.testing.assert_array_equal(choose("scores.py:one", function=per_sample).host(*TEXTS).reward, [2.125, 1.25])


def test_a_service_with_a_token_of_the_environment_or_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCORES_TOKEN", "s3cret\n")
    (folder / "token").write_text("  s3cret\n")
    with serving() as server:
        for options in ({"token_env": "SCORES_TOKEN"}, {"token_file": Path("token")}, {}):
            found = choose(server.url, **options).host(*TEXTS)
            np.testing.assert_array_equal(found.reward, np.array([score("abde"), score("cfgh")], np.float32))
        sent = [headers.get("Authorization") for _, headers, _ in server.requests]
    assert sent == ["Bearer s3cret", "Bearer s3cret", None]
    assert "s3cret" not in config.to_yaml(RewardOptions(token_env="SCORES_TOKEN", token_file=Path("token")))


def test_a_reward_model_runs_on_the_device(reward_model: Path):
    chosen = choose("rm")
    assert chosen.host is None and chosen.metadata == {"accuracy": 0.75}
    scores = np.asarray(on_device(chosen).reward)
    assert abs(scores[0] - scores[1]) > 1e-3
    np.testing.assert_allclose(on_device(choose("rm", weights=(-2.0,))).reward, -2 * scores, rtol=1e-6)
    np.testing.assert_allclose(on_device(choose("rm/export/reward")).reward, scores)


# -- sums --------------------------------------------------------------------------------------------------------------


def test_a_sum_of_all_kinds_logs_each_part(reward_model: Path):
    model_scores = np.asarray(on_device(choose("rm")).reward)
    with serving() as server:
        chosen = choose("rm", server.url, "scores.py:length", weights=(0.5, 1.0, -2.0))
        found = add_scores(on_device(chosen), chosen.host(*TEXTS))
    service = np.array([score("abde"), score("cfgh")])
    np.testing.assert_array_equal(found.parts["rm"], model_scores)
    np.testing.assert_allclose(found.parts["service"], service, rtol=1e-6)
    np.testing.assert_array_equal(found.parts["length"], [1, 1.5])
    expected = 0.5 * model_scores + service - 2 * np.array([1, 1.5])
    np.testing.assert_allclose(found.reward, expected, rtol=1e-5)
    assert found.valid.all() and chosen.metadata == {}
    assert re.fullmatch(r"0.5 x model [0-9a-f]{16} \+ 1 x a service \+ -2 x scores.py:length", chosen.name)


def test_a_reward_that_is_always_0_changes_no_score_of_a_model(reward_model: Path):
    """Bit for bit, also of a response whose tokens are not those of its text: a sampled <s>, which no text shows."""
    alone, summed = choose("rm"), choose("rm", "scores.py:nothing")
    for hidden in (None, 0):
        host = summed.host(*TEXTS)  # what it reads is the same for both
        found = add_scores(on_device(summed, hidden), host)
        np.testing.assert_array_equal(found.reward, on_device(alone, hidden).reward)
    assert abs(on_device(alone, 0).reward - on_device(alone).reward)[0] > 1e-3, "the hidden token is read"


def test_two_models_are_summed_on_the_device_alone(reward_model: Path):
    twice = choose("rm", "rm/export/reward", weights=(0.5, 1.5))
    assert twice.host is None
    found, one = on_device(twice), on_device(choose("rm"))
    np.testing.assert_allclose(found.reward, 2 * one.reward, rtol=1e-6)
    assert sorted(found.parts) == ["rm", "rm_2"]


def test_a_model_of_a_sum_is_known_by_its_weights(reward_model: Path, folder: Path):
    """The same by both of its paths and when it has moved, another one when its weights are others'."""
    name = choose("rm", "scores.py:length").name
    assert choose("rm/export/reward", "scores.py:length").name == name
    shutil.move(folder / "rm", folder / "moved")
    assert choose("moved", "scores.py:length").name == name
    found = artifacts.load(folder / "moved" / "export" / "reward", "reward")
    artifacts.save(
        folder / "other" / "moved", "reward", found.adapter, jax.tree.map(lambda x: x + 1, found.head), MODEL.base
    )  # fmt: skip
    assert choose("other/moved", "scores.py:length").name != name


def test_a_sum_fails_where_a_part_does():
    """Defect 19, with the cause of the part."""
    said: list[str] = []
    with serving(always=status(404)) as server:
        chosen = choose("scores.py:length", server.url)
        chosen.failures.notify = said.append
        found = chosen.host(*TEXTS)
    assert not found.valid.any() and np.isnan(found.reward).all()
    np.testing.assert_array_equal(found.parts["length"], [1, 1.5])
    assert chosen.failures.summary() == "the service answered HTTP 404 (2 rows)" and len(said) == 1


def test_special_tokens_are_kept_where_the_user_asks():
    assert choose("scores.py:length").special_tokens == "drop"
    for weights in ((), (2.0,)):
        assert choose("scores.py:length", weights=weights, special_tokens="keep").special_tokens == "keep"
    assert choose("scores.py:length", "scores.py:number", special_tokens="keep").special_tokens == "keep"


def test_one_source_with_a_weight():
    found = choose("scores.py:length", weights=(3.0,)).host(*TEXTS)
    np.testing.assert_array_equal(found.reward, [3, 4.5])


def test_names_of_parts_are_short_and_differ(folder: Path):
    (folder / "runs" / "a" / "export" / "reward").mkdir(parents=True)
    sources = ["scores.py:length", "runs/a/export/reward", "runs/a", "https://h:1/x", "http://h/y", "m:length", "b/a"]
    assert part_names(sources) == ["length", "a", "a_2", "service", "service_2", "length_2", "a_3"]
    assert part_names(["m:f_2", "m:f", "m:f", "m:f_2"]) == ["f_2", "f", "f_3", "f_2_2"]


@given(st.lists(st.sampled_from(["m:f", "m:f_2", "n:f", "n:f_2_2", "m:f_3", "http://f/", "d/f_2"]), max_size=9))
def test_no_two_parts_have_one_name(sources: list[str]):
    names = part_names(sources)
    assert len(set(names)) == len(names) == len(sources)


def test_names_that_look_numbered_drop_nothing_of_a_sum(folder: Path):
    (folder / "odd.py").write_text(
        "def f_2(prompts, responses, metadata): return [1.0] * len(prompts)\n"
        "def f(prompts, responses, metadata): return [10.0] * len(prompts)\n"
    )
    found = choose("odd.py:f_2", "odd.py:f").host(*TEXTS)
    np.testing.assert_array_equal(found.reward, [11, 11])
    assert {name: part.tolist() for name, part in found.parts.items()} == {"f_2": [1, 1], "f": [10, 10]}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("http://h/x", "url"), ("HTTPS://h/x", "url"), ("http:", "url"), ("a.b:c", "function"),
        ("scores.py:one", "function"), ("runs/rm", "directory"), ("org/model", "directory"), ("odd:name", "directory"),
    ],
)  # fmt: skip
def test_kinds(folder: Path, source: str, kind: str):
    (folder / "odd:name").mkdir()
    assert kind_of(source) == kind


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "nothing": ([], {}, "no reward: give a reward model's directory"),
    "nowhere": (["nowhere"], {}, "nowhere .*It takes a reward model's directory, http://HOST"),
    "a file": (["scores.py"], {}, "scores.py is a file; name the function in it, scores.py:FUNCTION"),
    "an empty folder": (["empty"], {}, "holds no reward model"),
    "no file": (["nix.py:f"], {}, "nix.py is not a file"),
    "no module": (["nix.da:f"], {}, "nix.da cannot be imported: ModuleNotFoundError"),
    "no name": (["scores.py:lenght"], {}, "has no 'lenght'; did you mean length"),
    "no function": (["scores.py:constant"], {}, "constant is a float; give a function"),
    "a class": (["scores.py:Scorer"], {}, "Scorer is a type; give a function"),
    "async": (["scores.py:later"], {}, "later is async"),
    "arguments": (["scores.py:two"], {}, r"two cannot be called with \(prompts, responses, metadata\)"),
    "broken": (["broken.py:f"], {}, "broken.py cannot be imported: SyntaxError"),
    "exits": (["exits.py:f"], {}, "exits.py cannot be imported: SystemExit"),
    "a URL": (["http://"], {}, "must look like http://"),
    "a password": (["http://me:pass@h/"], {}, "token's variable or file"),
    "weights": (["scores.py:length"], {"weights": (1.0, 2.0)}, "2 numbers for 1 rewards"),
    "a weight": (["scores.py:length"], {"weights": (float("nan"),)}, "nan must be finite"),
    "no variable": (["http://h/"], {"token_env": "NOT_SET"}, "variable NOT_SET is not set, or empty"),
    "no token file": (["http://h/"], {"token_file": Path("nix")}, "nix is not a file"),
    "an empty token file": (["http://h/"], {"token_file": Path("none")}, "none is empty"),
    "two tokens": (["http://h/"], {"token_file": Path("none"), "token_env": "X"}, "exclude each other"),
    "a token for nobody": (["scores.py:length"], {"token_env": "TOKEN"}, "no --reward is a URL"),
    "a token for two": (["http://a/", "http://b/"], {"token_env": "TOKEN"}, "belongs to one service"),
    "special tokens": (["rm"], {"special_tokens": "keep"}, "no effect: all of --reward reads tokens, none reads text"),
    "an unsendable token": (["http://h/"], {"token_env": "ODD"}, "characters that an HTTP header cannot carry"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(reward_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (folder / "empty").mkdir()
    (folder / "none").write_text("\n")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("TOKEN", "abc")
    monkeypatch.setenv("ODD", "a b s3cret")
    sources, options, said = MISTAKES[name]
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        choose(*sources, **options)
    assert "s3cret" not in str(error.value) and "pass@" not in str(error.value)


def test_a_reward_model_of_another_base_is_refused(reward_model: Path):
    other = MODEL._replace(fingerprint="1" * 64)
    for sources in (["rm"], ["rm", "scores.py:length"]):
        with pytest.raises(ValueError, match="was trained on other weights"):
            choose_reward(sources, RewardOptions(), other, MODEL.stop_ids)


def test_a_token_in_the_open_is_remarked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKEN", "abc")
    assert "unencrypted" in choose("http://example.org/", token_env="TOKEN").notices[0]
    for url in ("https://example.org/", "http://127.0.0.1:1/", "http://[::1]:1/", "http://localhost/"):
        assert choose(url, token_env="TOKEN").notices == ()


def test_a_file_finds_the_files_beside_it(folder: Path):
    (folder / "sub").mkdir()
    (folder / "sub" / "words_beside.py").write_text("GOOD = 7\n")
    (folder / "sub" / "mine.py").write_text("import words_beside\ndef f(p, *_): return [words_beside.GOOD] * len(p)\n")
    np.testing.assert_array_equal(choose("sub/mine.py:f").host(*TEXTS).reward, [7, 7])


def test_a_method_by_its_dotted_name():
    assert load_function("scores:length.__call__")(*TEXTS) == [1.0, 1.5]


def test_options_survive_yaml():
    options = RewardOptions((1.0, 0.5), "X", Path("t"), APIConfig(deadline=3.0), FunctionConfig(per_sample=True))
    assert config.from_yaml(RewardOptions, config.to_yaml(options)) == options
    assert re.search(r"deadline: 3.0", config.to_yaml(options))
