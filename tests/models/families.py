"""A tiny random model of every family, and of every flag that a family can turn: as transformers describes it."""

import torch
import transformers

SIZES = {
    "vocab_size": 68,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",  # the one that caps scores
}
NARROW = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 5}
HALF = ["full_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 8.0]}
GPT2 = {"vocab_size": 68, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}

# name: (model_type, fields); a name without "-" is the family as it mostly is.
CASES: dict[str, tuple[str, dict]] = {
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2": ("qwen2", WINDOW | {"use_sliding_window": True, "layer_types": HALF}),
    "mistral": ("mistral", WINDOW),
    "gemma2": ("gemma2", WINDOW | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma2-uncapped": ("gemma2", WINDOW | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", WINDOW | {"query_pre_attn_scalar": 24, "layer_types": HALF[1:] + HALF[:1]}),
    "gemma3-stretched": ("gemma3_text", WINDOW | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-wide": ("gpt2", GPT2 | {"n_inner": 40, "activation_function": "gelu"}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "intermediate_size": 40}),
    "gpt_neox-serial": ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", WINDOW | {"partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 32}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": ("smollm3", WINDOW | {"use_sliding_window": True, "no_rope_layers": [1, 0, 0]}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 5.0},
    ),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
}
FAMILIES = [name for name in CASES if "-" not in name]


def torch_model(name: str, kind: type = transformers.AutoModelForCausalLM, **more: object) -> torch.nn.Module:
    """The model of a case with random weights in which every array matters."""
    model_type, fields = CASES[name]
    sizes = {} if model_type == "gpt2" else SIZES
    if model_type == "gpt_neox":
        sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
    config = transformers.AutoConfig.for_model(model_type, **(sizes | fields | more))
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            around_one = "norm" in key or ".ln_" in key
            offset = 1.0 if around_one and key.endswith("weight") and not model_type.startswith("gemma") else 0.0
            parameter.normal_(offset, 0.3)
    return model
