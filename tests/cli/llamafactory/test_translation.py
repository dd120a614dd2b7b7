"""Training files of LLaMA-Factory in our words: values by hand, its defaults, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.cli.llamafactory.reading import list_without_effect, read_arguments
from ppo_jax.cli.llamafactory.translation import Translation, translate
from ppo_jax.cli.main import STAGES
from ppo_jax.runs.output.config import from_plain
from tests.cli.llamafactory.tiny import DATA

COMMON = f"""
model_name_or_path: base   # as its examples are written
do_train: true
dataset_dir: {DATA}
template: qwen
output_dir: saves/it
learning_rate: 1.0e-4
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
report_to: none
resume_from_checkpoint: null
"""


def make(tmp_path: Path, text: str, *changes: str, devices: int = 1) -> Translation:
    """Translate a file, and see that our command takes what comes out."""
    file = tmp_path / "file.yaml"
    file.write_text(COMMON + text)
    found = translate(read_arguments(file, changes), devices, "auto")
    from_plain(STAGES[found.command][0], found.settings)
    return found


def test_sft_with_what_its_example_says(tmp_path: Path) -> None:
    found = make(tmp_path, "stage: sft\ndataset: instructions,talks\ncutoff_len: 2048\nlora_rank: 8\nbf16: true\n")
    settings = found.settings
    assert found.command == "sft" and settings["data"] == f"{DATA}/dataset_info.json:instructions"
    assert settings["dataset"] == {"template": {"name": "qwen"}, "more": [f"{DATA}/dataset_info.json:talks"]}
    assert settings["adapter"] == {"kind": "lora", "rank": 8, "alpha": 16.0}
    assert settings["sft"] == {
        "epochs": 3.0, "batch_size": 8, "accumulate": 8, "learning_rate": 1e-4, "max_grad_norm": 1.0
    }  # fmt: skip
    assert settings["compute"] == {"dtype": "bfloat16", "remat": "full"}
    assert (settings["turns"], settings["too_long"], settings["max_length"]) == ("together", "share", 2048)
    assert settings["loop"] == {
        "schedule": "cosine", "eval_every": 0, "checkpoint_every": 500, "keep_every": 500, "warmup": 0.1
    }  # fmt: skip
    assert (settings["held_out"], settings["seed"], settings["resume"]) == (0, 42, "auto")


def test_ppo_keeps_its_semantics(tmp_path: Path) -> None:
    """Buffer, whitening, score normalisation, KL control and sampling, with the defaults of its PPO."""
    text = "stage: ppo\ndataset: instructions,messages\nreward_model: saves/rm\nppo_buffer_size: 2\n"
    text += "gradient_accumulation_steps: 1\nppo_score_norm: true\nppo_whiten_rewards: true\nmax_new_tokens: 512\n"
    settings = make(tmp_path, text.replace("gradient_accumulation_steps: 1\n", ""), "gradient_accumulation_steps=1")
    ppo, loop, hyper = (settings.settings[part] for part in ("ppo", "loop", "hyper"))
    assert ppo["sampling"] == {"response_length": 512, "top_p": 0.7, "top_k": 50, "repetition_penalty": 1.0}
    assert (ppo["epochs"], ppo["num_minibatches"], ppo["accumulate"]) == (4, 2, 1)
    assert ppo["score"] == {"normalise": "shift", "whiten_rewards": "scale"}
    assert ppo["kl"] == {"control": "adaptive"}
    # of 6 + 2 prompts 2 make a batch: 4 updates in each of 3 epochs, and 0.1 * 12 rounded up to warm up
    assert (loop["batch_size"], loop["updates"], loop["warmup"]) == (2, 12, 2)
    assert hyper == {
        "learning_rate": 1e-4, "temperature": 0.95, "max_grad_norm": 1.0, "kl_coef": 0.2, "kl_target": 6.0,
        "kl_horizon": 10_000.0, "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2,
        "vf_coef": 0.1, "value_clip": 0.2, "ratio_threshold": 10.0,
    }  # fmt: skip
    assert settings.settings["reward"] == ["saves/rm"] and settings.settings["scoring"] == {"at": "sampled"}


def test_a_reward_server(tmp_path: Path) -> None:
    text = "stage: ppo\ndataset: messages\nreward_model_type: api\nreward_model: {}\nmax_steps: 3\n"
    text = text.format("http://localhost:8000/v1/score/evaluation")
    settings = make(tmp_path, text, "gradient_accumulation_steps=1").settings
    assert settings["scoring"] == {"api": {"protocol": "llamafactory"}, "special_tokens": "keep"}
    assert settings["loop"]["updates"] == 3
    with pytest.raises(ValueError, match="reward_model: 'saves/rm' must be a URL"):
        make(tmp_path, text.replace("http://localhost:8000/v1/score/evaluation", "saves/rm"))


def test_rm_and_dpo(tmp_path: Path) -> None:
    rm = make(
        tmp_path, "stage: rm\ndataset: choices\nlora_rank: 4\nlora_alpha: 4\nuse_rslora: true\nuse_dora: true\n"
    ).settings
    assert rm["pairs"].endswith(":choices") and rm["loop"]["best_metric"] == "accuracy"
    assert (rm["reward"]["batch_size"], rm["reward"]["head_steps"], rm["reward"]["normalise"]) == (16, 0, False)
    assert rm["reward"]["alpha"] == 4 * math.sqrt(4)  # ours is divided by the rank, rsLoRA's by its root
    assert rm["reward"]["dora"]
    assert rm["reward"]["epochs"] == 3 and "accumulate" not in rm["reward"]
    text = "stage: dpo\ndataset: choices\npref_beta: 0.2\nfinetuning_type: freeze\nfreeze_trainable_layers: 3\n"
    dpo = make(tmp_path, text + "val_size: 0.1\neval_strategy: steps\neval_steps: 7\n").settings
    assert dpo["adapter"] == {"kind": "top_k", "layers": 3} and dpo["dpo"]["beta"] == 0.2
    assert dpo["dataset"]["held_out_fraction"] == 0.1 and dpo["loop"]["eval_every"] == 7


def test_steps_of_epochs_and_shares_are_counted(tmp_path: Path) -> None:
    """5 rows, of which 1 is held out, in batches of 2: 2 steps an epoch, 6 in 3; a quarter of 6 is every second."""
    text = "stage: sft\ndataset: instructions\nval_size: 1\n"
    changes = ("gradient_accumulation_steps=2", "save_strategy=epoch", "eval_strategy=steps", "eval_steps=0.25")
    loop = make(tmp_path, text, *changes).settings["loop"]
    assert (loop["checkpoint_every"], loop["eval_every"]) == (2, 2)


def test_several_devices_share_a_larger_batch(tmp_path: Path) -> None:
    settings = make(tmp_path, "stage: sft\ndataset: messages\nfinetuning_type: full\n", devices=4).settings
    assert settings["mesh"] == {"data": 4} and settings["adapter"] == {"kind": "full"}
    assert settings["sft"]["batch_size"] == 32 and settings["sft"]["accumulate"] == 8


def test_targets_and_mixtures(tmp_path: Path) -> None:
    text = "stage: sft\ndataset: messages,talks\nlora_target: q_proj,v_proj\nmix_strategy: interleave_over\n"
    settings = make(tmp_path, text + "interleave_probs: 0.7, 0.3\n").settings
    assert settings["adapter"]["targets"] == ["q", "v"] and settings["dataset"]["weights"] == [0.7, 0.3]


def test_what_says_nothing_new_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(COMMON + "stage: sft\ndataset: messages\npacking: false\nquantization_bit: null\nplot_loss: true\n")
    arguments = read_arguments(file)
    listed = [name for names in list_without_effect(arguments).values() for name in names]
    assert sorted(listed) == ["ddp_timeout", "do_train", "packing", "plot_loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: kto", "stage: kto is refused: KTO is not had here"),
        ("stage: pt", "stage: pt is refused: learn from texts with `ppo-jax sft"),
        ("stage: sfd", "stage: sfd is refused: there are: sft, rm, dpo, ppo"),
        ("quantization_bit: 3", "quantization_bit: 3 is not had here; allowed: 4, 8"),
        ("quantization_bit: 8\nquantization_method: hqq", "quantization_method: 'hqq' is not had here; allowed: bnb"),
        ("quantization_bit: 8\nfinetuning_type: full", "quantization_bit: 8 needs finetuning_type lora or freeze"),
        ("packing: true\npissa_init: true", "packing: True is refused: .*; pissa_init: True is refused"),
        ("adapter_name_or_path: saves/a,saves/b", "adapter_name_or_path: .* must be one adapter, with finetuning_type"),
        ("lora_dropout: 0.05", "lora_dropout: 0.05 is refused: there is no dropout here"),
        ("lora_ranc: 8", "lora_ranc is no argument of LLaMA-Factory 0.9.3; did you mean lora_rank"),
        ("lora_target: c_attn", "lora_target: 'c_attn' must be all, or of q_proj"),
        ("lora_rank: many", "lora_rank: 'many' must be a number"),
        ("num_train_epochs: true", "num_train_epochs: True must be a number"),
        ("weight_decay: 0.1", "weight_decay: 0.1 is refused: only ppo has a choice there"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type: 'polynomial' is not had here; allowed: linear, cosine"),
        ("resume_from_checkpoint: saves/checkpoint-5", "resume_from_checkpoint: .* must be true or false"),
        ("optim: adafactor", "optim: 'adafactor' is not had here"),
        ("report_to: swanlab", "report_to: 'swanlab' is not had here; allowed: none, tensorboard, wandb, mlflow"),
        ("freeze_trainable_layers: -2\nfinetuning_type: freeze", "counts from the bottom"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    lines = dict(line.split(": ", 1) for line in ("stage: sft", "dataset: messages", *text.splitlines()))
    common = "\n".join(line for line in COMMON.splitlines() if line.partition(":")[0] not in lines)
    file = tmp_path / "file.yaml"
    file.write_text(common + "\n" + "".join(f"{name}: {value}\n" for name, value in lines.items()))
    with pytest.raises(ValueError, match=message):
        translate(read_arguments(file), 1, "auto")


def test_losses_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pref_loss: 'orpo' is not had here; allowed: sigmoid"):
        make(tmp_path, "stage: dpo\ndataset: choices\npref_loss: orpo\n")
    with pytest.raises(ValueError, match="a batch has 64 prompts .*, and the data sets have fewer"):
        make(tmp_path, "stage: ppo\ndataset: messages\nreward_model: r\nppo_buffer_size: 8\n")
    with pytest.raises(FileNotFoundError, match="is not a file; give a training file"):
        read_arguments(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="dataset is missing"):
        make(tmp_path, "stage: sft\n")


def test_numbers_as_its_users_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-5 for text; JSON files are read too."""
    given: dict[str, Any] = make(tmp_path, "stage: sft\ndataset: messages\n", "learning_rate=1e-5").settings
    assert given["sft"]["learning_rate"] == 1e-5


def test_trackers(tmp_path: Path) -> None:
    text = "stage: sft\ndataset: messages\n"
    loop = make(tmp_path, text, "report_to=mlflow,wandb").settings["loop"]
    assert loop["log"] == ["tensorboard", "mlflow", "wandb"] and loop["project"] == "huggingface"
    assert "log" not in make(tmp_path, text, "report_to=none").settings["loop"]


def test_an_adapter_is_gone_on_with_or_merged_under_a_new_one(tmp_path: Path) -> None:
    text = "lora_rank: 4\nadapter_name_or_path: saves/sft\n"
    sft = make(tmp_path, f"stage: sft\ndataset: messages\n{text}").settings
    assert sft["start"] == "saves/sft" and "adapter" not in sft
    small = "gradient_accumulation_steps=1"
    ppo = make(tmp_path, f"stage: ppo\ndataset: messages\nreward_model: r\n{text}", small)
    assert ppo.settings["start"] == "saves/sft" and "policy" not in ppo.settings
    rm = make(tmp_path, f"stage: rm\ndataset: choices\n{text}").settings
    assert rm["start"] == "saves/sft" and not rm["reward"].keys() & {"kind", "rank", "alpha", "lora_layers"}
    new = make(tmp_path, f"stage: sft\ndataset: messages\n{text}create_new_adapter: true\n").settings
    assert new["model"] == "saves/sft" and "start" not in new and new["adapter"]["rank"] == 4
