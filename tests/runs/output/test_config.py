"""Configurations: YAML round trips, and errors that name the place."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.runs.output import config
from ppo_jax.runs.output.config import from_yaml, nearest, to_yaml
from ppo_jax.runs.output.plain_yaml import ConfigError
from ppo_jax.types import Hyper, Off
from tests.settings import Lora, Optimiser, Resumable, Run, Schedule, Span, TopK

FLOATS = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers(-(2**63), 2**63 - 1)
ADAPTERS = st.one_of(st.builds(Lora, INTEGERS), st.builds(TopK, INTEGERS))
RUNS = st.builds(
    Run,
    out=TEXT.map(os.path.expanduser).map(Path),
    name=TEXT,
    overwrite=st.booleans(),
    target=st.none() | FLOATS,
    budget=INTEGERS | FLOATS | TEXT,
    sizes=st.lists(INTEGERS).map(tuple),
    pair=st.tuples(INTEGERS, TEXT),
    extra=st.dictionaries(TEXT, FLOATS),
    optimiser=st.builds(
        Optimiser, st.integers(1, 99), st.sampled_from(["k1", "k2", 3, None]), st.sampled_from(Schedule)
    ),
    hyper=st.builds(lambda values: Hyper(*values), st.lists(FLOATS, min_size=13, max_size=13)),
    span=st.none() | st.builds(Span, INTEGERS, INTEGERS),
    adapter=ADAPTERS,
    adapters=st.lists(ADAPTERS).map(tuple),
)


@hypothesis.given(RUNS)
@hypothesis.example(Run(name="a\x85b\u2028\u2029", extra={"\x85": 1.0}))
@hypothesis.example(Run(name="1e-4", pair=(1, "2024-01-01"), budget="null"))
@hypothesis.settings(max_examples=150, deadline=None)
def test_yaml_round_trip(run: Run) -> None:
    """Text that looks like a number, a date, a null or a list stays text; floats keep every bit."""
    back = from_yaml(Run, to_yaml(run))
    assert back == run
    assert repr(back) == repr(run)  # 1 == 1.0 == True, but not here


def test_the_yaml_of_a_config_is_readable() -> None:
    text = to_yaml(Run(target=1e-4, span=Span(3), adapters=(TopK(4),), extra={"a": 1.0}))
    expected = """\
out: runs/a
name: x
overwrite: false
target: 0.0001
budget: 1
sizes:
- 1
- 2
pair:
- 1
- a
extra:
  a: 1.0
optimiser:
  epochs: 4
  kind: k1
  schedule: COSINE
hyper:
"""
    assert text.startswith(expected)
    assert text.endswith(
        "span:\n  start: 3\n  stop: 10\nadapter:\n  type: Lora\n  rank: 8\nadapters:\n- type: TopK\n  layers: 4\n"
    )


def test_missing_keys_take_defaults_or_the_base() -> None:
    assert from_yaml(Run, "") == Run()
    assert from_yaml(Run, "hyper: {lam: 0.5}").hyper == Hyper(lam=0.5)
    base = Run(name="base", hyper=Hyper(lam=0.1, gamma=0.9), adapter=TopK(5))
    run = from_yaml(Run, "hyper: {lam: 0.5}\nadapter: {layers: 6}", base=base)
    assert run == dataclasses.replace(base, hyper=Hyper(lam=0.5, gamma=0.9), adapter=TopK(6))
    assert from_yaml(Run, "adapter: {type: Lora}", base=base).adapter == Lora()


def test_numbers_as_people_write_them() -> None:
    run = from_yaml(Run, "hyper: {learning_rate: 1e-4, kl_coef: 1, gamma: .5e0, max_grad_norm: .inf}")
    assert (run.hyper.learning_rate, run.hyper.kl_coef, run.hyper.gamma) == (1e-4, 1.0, 0.5)
    assert type(run.hyper.kl_coef) is float
    assert math.isinf(run.hyper.max_grad_norm)


def test_numpy_and_jax_scalars_become_plain_numbers() -> None:
    import jax.numpy as jnp

    hyper = Hyper(gamma=np.float64(0.5), lam=jnp.float32(0.25))  # type: ignore[arg-type]
    assert from_yaml(Hyper, to_yaml(hyper)) == Hyper(gamma=0.5, lam=0.25)
    with pytest.raises(ConfigError, match=r"extra\.f: function cannot be written"):
        to_yaml(Run(extra={"f": lambda: 0}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: a", "run.yaml, line 1: nmae: unknown key; did you mean name?"),
        ("hyper:\n  kl_coeff: 1", "run.yaml, line 2: hyper.kl_coeff: unknown key; did you mean hyper.kl_coef?"),
        ("span: {zzzz: 1}", "run.yaml, line 1: span.zzzz: unknown key; Span has: start, stop"),
        ("derived: 1", "run.yaml, line 1: derived: unknown key"),
        ("optimiser:\n\n  epochs: 1.5", "run.yaml, line 3: optimiser.epochs: expected an int, got 1.5 (float)"),
        ("optimiser: {epochs: true}", "optimiser.epochs: expected an int, got true"),
        ("overwrite: 1", "overwrite: expected true or false, got 1 (int)"),
        ("overwrite: 'yes'", "overwrite: expected true or false, got 'yes'"),
        ("name: 12", "name: expected text, got 12 (int); put text that looks like another value in quotes"),
        ("name: true", "name: expected text, got true; put text that looks like another value in quotes"),
        ("name: 2024-01-01", "name: expected text, got datetime.date(2024, 1, 1) (date)"),
        ("name:", "name: expected text, got null"),
        ("out: [a]", "out: expected a path, got ['a'] (list)"),
        ("target: none", "target: expected a float or null, got 'none'; write null"),
        ("target: 'None'", "target: expected a float or null, got 'None'; write null"),
        ("optimiser: {epochs: 010}", "optimiser.epochs: expected an int, got '010'; write 10, without the zeros"),
        ("hyper: {gamma: -007}", "hyper.gamma: expected a float, got '-007'; write -7, without the zeros"),
        ("sizes: [1, 08]", "sizes[1]: expected an int, got '08'; write 8, without the zeros"),
        ("optimiser: {epochs: 1:30}", "optimiser.epochs: expected an int, got '1:30'"),
        ("optimiser: {epochs: off}", "optimiser.epochs: expected an int, got 'off'"),
        ("hyper: {gamma: off}", "hyper.gamma: expected a float, got 'off'"),
        ("optimiser: {kind: off}", "optimiser.kind: expected one of k1, k2, 3, None, got 'off'"),
        ("kl_coef: 1", "kl_coef: unknown key; did you mean hyper.kl_coef?"),
        ("hyper: {gamma: 0,5}", "hyper.5: unknown key"),
        ("hyper: {gamma: '0,5'}", "hyper.gamma: expected a float, got '0,5'"),
        ("hyper: [1]", "hyper: expected a mapping with the fields of Hyper, got [1] (list)"),
        ("optimiser: {kind: k3}", "optimiser.kind: expected one of k1, k2, 3, None, got 'k3'"),
        ("optimiser: {kind: '3'}", "optimiser.kind: expected one of k1, k2, 3, None, got '3'"),
        ("optimiser: {schedule: linear}", "optimiser.schedule: expected one of CONSTANT, COSINE, got 'linear'"),
        ("sizes:\n- 1\n- b", "run.yaml, line 1: sizes[1]: expected an int, got 'b'"),
        ("sizes: 3", "sizes: expected a list of an int, got 3 (int)"),
        ("pair: [1]", "pair: expected 2 values, got 1: [1] (list)"),
        ("extra: {a: b}", "extra.a: expected a float, got 'b'"),
        ("budget: []", "budget: expected an int or a float or text, got [] (list)"),
        ("span: {}", "span: Span needs start, which is not given"),
        ("adapter: {rank: 1, type: lora}", "adapter: expected `type:` to be one of Lora, TopK, got 'lora'"),
        ("adapters: [{rank: 1}]", "adapters[0]: expected `type:` to be one of Lora, TopK, got null"),
        ("optimiser: {epochs: 0}", "run.yaml, line 1: optimiser: epochs=0 must be at least 1"),
        ("- a", "run.yaml: expected a mapping with the fields of Run, got ['a'] (list)"),
        ("name: a\nout: b\nname: c", "run.yaml, line 3: name: given twice (first on line 1)"),
        ("hyper: {lam: 1, lam: 2}", "run.yaml, line 1: hyper.lam: given twice (first on line 1)"),
        ("name: [", "run.yaml, line 1: not YAML"),
        ("name: a\n  out: b", "run.yaml, line 2: not YAML"),
        ("!!python/object/apply:os.system [ls]", "run.yaml, line 1: not YAML: could not determine a constructor"),
        ("[" * 3000, "run.yaml: not a configuration: maximum recursion depth"),
        ("name: 2024-13-45", "run.yaml: not a configuration: month must be in 1..12"),
        ("\0", "run.yaml: not YAML"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_yaml(Run, text, source="run.yaml")
    assert message in str(error.value)


@hypothesis.given(
    st.text()
    | st.lists(st.sampled_from(["hyper:", "lam", ": ", "\n", "  ", "- ", "{", "}", "&a ", "*a", "1", "<<"])).map(
        "".join
    )
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(from_yaml(Run, text), Run)
    except ConfigError as error:
        assert str(error).startswith("configuration")


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(ConfigError, match=r"its aliases .* expand to 1e\+28 values; at most 1000000 are read"):
        from_yaml(Run, bomb)
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    with pytest.raises(ConfigError, match="expand to"):
        from_yaml(Run, merges)
    with pytest.raises(ConfigError, match="line 1: an alias that contains itself"):
        from_yaml(Run, "name: &n [*n]")
    with pytest.raises(ConfigError, match="configuration: 2000001 characters; at most 1000000 are read"):
        from_yaml(Run, "#" * 2_000_001)
    with pytest.raises(ConfigError, match="expected text") as error:
        from_yaml(Run, "name: [" + "x, " * 10_000 + "x]")
    assert len(str(error.value)) < 300


def test_a_required_field_and_post_init_of_the_packages_own_records() -> None:
    with pytest.raises(ConfigError, match="ModelConfig needs vocab_size, hidden_size"):
        from_yaml(ModelConfig, "num_layers: 2")
    model = ModelConfig(8, 4, 8, 2, 2, 1, 2, rope_scaling=RopeScaling("llama3", 8.0), eos_token_ids=(1, 2))
    assert from_yaml(ModelConfig, to_yaml(model)) == model
    with pytest.raises(ConfigError, match="odd; rotary"):
        from_yaml(ModelConfig, to_yaml(model).replace("head_dim: 2", "head_dim: 3"))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(Run(name="é")), encoding="utf-8")
    assert config.load(Run, path) == Run(name="é")
    with pytest.raises(FileNotFoundError, match="absent.yaml: no such configuration file"):
        config.load(Run, tmp_path / "absent.yaml")
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="run.yaml: cannot be read as UTF-8"):
        config.load(Run, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Run, tmp_path)


@pytest.mark.parametrize(("text", "expected"), [("no", "no"), ("yes", "yes"), ("true", "yes"), ("'auto'", "auto")])
def test_yes_and_no_of_yaml_are_words_where_words_are_wanted(text: str, expected: str):
    assert config.from_yaml(Resumable, f"resume: {text}").resume == expected
    assert config.from_yaml(Resumable, config.to_yaml(Resumable(expected))).resume == expected  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Words:
    """Fields for which the words of YAML mean different things."""

    flag: bool = False
    text: str = ""
    perhaps: str | None = "x"
    path: Path | None = Path("x")
    number: float | None = 1.0
    mode: Literal["off", "scale", None] = "scale"
    start: Literal["auto", "on", "off"] = "auto"
    top_k: Annotated[int, Off(0)] = 5
    clip: Annotated[float, Off(math.inf)] = 0.2
    project: Annotated[str, Off("")] = "x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("flag: yes", True), ("flag: On", True), ("flag: true", True), ("flag: no", False), ("flag: OFF", False)),
        *(
            ("text: off", "off"),
            ("text: no", "no"),
            ("text: None", "None"),
            ("text: 010", "010"),
            ("text: 1:30", "1:30"),
        ),
        *(("perhaps: None", None), ("perhaps: 'None'", "None"), ("perhaps: null", None), ("perhaps: no", "no")),
        *(("path: None", None), ("path: off", Path("off")), ("path: 010", Path("010")), ("path: ~", None)),
        *(("number: None", None), ("number: inf", math.inf), ("number: -Infinity", -math.inf), ("number: 1E4", 1e4)),
        *(
            ("mode: off", "off"),
            ("mode: no", "off"),
            ("mode: false", "off"),
            ("mode: None", None),
            ("mode: null", None),
        ),
        *(("start: on", "on"), ("start: off", "off"), ("start: yes", "on"), ("start: true", "on")),
        *(
            ("top_k: off", 0),
            ("top_k: 'off'", 0),
            ("clip: off", math.inf),
            ("clip: inf", math.inf),
            ("project: off", ""),
        ),
    ],
)
def test_words_mean_what_the_field_says(text: str, expected: Any) -> None:
    name = text.split(":")[0]
    found = getattr(from_yaml(Words, text), name)
    assert found == expected and type(found) is type(expected)
    assert from_yaml(Words, to_yaml(from_yaml(Words, text))) == from_yaml(Words, text)


def test_text_that_looks_like_a_word_survives() -> None:
    for word in ("off", "no", "None", "null", "010", "1:30", "true", "~", ".inf", "1e5"):
        assert from_yaml(Words, to_yaml(Words(text=word, perhaps=word))) == Words(text=word, perhaps=word)


def test_home_is_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_yaml(Words, "path: ~/data/x").path == tmp_path / "data" / "x"
    assert from_yaml(Words, "path: a/~").path == Path("a/~")
    assert from_yaml(Words, "path: ~nobody-of-that-name/x").path == Path("~nobody-of-that-name/x")
    (tmp_path / "words.yaml").write_text("top_k: 3")
    assert config.load(Words, "~/words.yaml").top_k == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("kl-coeff", "hyper.kl-coef"), ("loop.update", "loop.updates"), ("hypr.kl-coef", "hyper.kl-coef")),
        *(("rank", "policy.rank"), ("updats", "loop.updates"), ("zzzz", None)),
    ],
)
def test_the_nearest_name(name: str, expected: str | None) -> None:
    names = ["hyper.kl-coef", "hyper.kl-coef-end", "loop.updates", "policy.rank", "ppo.critic.adapter.rank", "out"]
    assert nearest(name, names) == expected
    assert nearest(name, []) is None
