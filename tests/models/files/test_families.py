"""config.json <-> ModelConfig: every field that changes the maths is understood or refused."""

import dataclasses

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.models.files.families import FAMILIES, config_from_hf, config_to_hf
from tests.models.tiny import CONFIG, LLAMA3

# The fields of config.json of SmolLM2-135M-Instruct that matter, as transformers 4 wrote them.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA31_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_a_whole_config_field_by_field() -> None:
    assert config_from_hf(SMOLLM2) == ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_assumes(name: str) -> None:
    """transformers' own record of what it makes of them, read back, says the same in every field."""
    renamed = FAMILIES[name].renamed
    needed = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 64}
    needed |= {"num_hidden_layers": 8, "num_attention_heads": 32}
    raw = {renamed.get(field, field): value for field, value in needed.items()} | {"model_type": name}
    ours = config_from_hf(raw)
    assert ours == config_from_hf(transformers.AutoConfig.for_model(**raw).to_dict())
    del raw[renamed.get("hidden_size", "hidden_size")]
    with pytest.raises(ValueError, match=f"{renamed.get('hidden_size', 'hidden_size')} is missing"):
        config_from_hf(raw)


def test_which_layers_have_windows_where_config_json_is_silent() -> None:
    raw = {name: SMOLLM2[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    raw |= {"num_hidden_layers": 8, "num_key_value_heads": 3, "max_position_embeddings": 8192}

    def windows(**fields: object) -> tuple[int | None, tuple[int, ...]]:
        config = config_from_hf(raw | fields)
        return config.window, config.windowed

    assert windows(model_type="mistral") == (4096, tuple(range(8)))
    assert windows(model_type="qwen2", use_sliding_window=True, max_window_layers=6) == (4096, (6, 7))
    assert windows(model_type="qwen2", sliding_window=512) == (None, ())
    assert windows(model_type="gemma2") == (4096, (0, 2, 4, 6))
    assert windows(model_type="gemma3_text", sliding_window=512) == (512, (0, 1, 2, 3, 4, 6, 7))
    assert windows(model_type="gemma3_text", sliding_window_pattern=2) == (4096, (0, 2, 4, 6))
    assert config_from_hf(raw | {"model_type": "smollm3"}).unrotated == (3, 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA31_SCALING},  # transformers 4
        {"rope_parameters": LLAMA31_SCALING | {"rope_theta": 5e5}},  # transformers 5
        {"rope_theta": 5e5, "rope_parameters": LLAMA31_SCALING, "rope_scaling": LLAMA31_SCALING},
    ],
)
def test_llama3_scaling_in_either_place(fields: dict) -> None:
    raw = {k: v for k, v in SMOLLM2.items() if not k.startswith("rope_")}
    config = config_from_hf(raw | fields)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling_under_either_name(key: str) -> None:
    config = config_from_hf(SMOLLM2 | {"rope_scaling": {key: "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_default_rope_parameters_are_no_scaling() -> None:
    raw = SMOLLM2 | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = config_from_hf(raw)
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "model_type='bloom' is not supported; supported: llama, mistral, qwen2"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; supported: 'silu'"),
        ({"model_type": "gpt2", "n_embd": 576, "n_head": 9, "n_layer": 0}, "n_layer=0 is not a positive integer"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers=[1, 2] is not a list of a 0 or 1"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers"),
        ({"model_type": "gemma2", "sliding_window": None, "layer_types": ["sliding_attention"]}, "layer_types="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"attention_multiplier": 0.1}, "attention_multiplier=0.1"),
        ({"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"sliding_window": 1024}, "sliding_window=1024 is shorter than max_position_embeddings=8192"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types="),
        ({"layer_types": ["sliding_attention"]}, "layer_types="),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type='ntk' is not supported; supported: def"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 4.0}}, "rope_type='dynamic' with the fields ['alpha']"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "short_factor is not a list of numbers"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type is given twice"),
        ({"rope_scaling": LLAMA31_SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor=4.0 is not above"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given twice"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e5}}}, "differ by layer"),
        ({"num_key_value_heads": 2}, "not a multiple of num_kv_heads"),
        ({"num_attention_heads": 7}, "hidden_size=576 is not a multiple of 7 heads"),
        ({"head_dim": 63}, "head_dim=63 is odd"),
        ({"hidden_size": "576"}, "hidden_size='576' is not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive integer"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id="),
        ({"model_type": "qwen2", "attention_bias": False}, "attention_bias=False contradicts model_type='qwen2'"),
        ({"model_type": "mistral", "sliding_window": None, "attention_bias": True}, "attention_bias=True contradicts"),
        ({"model_type": "mistral", "sliding_window": None, "mlp_bias": True}, "mlp_bias=True contradicts"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        config_from_hf(SMOLLM2 | changes)
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is missing"):
        config_from_hf({k: v for k, v in SMOLLM2.items() if k != field})


def test_a_window_that_never_bites_is_fine() -> None:
    assert config_from_hf(SMOLLM2 | {"sliding_window": 8192}).window is None
    unused = {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False, "attention_bias": None}
    assert config_from_hf(SMOLLM2 | unused).attention_bias


FLAGS = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 4),
        "groups": st.integers(1, 4),
        "half": st.integers(1, 8),
        "theta": st.floats(1.0, 1e7),
        "scaling": st.sampled_from([None, LLAMA3, RopeScaling("linear", 2.5)]),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "positions": st.integers(64, 10**6),
        "eos": st.lists(st.integers(0, 66), max_size=3, unique=True),
        "family": st.sampled_from(["llama", "mistral", "qwen2"]),
    }
)


def config_of(flags: dict) -> ModelConfig:
    """A configuration that its family can express."""
    llama, heads = flags["family"] == "llama", flags["kv_heads"] * flags["groups"]
    return dataclasses.replace(
        CONFIG,
        hidden_size=4 * heads,  # transformers wants a multiple of the heads
        num_heads=heads,
        num_kv_heads=flags["kv_heads"],
        head_dim=2 * flags["half"],
        rope_theta=flags["theta"],
        rope_scaling=flags["scaling"],
        tie_embeddings=flags["tied"],
        attention_bias=flags["bias"] if llama else flags["family"] == "qwen2",
        output_bias=llama and flags["bias"],
        mlp_bias=llama and flags["mlp_bias"],
        max_positions=flags["positions"],
        eos_token_ids=tuple(flags["eos"]),
        family=flags["family"],
    )


@given(FLAGS)
def test_config_to_hf_and_back(flags: dict) -> None:
    config = config_of(flags)
    assert config_from_hf(config_to_hf(config)) == config


@given(FLAGS)
def test_transformers_reads_the_same_config(flags: dict) -> None:
    """transformers' own record of what it read from ours, read back, is the same configuration."""
    config = config_of(flags)
    theirs = transformers.AutoConfig.for_model(**config_to_hf(config)).to_dict()
    assert config_from_hf(theirs) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias differs"),
        ({"family": "mistral", "attention_bias": True}, "a mistral model cannot have"),
        ({"family": "qwen2"}, "a qwen2 model cannot have"),
        ({"family": "bloom"}, "family='bloom'"),
        ({"qk_norm": "head"}, "a llama model cannot have qk_norm='head'; it has 'none'"),
        ({"window": 8, "windowed": (1,)}, "a llama model cannot have windows in the layers"),
        ({"family": "mistral", "window": 8, "windowed": (1,)}, "a mistral model cannot have windows in the layers"),
        ({"unrotated": (1,)}, "no rotary positions in"),
        ({"family": "gpt_neox", "mlp_bias": True, "norm": "layer", "gated": False}, "as many key/value heads as heads"),
    ],
)
def test_a_config_that_the_family_cannot_express(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_hf(dataclasses.replace(CONFIG, **changes))
