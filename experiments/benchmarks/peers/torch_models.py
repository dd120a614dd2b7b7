"""What both versions of TRL are given: random Llamas of a workload's shape, and a tokenizer that is never asked."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from experiments.benchmarks.workloads import Workload


def config_of(work: Workload) -> LlamaConfig:
    shape = work.shape
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        num_labels=1,
    )


def tokenizer_of(work: Workload) -> Any:
    words = {f"w{i}": i for i in range(work.shape.vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", padding_side="left")


def prompts_of(work: Workload) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, work.shape.vocabulary, (work.batch, work.prompt), generator=generator)
