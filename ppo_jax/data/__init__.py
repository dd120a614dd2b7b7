"""The user's data: files -> records (`records`) -> token rows (`encode`) -> batches addressed by step (`batches`)."""

from ppo_jax.data.batches import PairBatch, SFTBatch, left_pad, pair_batches, prompt_batches, right_pad, sft_batches
from ppo_jax.data.chat import render
from ppo_jax.data.encode import (
    EncodedPairs,
    EncodedPrompts,
    EncodedSFT,
    TooLong,
    encode_pairs,
    encode_prompts,
    encode_sft,
)
from ppo_jax.data.lines import Text
from ppo_jax.data.options import DatasetOptions
from ppo_jax.data.reading import read_pairs, read_prompts, read_sft
from ppo_jax.data.records import PairRecord, PromptRecord, SFTRecord

__all__ = [
    "DatasetOptions",
    "EncodedPairs",
    "EncodedPrompts",
    "EncodedSFT",
    "PairBatch",
    "PairRecord",
    "PromptRecord",
    "SFTBatch",
    "SFTRecord",
    "Text",
    "TooLong",
    "encode_pairs",
    "encode_prompts",
    "encode_sft",
    "left_pad",
    "pair_batches",
    "prompt_batches",
    "read_pairs",
    "read_prompts",
    "read_sft",
    "render",
    "right_pad",
    "sft_batches",
]
