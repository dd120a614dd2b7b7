"""A stage on data as people bring it: ShareGPT in JSON, Alpaca in CSV, mixed, with a template and a held-out file."""

import dataclasses
import json
from pathlib import Path

import pytest

from ppo_jax.cli import main as cli
from ppo_jax.models.files import hf
from ppo_jax.runs.output import rundir
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


def test_sft_on_two_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(chat=False)
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    hf.save(tmp_path / "model", config, random_params(config), tokenizer)
    turns = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": 2 * turns}, {"conversations": turns[:1]}]))
    (tmp_path / "b.csv").write_text("instruction,output,id\nef,gh,1\nij,kl,2\n")
    (tmp_path / "test.jsonl").write_text('{"prompt": "mn", "completion": "op"}\n')
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    words = ["sft", "--model", "model", "--data", "b.csv", "--chat-template", "chat.jinja", "--turns", "together"]
    words += ["--dataset.held-out-file", "test.jsonl", "--sft.batch-size", "2", "--sft.epochs", "1"]
    assert cli.main([*words, "--run-dir", "wrong"]) != 0
    said = capsys.readouterr()
    assert 'b.csv, line 2: unknown field "id"' in said.err + said.out and not (tmp_path / "wrong").exists()
    (tmp_path / "b.csv").write_text("instruction,output\nef,gh\nij,kl\n")
    words += ["--dataset.more", "a.json", "--dataset.weights", "1", "1"]
    assert cli.main([*words, "--run-dir", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split()) + (tmp_path / "run" / rundir.LOG).read_text()
    for line in ("b.csv: 2 demonstrations, Alpaca form", "test.jsonl: 1 demonstrations, TRL form",
                 "a.json: 1 demonstrations, ShareGPT form, 1 skipped: the last turn is no answer"):  # fmt: skip
        assert line in said
    exported = tmp_path / "run" / "export" / "model"
    assert "generation" in (exported / "chat_template.jinja").read_text()
