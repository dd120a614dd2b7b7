"""The training files among LLaMA-Factory's own examples, as keys and values: what each becomes here, or why not."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_jax.cli.llamafactory.reading import read_arguments
from ppo_jax.cli.llamafactory.translation import Translation, translate
from ppo_jax.cli.main import STAGES
from ppo_jax.runs.output.config import FieldError, from_plain
from tests.cli.llamafactory.tiny import FIXTURE

TABLE = json.loads((FIXTURE / "examples.json").read_text())
IMAGES = "dataset.template: name='qwen2_vl' is no template that is known"
# File -> our command, or the key that is named with its reason.
BECOMES = {
    "extras/adam_mini/qwen2_full_sft.yaml": "use_adam_mini: True is refused: Adam is what trains here",
    "extras/apollo/llama3_full_sft.yaml": "use_apollo: True is refused: Adam is what trains here",
    "extras/badam/llama3_full_sft.yaml": "use_badam: True is refused: Adam is what trains here",
    "extras/fsdp_qlora/llama3_lora_sft.yaml": "sft",
    "extras/galore/llama3_full_sft.yaml": "use_galore: True is refused: Adam is what trains here",
    "extras/llama_pro/llama3_freeze_sft.yaml": "use_llama_pro: True is refused: this kind of adapter is not had",
    "extras/loraplus/llama3_lora_sft.yaml": "loraplus_lr_ratio: 16.0 is refused: Adam is what trains here",
    "extras/mod/llama3_full_sft.yaml": "mixture_of_depths: 'convert' is refused: this kind of adapter is not had",
    "extras/muon/qwen2_full_sft.yaml": "use_muon: True is refused: Adam is what trains here",
    "extras/nlg_eval/llama3_lora_predict.yaml": (
        "do_predict: True is refused: only training is run; predict_with_generate: True is refused"
    ),
    "extras/pissa/llama3_lora_sft.yaml": "pissa_init: True is refused: this kind of adapter is not had",
    "train_full/llama3_full_sft.yaml": "sft",
    "train_full/qwen2_5vl_full_sft.yaml": IMAGES,
    "train_lora/llama3_lora_dpo.yaml": "dpo",
    "train_lora/llama3_lora_kto.yaml": "stage: kto is refused: KTO is not had here",
    "train_lora/llama3_lora_ppo.yaml": "ppo",
    "train_lora/llama3_lora_pretrain.yaml": "stage: pt is refused: learn from texts with `ppo-jax sft",
    "train_lora/llama3_lora_reward.yaml": "reward",
    "train_lora/llama3_lora_sft.yaml": "sft",
    "train_lora/llama3_lora_sft_ds3.yaml": "sft",
    "train_lora/llama3_lora_sft_ray.yaml": "sft",
    "train_lora/llama3_preprocess.yaml": "tokenized_path: .*is refused: data are read from their own files, never as",
    "train_lora/llama4_lora_sft_ds3.yaml": "dataset.template: name='llama4' is no template that is known",
    "train_lora/qwen2_5vl_lora_dpo.yaml": IMAGES,
    "train_lora/qwen2_5vl_lora_sft.yaml": IMAGES,
    "train_qlora/llama3_lora_sft_aqlm.yaml": "sft",  # and then the model's own quantization_config is refused
    "train_qlora/llama3_lora_sft_awq.yaml": "sft",
    "train_qlora/llama3_lora_sft_bnb_npu.yaml": "sft",
    "train_qlora/llama3_lora_sft_gptq.yaml": "sft",
    "train_qlora/llama3_lora_sft_otfq.yaml": "sft",
}


def given(name: str) -> dict[str, Any]:
    """The keys and values of an example: the usual ones, but for those that it has not, and its own."""
    own = dict(TABLE["files"][name])
    absent = own.pop("", ())
    return {key: value for key, value in TABLE["usual"].items() if key not in absent} | own


def make(folder: Path, name: str) -> Translation:
    """Translate an example as it stands, and see that our command takes what comes out; PPO counts 1,091 prompts."""
    data = folder / "data"
    data.mkdir()
    rows = [{"instruction": f"i {number}", "output": "o"} for number in range(1000)]
    for file, part in (("identity", rows[:91]), ("alpaca_en_demo", rows)):
        (data / f"{file}.json").write_text(json.dumps(part))
    info = {file: {"file_name": f"{file}.json"} for file in ("identity", "alpaca_en_demo")}
    (data / "dataset_info.json").write_text(json.dumps(info))
    (folder / "file.yaml").write_text(yaml.safe_dump(given(name), sort_keys=False))
    found = translate(read_arguments(folder / "file.yaml", [f"dataset_dir={data}"]), 1, "auto")
    from_plain(STAGES[found.command][0], found.settings)
    return found


def test_the_table_is_of_all_of_them() -> None:
    assert set(BECOMES) == set(TABLE["files"]) and len(BECOMES) == 30
    stages = [given(name)["stage"] for name in BECOMES]
    assert Counter(stages) == {"sft": 24, "dpo": 2, "kto": 1, "ppo": 1, "pt": 1, "rm": 1}


@pytest.mark.parametrize("name", BECOMES)
def test_an_example_is_translated_or_refused_by_its_key(name: str, tmp_path: Path) -> None:
    expected = BECOMES[name]
    if ":" in expected:
        with pytest.raises((ValueError, FieldError)) as refused:
            make(tmp_path, name)
        assert re.search(expected, str(refused.value)), refused.value
        return
    found, file = make(tmp_path, name), given(name)
    assert found.command == expected
    assert found.settings["model"] == file["model_name_or_path"] and found.settings["run_dir"] == file["output_dir"]
    assert found.settings["dataset"]["template"] == {"name": "llama3"}
    assert found.settings["compute"] == {"dtype": "bfloat16", "remat": "full"} | (
        {"quantise": "int4"} if "quantization_bit" in file else {}
    )
    part = found.settings["hyper" if expected == "ppo" else expected]
    assert part["learning_rate"] == file["learning_rate"]
    if expected in ("sft", "dpo"):
        kind = found.settings["adapter"]
        assert kind == ({"kind": "full"} if "full" in name else {"kind": "lora", "rank": 8, "alpha": 16.0})
        assert part["batch_size"] == file["gradient_accumulation_steps"]
        assert found.settings["loop"]["warmup"] == 0.1 and found.settings["loop"]["schedule"] == "cosine"


def test_the_ppo_example(tmp_path: Path) -> None:
    """1,091 prompts in batches of 8: 136 updates an epoch, of which there are 3; a tenth of them warms up."""
    settings = make(tmp_path, "train_lora/llama3_lora_ppo.yaml").settings
    assert settings["reward"] == ["saves/llama3-8b/lora/reward"] and settings["scoring"] == {"at": "sampled"}
    assert (settings["loop"]["updates"], settings["loop"]["batch_size"], settings["loop"]["warmup"]) == (408, 8, 41)
    assert settings["ppo"]["sampling"] == {
        "response_length": 512, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0
    }  # fmt: skip
