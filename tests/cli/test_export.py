"""`ppo-jax export`: transformers and peft write the same greedy text as we do; the card; what is refused."""

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.cli import hf as hub
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_jax.cli import main as cli
from ppo_jax.cli.export import MARK, upload_command
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.runs import trained
from tests import finished_run
from tests.data.tokenizer import CHAT, EOS
from tests.finished_run import MODEL

PROMPTS = ("ab", "hello", "one two")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("export"))


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command that has to fail as a user's mistake; returns what it said."""

    def fail(*args: object) -> str:
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr().err
        assert code == cli.MISTAKE and said and "Traceback" not in said
        return " ".join(said.replace("│", " ").split())

    return fail


def ours(run: Path, *more: object) -> dict[str, str]:
    """Greedy text of `ppo-jax generate`."""
    output = run.parent / "answers.jsonl"
    output.unlink(missing_ok=True)
    options = ["--temperature", "0", "--sampling.response-length", "8", "--output", str(output)]
    assert cli.main(["generate", *map(str, (run, *more)), "--prompt", *PROMPTS, *options]) == 0
    return {line["prompt"]: line["response"] for line in map(json.loads, output.read_text().splitlines())}


def theirs(model: torch.nn.Module, tokenizer: object) -> dict[str, str]:
    """Greedy text of transformers."""
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=EOS)
        texts[prompt] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def export(*args: object) -> None:
    assert cli.main(["export", *map(str, args)]) == 0


@pytest.mark.parametrize("step", [2, 3])
def test_both_formats_write_our_greedy_text(step: int, run: Path, tmp_path: Path) -> None:
    """Update 2 comes from a checkpoint, update 3 from export/policy."""
    expected = ours(run, "--step", step)
    export(run, "--step", step, "--to", tmp_path / "merged")
    export(run, "--step", step, "--to", tmp_path / "adapter", "--format", "peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs(merged, tokenizer) == expected
    plain = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)
    assert theirs(plain, tokenizer) != expected
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert theirs(adapted, AutoTokenizer.from_pretrained(tmp_path / "adapter")) == expected


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_the_generation_config_of_the_base_survives_whole(form: str, run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.parent / "model", tmp_path / "base"))
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1, "eos_token_id": [EOS]}
    (base / "generation_config.json").write_text(json.dumps(said))
    export(run, "--to", tmp_path / "m", "--model", base, "--format", form)
    found = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert {name: found[name] for name in said} == said | {"eos_token_id": EOS}


def test_what_lies_in_the_directories(run: Path, tmp_path: Path) -> None:
    for form, own in (
        ("merged", {"config.json", "model.safetensors"}),
        ("peft", {"adapter_config.json", "adapter_model.safetensors"}),
    ):
        export(run, "--to", tmp_path / form, "--format", form)
        names = {file.name for file in (tmp_path / form).iterdir()}
        shared = {"README.md", MARK, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert names - {"chat_template.jinja", "special_tokens_map.json"} == own | shared
        assert json.loads((tmp_path / form / "generation_config.json").read_text())["eos_token_id"] == EOS
        assert AutoTokenizer.from_pretrained(tmp_path / form).chat_template == CHAT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "peft"]  # and nothing half-written
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["layers_to_transform"] == [1, 2] and said["lora_alpha"] == 10.0


def test_the_card_holds_the_facts_of_the_run(run: Path, tmp_path: Path) -> None:
    export(run, "--to", tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "model"
    model = run.parent / "model"
    for fact in (fingerprint_of(model), "| Seed | 7 |", "`rm`", "| reward | 0.375 |", "| kl | 1.25 |", "jax 0."):
        assert fact in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["policy"]["rank"] == 4 and settings["hyper"]["kl_coef"] == 0.05
    assert "not stated in its files" in card and str(run) not in card and "run_dir" not in settings


def test_the_licence_of_the_base_is_passed_on(run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.parent / "model", tmp_path / "base"))
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\nlicense: other\n")
    export(run, "--to", tmp_path / "m", "--model", base)
    card = (tmp_path / "m" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "| Licence of the base | apache-2.0 |" in card


def test_a_path_that_a_program_chose_is_not_published(run: Path, tmp_path: Path) -> None:
    """A base named by the run's configuration is the user's own word; any other absolute path is cut."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(f"model: {run.parent / 'model'}\n", ""))
    export(copy, "--to", tmp_path / "p", "--format", "peft")
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    assert str(run.parent) not in (tmp_path / "p" / "README.md").read_text()


def test_a_bare_model_and_its_dtype(run: Path, tmp_path: Path) -> None:
    export("--model", run.parent / "model", "--to", tmp_path / "m", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == MODEL.num_layers


@pytest.mark.parametrize("adapter", [AdapterConfig(kind="top_k", layers=1), AdapterConfig(kind="full")], ids=str)
def test_layers_that_were_trained_whole(adapter: AdapterConfig, tmp_path: Path, mistake: Callable[..., str]) -> None:
    run = finished_run.make(tmp_path, adapter, steps=())
    export(run, "--to", tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert theirs(merged, AutoTokenizer.from_pretrained(tmp_path / "m")) == ours(run)
    said = mistake("export", run, "--to", tmp_path / "p", "--format", "peft")
    assert "the peft format holds LoRA alone" in said and "choose the merged format" in said
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("step", [2, 3])
def test_on_a_mesh_the_same_model_is_written(step: int, tmp_path: Path) -> None:
    """Of a policy trained whole, from a checkpoint and from export/policy; of a LoRA adapter up to rounding."""
    full = finished_run.make(tmp_path, AdapterConfig(kind="full"), steps=(2,))
    lora = finished_run.make(tmp_path / "lora", steps=(2,))
    for run in (full, lora):
        for name, mesh in (("one", ""), ("eight", "--mesh.fsdp 8")):
            export(run, "--step", step, "--to", tmp_path / run.parent.name / name, *mesh.split())
        one, eight = (load_file(tmp_path / run.parent.name / name / "model.safetensors") for name in ("one", "eight"))
        assert one.keys() == eight.keys()
        for name in one:
            np.testing.assert_allclose(
                eight[name], one[name], rtol=0 if run is full else 1e-6, atol=1e-7 * (run is lora)
            )
    assert (tmp_path / "lora" / "one" / "model.safetensors").stat().st_size > 10_000


def test_nothing_of_the_users_is_replaced(run: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    export(run, "--to", tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert "already exists; choose another --to, or pass --overwrite" in mistake("export", run, "--to", tmp_path / "m")
    export(run, "--step", 2, "--to", tmp_path / "m", "--overwrite")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    for target in (tmp_path / "thesis", tmp_path / "m" / "README.md"):
        assert "is not an exported model" in mistake("export", run, "--to", target, "--overwrite")
    for target in (run, run.parent, run / "export", run / "export" / "policy", run / "new"):
        assert "would replace the run" in mistake("export", run, "--to", target, "--overwrite")
    assert trained.find(run).step == 3 and (tmp_path / "thesis" / "chapter.txt").exists()


def test_only_what_an_export_wrote_is_replaced(run: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    """Somebody's model, or an export with somebody's notes in it, has a config.json too."""
    model = Path(shutil.copytree(run.parent / "model", tmp_path / "theirs"))
    assert (model / "config.json").is_file()
    assert f"is not an exported model (it holds no {MARK})" in mistake("export", run, "--to", model, "--overwrite")
    export(run, "--to", tmp_path / "m")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "notes" / "mine.txt").write_text("mine")
    said = mistake("export", run, "--to", tmp_path / "m", "--overwrite")
    assert "holds files that no export wrote (notes/mine.txt)" in said
    (tmp_path / "m" / MARK).write_text("[")
    assert "cannot be read" in mistake("export", run, "--to", tmp_path / "m", "--overwrite")
    assert (tmp_path / "m" / "notes" / "mine.txt").read_text() == "mine" and (model / "config.json").is_file()


def test_the_base_is_not_replaced_by_what_was_made_from_it(
    run: Path, tmp_path: Path, mistake: Callable[..., str]
) -> None:
    """The base may be an export itself, so that its list of files would let it go."""
    base = tmp_path / "bases" / "base"
    export("--model", run.parent / "model", "--to", base)
    for target in (base, base.parent / "." / "base", base.parent):
        said = mistake("export", "--model", base, "--to", target, "--overwrite")
        assert "would replace the base model" in said or "not an exported model" in said
    assert "would replace the base" in mistake("export", run, "--model", base, "--to", base, "--overwrite")
    assert (base / "model.safetensors").is_file()


def test_wrong_options(run: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    to = ("--to", tmp_path / "x")
    assert "--to" in mistake("export", run)
    assert "nothing to export: give a run" in mistake("export", *to)
    assert "need a run" in mistake("export", "--model", run.parent / "model", "--format", "peft", *to)
    assert "merged" in mistake("export", run, "--format", "gguf", *to)
    said = mistake("export", run, "--format", "peft", "--dtype", "bfloat16", *to)
    assert "--format peft writes float32; leave out --dtype bfloat16" in said
    assert "no policy of --step 4; its checkpoints: 2, 3" in mistake("export", run, "--step", 4, *to)
    assert "no such run directory" in mistake("export", tmp_path / "none", *to)
    assert "give RUN too" in mistake("generate", "--step", 3, "--prompt", "a")
    assert "are one option" in mistake("generate", run, "--policy", run, "--prompt", "a")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-model", "my-model"),
        ("my model's [v2]", "my-model-s-v2"),
        ("-x", "x"),
        ("Qwen2.5..tuned.git", "Qwen2-5-tuned-git"),
        ("müsli", "m-sli"),
        ("$(echo hi)", "echo-hi"),
        ("a" * 120, "a" * 96),
        ("…", "model"),
    ],
)
def test_the_line_that_uploads_is_a_command_of_the_hub_library(folder: str, name: str, tmp_path: Path) -> None:
    """Read by the real command; nothing is sent."""
    (tmp_path / folder).mkdir()
    words = shlex.split(upload_command(tmp_path / folder))
    assert words[:2] == ["hf", "upload"] and "hf" in {entry.name for entry in entry_points(group="console_scripts")}
    _, command, options = hub.app.resolve_command(click.Context(hub.app), words[1:])
    given = command.make_context("upload", options).params
    assert given["repo_id"] == name and given["private"] is True and validate_repo_id(name) is None
    assert (given["local_path"], given["path_in_repo"]) == (str(tmp_path / folder), ".")


def test_a_directory_that_begins_with_a_dash_is_no_option() -> None:
    assert upload_command(Path("-x")) == "hf upload x ./-x . --private"
