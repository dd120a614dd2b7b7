"""Where a reward model reads its score: at the last token of the text, or at the end of the closed conversation.

Ours are trained on texts without an end token, and so read the last token of the text. Most others are trained on whole
conversations and read what their chat template writes behind an answer, as `transformers` does when it is given one.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ppo_jax.data.chat import turn_closing
from ppo_jax.data.tokens import continuation

At = Literal["auto", "end-token", "last-text", "sampled"]


class Reading(NamedTuple):
    """Where the score is read."""

    closing: tuple[int, ...] = ()  # what is put behind a text, whose last token is read; (): the text's own last token
    notice: str = ""  # what the user has to be told of it
    written: tuple[int, ...] = ()  # the whole closing, pad tokens included: a text that ends with it is closed already
    sampled: bool = False  # the last token that was sampled is read, an end token where there is one


def choose_reading(name: str, at: At, tokenizer: Any, ours: bool, pad_id: int | None = None) -> Reading:
    """Where the reward model `name` is read.

    "auto": ours at the last token of the text; of other people's those with a chat template at the end of the
    conversation, the others at the last token of the text. A pad token at the end is not read, as `transformers` finds
    the last token of a text by it. "sampled" is LLaMA-Factory's way in PPO: the end token of a response that ended
    itself, the last token of the text of one that was cut.

    Args:
      tokenizer: of the reward model.
      ours: whether training with ppo_jax left it.
      pad_id: of the model's configuration.
    """
    if at == "sampled":
        return Reading((), _said(name, "last token of the response, its end token where it has one"), sampled=True)
    closing = turn_closing(tokenizer)
    if at == "last-text" or (at == "auto" and (ours or not closing)):
        other = "" if at == "last-text" else "; it has no chat template that would say more"
        return Reading((), "" if ours and at == "auto" else f"{_said(name, 'last token of the text')}{other}")
    ids = continuation(closing, tokenizer) if closing else [tokenizer.eos_token_id]
    if ids == [None]:
        raise ValueError(
            f"the reward model {name} has neither a chat template nor an EOS token, so nothing closes its texts; give "
            "--scoring.at last-text"
        )
    written = tuple(ids)
    while ids and ids[-1] == pad_id:
        ids.pop()
    where = "last token of the text, since it pads with its end token"
    if ids:
        where = f"end of the closed answer, behind {tokenizer.convert_ids_to_tokens(ids)}"
    return Reading(tuple(ids), _said(name, where), written)


def _said(name: str, where: str) -> str:
    return f"the score of the reward model {name} is read at the {where} (--scoring.at, or --at of serve-reward)"


def close_rows(
    tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], closing: tuple[int, ...]
) -> tuple[Int[Array, "B Z"], Bool[Array, "B Z"]]:
    """Rows with `closing` right behind their last real token, in slots of which as many are added on the right."""
    if not closing:
        return tokens, mask
    (rows, slots), more = tokens.shape, ((0, 0), (0, len(closing)))
    last = jnp.max(jnp.where(mask, jnp.arange(slots), -1), axis=1)
    places = jnp.arange(rows)[:, None], last[:, None] + 1 + jnp.arange(len(closing))
    closed = jnp.pad(tokens, more).at[places].set(jnp.asarray(closing, tokens.dtype))
    return closed, jnp.pad(mask, more).at[places].set(True)
