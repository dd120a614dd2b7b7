"""Every option of every command and experiment: its help is a sentence, and its documented values work as written."""

import dataclasses
import functools
import math
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro

from experiments import pipeline, sentiment
from experiments.serve_load import LoadConfig
from experiments.soak import SoakConfig
from experiments.soak_run import SoakRun
from ppo_jax.cli.main import COMMANDS
from ppo_jax.cli.parse import WHOLE, Brief, find_options, parse, write_out
from ppo_jax.models.files.hub import resolve
from ppo_jax.rewards.importing import load_function
from ppo_jax.rewards.loading import find_reward
from ppo_jax.runs.output.config import dotted_fields, from_plain, is_record, to_plain, to_yaml
from ppo_jax.runs.output.plain_yaml import ConfigError
from ppo_jax.types import Off

BRIEFS: dict[type, Brief] = {command.settings: command.brief for command in COMMANDS.values()} | {
    sentiment.SentimentConfig: sentiment.BRIEF,
    pipeline.PipelineConfig: pipeline.BRIEF,
    **dict.fromkeys((SoakConfig, SoakRun, LoadConfig), WHOLE),
}
every_command = pytest.mark.parametrize("cls", BRIEFS, ids=lambda cls: cls.__name__)

# A sentence says something of the value before any clause that hangs on a noun: "Texts that are long" says nothing.
HANGING = re.compile(r" (that|which|whose|who|where|when|while|until|unless|of which) ")
FRAGMENT = re.compile(r"(Of|That|The same|How,?|What|Which|Who|Where|When|Whether|Or|And|By|As|Its|Else|From|To) ")
VERB = re.compile(
    r"\b("
    r"adapts|answers?|are|arrive|become|bounds|break|carry|carries|changes|choose|comes?|computes|"
    r"counts?|cut|decays|describe|divides?|draw|ends|enter|fails|falls|fills|fit|gets|gives?|go|"
    r"goes|has|have|holds?|is|lasts|learns?|listens|loses|makes?|may|means?|mixes|moves|must|names|"
    r"reaches|reads?|reproduces|rises|runs?|say|seeds|sends?|share|speaks|squares|stand|starts|stays?|steers|"
    r"stops|sums?|takes|trade|waits?|weighs|work"
    r")\b"
)
IMPERATIVE = re.compile(r"(Delete|Give|Call|Join|Take|Try|Print|Write|Let|Bring|Shift|Whiten|Go|Replace) ")


@functools.cache
def helps(cls: type) -> dict[tuple[type, str], str]:
    """{(record, field): help} of every field below `cls`, as tyro finds it."""
    registry, asked, found = tyro.constructors.ConstructorRegistry(), [], {}

    @registry.struct_rule
    def note(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if info.type in asked or not is_record(info.type):
            return None
        asked.append(info.type)
        spec: Any = registry.get_struct_spec(info)
        asked.remove(info.type)
        for field in spec.fields:
            text = field.helptext() if callable(field.helptext) else field.helptext
            found[info.type, field.name] = " ".join((text or "").split())
        return spec

    with pytest.raises(SystemExit):
        tyro.cli(cls, args=["--help"], registry=registry, console_outputs=False)
    return found


def problem(text: str) -> str | None:
    """What keeps a help text from being a sentence that can be read alone."""
    if not re.fullmatch(r"[A-Z].*\.", text):
        return "does not begin with a capital letter and end with a full stop"
    if len(text.split()) < 4:
        return "has fewer than four words"
    if FRAGMENT.match(text):
        return f"begins like a fragment: {FRAGMENT.match(text)!r}"
    first = HANGING.split(re.split(r"[.;:] ", text)[0])[0]
    return None if IMPERATIVE.match(text) or VERB.search(first) else "has no verb before what hangs on its subject"


@every_command
def test_every_help_is_a_sentence(cls: type) -> None:
    found = helps(cls)
    assert {name for _, name in found} >= {path.rpartition(".")[2] for path, _ in dotted_fields(cls)}
    assert {
        f"{record.__name__}.{name}: {text}": p for (record, name), text in found.items() if (p := problem(text))
    } == {}
    assert problem((cls.__doc__ or "").strip()) in (None, "has no verb before what hangs on its subject")  # imperative


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Of sampling.",
            "That adapter.",
            "How, and for how long.",
            "The same as an option.",
            "Its scalars.",
            "",
            "LoRA rank.",
        ),
        *("Longest prompt, in tokens.", "How long, and what when.", "Where all results go.", "the reward is called."),
        *("Seconds that one call may take.", "Texts that are scored are longer", "Adam, falling linearly to 0."),
        *("Of the order of the data, of sampling and of initialisation.", "Newest checkpoints kept in the directory."),
    ],
)
def test_a_fragment_is_found(text: str) -> None:
    assert problem(text)


# -- what --help and --help-all show -----------------------------------------------------------------------------------


def shown(cls: type, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, set]:
    """(the help without frames and line breaks, the options that it has)."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse(cls, [word], prog="ppo-jax x", brief=BRIEFS[cls])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^. (--\w[\w.-]*)(?:, (--\w[\w.-]*))?", text, re.MULTILINE)
    return " ".join(re.sub("[│╭╮╰╯─]|-{20,}", " ", text).split()), {name for pair in options for name in pair if name}


@every_command
def test_help_all_shows_every_option(
    cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, options = shown(cls, "--help-all", capsys, monkeypatch)
    assert options == set(find_options(cls, ["--config"])) - {"--help", "--help-all"}
    assert {said for said in helps(cls).values() if said not in text} == set()


def test_help_breaks_no_line_because_the_source_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "3000")
    with pytest.raises(SystemExit):
        parse(COMMANDS["ppo"].settings, ["--help-all"])
    text = capsys.readouterr().out
    said = [text for text in helps(COMMANDS["ppo"].settings).values() if len(text) < 150]  # fits into a column of tyro
    assert len(said) > 80 and [one for one in said if one not in text] == []


@every_command
def test_help_shows_examples_and_what_people_turn(
    cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = BRIEFS[cls]
    for record, names in brief.fields.items():
        assert {name for name, _ in dotted_fields(record)} >= set(names), record
    text, options = shown(cls, "--help", capsys, monkeypatch)
    assert all(example in text for example in brief.examples)
    assert ("--help-all" in text) == bool(brief.fields)
    if brief.fields:
        assert len(options) <= 40 and 2 * len(options) < len(find_options(cls)) + 10
        assert text.index("Examples:") < text.index("--config")
    assert options == {"--config"} | {
        name
        for name, kind in find_options(cls).items()
        if name not in ("--help", "--help-all") and is_shown(cls, name, brief)
    }


def is_shown(cls: type, option: str, brief: Brief) -> bool:
    """Whether each record on the way to an option lists the next one, where it lists any."""
    record: Any = cls
    for part in option[2:].replace("-", "_").split("."):
        kinds = own_fields(record)
        part = part if part in kinds else part.removeprefix("no_")
        if part not in brief.fields.get(record, (part,)):
            return False
        record = kinds[part]
    return True


@functools.cache
def own_fields(record: type) -> dict[str, Any]:
    return {path: kind for path, kind in dotted_fields(record) if "." not in path}


@every_command
def test_the_examples_can_be_copied(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ppo").mkdir(parents=True)
    (tmp_path / "runs" / "ppo" / "config.yaml").write_text(to_yaml(least(COMMANDS["ppo"].settings)))
    for example in BRIEFS[cls].examples:
        words = shlex.split(example)
        start = 3 if words[0] == "python" or words[1] == "sweep" else 2
        known = [["ppo-jax", *name.split()] for name in COMMANDS]
        assert words[:start] in [*known, ["python", "-m", cls.__module__]]
        presets = sentiment.PRESETS if cls is sentiment.SentimentConfig else None
        assert isinstance(parse(cls, words[start:], presets=presets), cls)  # type: ignore[type-var]


# -- values ------------------------------------------------------------------------------------------------------------


def least(cls: type) -> Any:
    """A record with some value for each field that needs one, and defaults else."""
    some: dict[Any, Any] = {str: "m", Path: "p", tuple[str, ...]: ["r"], tuple[Path, ...]: ["r"]}
    missing = dataclasses.MISSING
    kinds = typing.get_type_hints(cls)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    return from_plain(cls, {name: some[kinds[name]] for name in needed})


def with_value(cls: type, path: str, value: Any) -> Any:
    """What a file with this one value besides the needed ones gives."""
    data = to_plain(least(cls))
    node = data
    for part in path.split(".")[:-1]:
        node = node[part]
    node[path.rpartition(".")[2]] = value
    found = from_plain(cls, data)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def by_option(cls: type, path: str, word: str) -> Any:
    """What the command line gives for it."""
    options = {name: value for name, value in to_plain(least(cls)).items() if name in needed_words(cls)}
    words = [f"--{name.replace('_', '-')}={v[0] if isinstance(v, list) else v}" for name, v in options.items()]
    found = parse(cls, [*words, f"--{path.replace('_', '-')}", word], prog="x")
    for part in path.split("."):
        found = getattr(found, part)
    return found


def needed_words(cls: type) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}


@every_command
def test_off_means_the_value_that_the_help_says_is_off(cls: type) -> None:
    values = {"inf": math.inf, '""': "", "0": 0, "1": 1}
    texts = {name: text for (_, name), text in helps(cls).items()}
    for path, kind in dotted_fields(cls):
        said = re.search(r"(\S+) is off\b", texts[path.rpartition(".")[2]])
        marks = [mark for mark in typing.get_args(kind)[1:] if isinstance(mark, Off)]
        assert bool(said) == bool(marks), f"{path}: Off(...) in its type and `... is off` in its help go together"
        if said:
            assert values[said[1]] == marks[0].value and with_value(cls, path, "off") == marks[0].value, path


@pytest.mark.parametrize(
    ("command", "path"),
    [
        *(
            ("ppo", "hyper.dual_clip"),
            ("ppo", "ppo.sampling.top_k"),
            ("ppo", "ppo.sampling.top_p"),
            ("ppo", "hyper.score_clip"),
        ),
        *(
            ("ppo", "loop.max_failed"),
            ("ppo", "loop.best_metric"),
            ("reward", "reward.centring"),
            ("plan", "ppo.ema_decay"),
        ),
    ],
)
def test_off_is_a_word_of_the_command_line(command: str, path: str) -> None:
    cls = COMMANDS[command].settings
    value = with_value(cls, path, "off")
    assert by_option(cls, path, "off") == value and type(by_option(cls, path, "off")) is type(value)


@pytest.mark.parametrize(
    ("path", "word", "value"),
    [
        *(("hyper.dual_clip", "inf", math.inf), ("loop.max_kl", "inf", math.inf), ("loop.best_metric", "-kl", "-kl")),
        *(
            ("loop.log", "wandb", ("wandb",)),
            ("distributed.start", "off", "off"),
            ("ppo.score.normalise", "off", "off"),
        ),
        *(
            ("compute.remat", "none", "none"),
            ("pretrain", "None", None),
            ("seed", "010", 10),
            ("ppo.critic.init", "zero", "zero"),
        ),
    ],
)
def test_documented_values_work_when_written_plainly(path: str, word: str, value: Any) -> None:
    assert by_option(COMMANDS["ppo"].settings, path, word) == value


@every_command
def test_home_is_a_tilde_in_every_path(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    named = {path: every_type(kind) for path, kind in dotted_fields(cls) if Path in every_type(kind)}
    lists = [path for path, kinds in named.items() if tuple in map(typing.get_origin, kinds)]
    assert all(with_value(cls, path, ["~/x"]) == (tmp_path / "x",) for path in lists), lists
    paths = [path for path in named if path not in lists]
    assert all(with_value(cls, path, "~/x") == tmp_path / "x" for path in paths), paths
    for path in [] if lists else paths[:2]:
        if path != "run" and tyro.conf.Positional not in typing.get_args(dict(dotted_fields(cls))[path]):
            assert by_option(cls, path, "~/x") == tmp_path / "x"


def every_type(kind: Any) -> set[Any]:
    return {kind}.union(*(every_type(inner) for inner in typing.get_args(kind) if not isinstance(inner, Off)))


def test_home_is_a_tilde_where_a_text_may_name_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models, rewards and functions are texts, since they may be names; `ppo.critic.init` is an artifact's place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rewards.py").write_text("def score(prompts, responses, metadata):\n    return [1.0]\n")
    assert resolve("~/model") == find_reward("~/model") == tmp_path / "model"
    assert load_function("~/rewards.py:score")(["a"], ["b"], [{}]) == [1.0]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@every_command
def test_a_letter_that_is_left_out_brings_the_option_itself(cls: type) -> None:
    options, others = find_options(cls, ["--config"]), set[str]()
    for other in BRIEFS:  # what an earlier command has is tried there
        if other is cls:
            break
        others |= find_options(other).keys()
    for name in options.keys() - others:
        middle = len(name) - len(name.rpartition(".")[2]) // 2 - 1
        typed = name[:middle] + name[middle + 1 :]
        if typed in options or len(name) < 6:
            continue
        with pytest.raises(ConfigError) as error:
            write_out([typed, "1"], options)
        assert str(error.value) == f"there is no option {typed}; did you mean {name}?"


@every_command
def test_a_letter_that_is_left_out_of_a_choice_brings_the_choice_itself(cls: type) -> None:
    options = find_options(cls, ["--config"])
    for name, kind in options.items():
        bare = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        for choice in typing.get_args(bare) if typing.get_origin(bare) is typing.Literal else ():
            typed = choice[:2] + choice[3:]
            if len(choice) < 4 or typed in typing.get_args(bare):
                continue
            for words in ([name, typed], [f"{name}={typed}"]):
                with pytest.raises(ConfigError, match=f"did you mean {re.escape(choice)}"):
                    write_out(words, options)
            assert write_out([name, choice], options) == [name, choice]
