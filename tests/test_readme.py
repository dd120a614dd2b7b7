"""The library snippet of the README runs as it stands there."""

import re
from pathlib import Path

import pytest

from ppo_jax.cli.demo.language import model
from ppo_jax.models.files import hf

README = Path(__file__).parents[1] / "README.md"


def test_the_snippet_trains_and_prints_a_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    small = model()
    monkeypatch.chdir(tmp_path)
    hf.save(tmp_path / "runs/demo/sft/export/model", small.config, small.params, small.tokenizer)
    shorter = snippet.replace("range(20)", "range(2)")
    assert shorter != snippet
    exec(compile(shorter, "README.md", "exec"), {})
    *updates, response = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in updates] == ["update 1", "update 2"]
    assert response.startswith("the film is")
