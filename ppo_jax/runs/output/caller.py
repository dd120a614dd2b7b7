"""Who started this process: what it says of its options can be typed there."""

import os
import re

CALLER = "PPO_JAX_CALLER"  # the environment variable by which the Makefile says what was typed, as "make demo"
_OPTION = re.compile(r"(?<![\w=/-])(?:pass )?(--resume(?: auto)?|--overwrite)\b")


def in_words_of_caller(text: str) -> str:
    """Write --resume and --overwrite as make takes them (`make demo ARGS=--resume`) where make has started this."""
    caller = os.environ.get(CALLER)
    if not caller:
        return text

    def say(found: re.Match[str]) -> str:
        option = found[1]
        return f'{caller} ARGS="{option}"' if " " in option else f"{caller} ARGS={option}"

    return _OPTION.sub(say, text)
