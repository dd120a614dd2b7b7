"""The tokenizer in a GGUF file's metadata, as a transformers tokenizer with its chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.models.files import gguf_container
from ppo_jax.models.files.fields import count, token_ids

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
SPACE = "\u2581"  # what SentencePiece writes for a space


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file: byte-level BPE (`gpt2`), or Gemma's SentencePiece BPE (`llama`).

    Raises:
      ValueError: the file is damaged, or its tokenizer is of another kind.
    """
    try:
        metadata, _ = gguf_container.read(path)
        return _tokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    special = _special_tokens(metadata, tokens)
    tokenizer = _model(metadata, tokens, special)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template={template!r} is not text")
    _add_tokens(tokenizer, metadata, tokens)
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        from tokenizers import processors

        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=count(metadata, f"{metadata.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _model(metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]) -> Any:
    """The tokenizer without added tokens."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split in ("smollm", "gpt-2"):
        return _byte_level(metadata, tokens, digits=split == "smollm")
    if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        return _sentence_piece(metadata, tokens, special)
    raise ValueError(
        f"tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={split!r} is not supported (supported: gpt2 with "
        "smollm or gpt-2, llama without add_space_prefix); take the tokenizer from the model's Hugging Face directory"
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], digits: bool) -> Any:
    """Byte-level BPE as GPT-2 has it; SmolLM splits numbers into single digits first, then into words."""
    from tokenizers import decoders, pre_tokenizers

    merges = _texts(metadata, "tokenizer.ggml.merges")
    if bad := [merge for merge in merges if merge.count(" ") != 1]:
        raise ValueError(f"tokenizer.ggml.merges: {bad[0]!r} is not a pair of tokens")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = _bpe(tokens, pairs)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]) -> Any:
    """BPE as SentencePiece does it: the pair that makes the token of the highest score is merged first."""
    from tokenizers import decoders, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(isinstance(s, float) for s in scores):
        raise ValueError(f"tokenizer.ggml.scores is not a list with one number for each of {len(tokens)} tokens")
    rank = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (scores[number], len(token[:at]), len(token) - at, -rank[token[:at]], token[:at], token[at:])
        for number, token in enumerate(tokens)
        for at in range(1, len(token))
        if token[:at] in rank and token[at:] in rank
    ]
    pairs.sort(key=lambda pair: pair[:4], reverse=True)
    unknown = {"unk_token": special["unk_token"]} if "unk_token" in special else {}
    tokenizer = _bpe(tokens, [pair[4:] for pair in pairs], byte_fallback=True, fuse_unk=True, **unknown)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _bpe(tokens: list[str], pairs: list[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs, **options))
    except MemoryError:
        raise
    except Exception as error:  # the Rust side has no class of its own
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from error


def _add_tokens(tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """The tokens that are found in a text before anything is merged."""
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type is not a list with one number for each of {len(tokens)} tokens")
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=SPACE in token)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        for token_id in token_ids(metadata, f"tokenizer.ggml.{field}_token_id"):
            if token_id >= len(tokens):
                raise ValueError(f"tokenizer.ggml.{field}_token_id={token_id} is beyond the {len(tokens)} tokens")
            special[f"{role}_token"] = tokens[token_id]
    return special


def _texts(metadata: Mapping[str, Any], field: str) -> list[str]:
    value = metadata.get(field)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{field} is not a list of strings")
    return value
