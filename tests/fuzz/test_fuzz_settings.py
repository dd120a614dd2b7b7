"""Settings at random: YAML files, and values on the command line."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.cli.export import ExportSettings
from ppo_jax.cli.generate import GenerateSettings
from ppo_jax.cli.parse import parse
from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.cli.sft import SFTSettings
from ppo_jax.runs.output import config
from ppo_jax.runs.output.plain_yaml import ConfigError
from tests.fuzz.inputs import damaged, outcome

# Values that PyYAML, or a reader that trusts it, has trouble with.
VALUES = [
    *(
        "!!timestamp abc",
        "!!int ''",
        "!!bool foo",
        "!!float ''",
        "!!binary x",
        "2024-13-45",
        "&a [*a]",
        "*a",
        "{<<: 1}",
    ),
    *("{<<: [1]}", "1e400", ".nan", "9" * 5000, "? [a] : b", "[[[[", "0x", "1:99:99", "!!python/object:os.system []"),
    *("!!set {a}", "!!omap [a]", "\0", "|\n  x", "{type: [1]}", "{type: x}", str(2**70), "!!null x", "%YAML 9.9"),
    *("--- a\n--- b", "0001-01-01T00:00:00+23:59", "[" * 3000, "{a: " * 500, "!!python/name:os.system", "!!str"),
]
TEXTS: list[tuple[type, str]] = [
    (PPOSettings, config.to_yaml(PPOSettings("m", Path("p"), ("r",)))),
    (SFTSettings, config.to_yaml(SFTSettings("m", Path("d")))),
    (GenerateSettings, config.to_yaml(GenerateSettings())),
]


@settings(max_examples=80)
@given(st.sampled_from(TEXTS), st.data())
def test_yaml_lines(known: tuple[type, str], data: st.DataObject) -> None:
    cls, text = known
    lines = text.split("\n")
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = lines[at].split(":")[0] + ": " + data.draw(st.sampled_from(VALUES) | st.text(max_size=20))
    found = outcome(lambda: config.from_yaml(cls, "\n".join(lines), "run.yaml"), "run.yaml")
    assert isinstance(found, cls | ConfigError)


@settings(max_examples=40)
@given(data=st.data())
def test_yaml_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data.draw(damaged(TEXTS[2][1].encode()) | st.binary(max_size=100)))
    assert isinstance(outcome(lambda: config.load(GenerateSettings, path), str(path)), GenerateSettings | ValueError)
    text = path.read_bytes().decode("latin-1")
    assert isinstance(outcome(lambda: config.read_mapping(text, "f"), "f"), dict | ValueError)


def options(record: Any, prefix: str = "") -> list[str]:
    """Every option of a settings record."""
    found = []
    for name, value in ((f.name, getattr(record, f.name)) for f in dataclasses.fields(record)):
        path = f"{prefix}{name}".replace("_", "-")
        found += options(value, f"{path}.") if dataclasses.is_dataclass(value) else [f"--{path}"]
    return found


@settings(max_examples=60)
@given(data=st.data())
def test_options(data: st.DataObject) -> None:
    """Settings whose values a YAML file could hold too, or one message and exit code 2; never a traceback."""
    record = data.draw(st.sampled_from([GenerateSettings(), ExportSettings(Path("x"))]))
    args = ["--to", "x"] if isinstance(record, ExportSettings) else []
    odd = st.sampled_from(
        ["", " ", "-1", "1e400", "nan", "inf", "9" * 5000, str(2**63), "0x1", "\udc80", "\0", "--", "[1]"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        args += [data.draw(st.sampled_from(options(record))), data.draw(odd | st.text(max_size=5))]
    try:
        found = parse(type(record), args, prog="ppo-jax")
    except SystemExit as stop:
        assert stop.code in (0, 2)  # 0: "-h" was drawn
    else:
        assert isinstance(found, type(record))
        config.to_yaml(found)


def test_an_option_is_held_to_the_range_of_a_file(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(GenerateSettings, ["--seed", str(2**63)], prog="ppo-jax generate")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "ppo-jax generate: --seed: expected an int of 64 bits, got 9223372036854775808\n"
