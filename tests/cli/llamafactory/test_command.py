"""`ppo-jax llamafactory` on its own forms of data, with a tiny model: the translation, and the runs."""

from pathlib import Path

import pytest
import yaml

from ppo_jax.cli import main as cli
from ppo_jax.cli.sft import SFTSettings
from ppo_jax.runs.output.config import from_yaml
from tests.cli.llamafactory.tiny import DATA, REWARD, save_base

FILE = """
model_name_or_path: model
stage: {stage}
do_train: true
lora_rank: 2
dataset: {dataset}
dataset_dir: {folder}
template: qwen
cutoff_len: 64
output_dir: saves
per_device_train_batch_size: 2
num_train_epochs: 1.0
disable_gradient_checkpointing: true
"""


def write(folder: Path, stage: str, dataset: str, more: str = "") -> list[str]:
    """Write model and training file; the words of the command."""
    if not (folder / "model").is_dir():
        save_base(folder / "model")
    (folder / "file.yaml").write_text(FILE.format(stage=stage, dataset=dataset, folder=DATA) + more)
    return ["llamafactory", "file.yaml"]


def test_a_dry_run_prints_a_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write(tmp_path, "sft", "instructions", "ddp_timeout: 180000000\n")
    assert cli.main([*words, "--dry-run", "--set", "lora_rank=3"]) == 0
    said = capsys.readouterr().out
    assert "# no effect here: do_train, ddp_timeout (it steers the Trainer" in said and not Path("saves").exists()
    settings = from_yaml(SFTSettings, said)
    assert settings.adapter.rank == 3 and settings.adapter.alpha == 6 and settings.dataset.template.name == "qwen"


def test_sft_and_then_ppo_with_a_reward_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end token of the template is that of the export; PPO reads an adapter with a value head on the base."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(write(tmp_path, "sft", "instructions,talks", "max_steps: 1\n")) == 0
    told = yaml.safe_load(Path("saves/export/model/config.json").read_text())
    assert told["eos_token_id"] in (5, [5]) or 5 in told["eos_token_id"]  # <|im_end|>
    more = f"reward_model: {REWARD}\nmax_new_tokens: 3\nmax_steps: 1\nppo_epochs: 1\nppo_score_norm: true\n"
    words = write(tmp_path, "ppo", "messages", more)
    assert cli.main([*words, "--set", "output_dir=saves/ppo"]) == 0
    said = " ".join(capsys.readouterr().err.split()) + Path("saves/ppo/log.txt").read_text()
    assert "messages: 2 prompts, ShareGPT form" in said and "end token where it has one" in said
    assert Path("saves/ppo/export/model/model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_preferences(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(write(tmp_path, stage, "choices,alpaca_choices")) == 0
    assert Path("saves/export", "reward" if stage == "rm" else "model").is_dir()
