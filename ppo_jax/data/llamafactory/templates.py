"""The templates of LLaMA-Factory for the families that are read here, as facts: which strings stand around a message.

A template is not a chat template in Jinja. It makes tokens of each message by itself, so that no token joins prompt and
response, and BOS and EOS are tokens, never text. The strings are those of LLaMA-Factory 0.9.3 (Apache-2.0); rows are
equal to its own only where these are.
"""

import enum
from typing import NamedTuple


class Mark(enum.Enum):
    """A token of the tokenizer that stands in a template."""

    BOS = "bos"
    EOS = "eos"


Slots = tuple[str | Mark, ...]  # {} stands for what is said
BOS, EOS = Mark.BOS, Mark.EOS


class Template(NamedTuple):
    """What is written around a message of each kind."""

    user: Slots = ("{}",)
    assistant: Slots = ("{}", EOS)
    system: Slots = ("{}",)
    function: Slots | None = None  # a call of tools; None: as the assistant
    observation: Slots | None = None  # what a tool said; None: as the user
    prefix: Slots = ()
    tools: str = "default"  # how tools are described (`tools.FORMATS`)
    calls: str = "default"  # how calls are written
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replaces_eos: bool = False  # the first stop word becomes the tokenizer's EOS
    closes_once: bool = False  # EOS stands at the end of the whole row, and is learnt
    joins_system: bool = False  # the system message is part of the first question
    thinks: bool = False  # an answer without thoughts gets empty ones
    thinking: bool | None = True  # whether those are learnt (None, False: they belong to the prompt)


def _chatml(**more: object) -> Template:
    said = "{}<|im_end|>\n"
    return Template(
        user=("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",),
        assistant=(said,),
        system=("<|im_start|>system\n{}<|im_end|>\n",),
    )._replace(**{"stop_words": ("<|im_end|>",), **more})  # type: ignore[arg-type]


def _qwen(**more: object) -> Template:
    told = "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    return _chatml(observation=(told,), tools="qwen", calls="qwen", replaces_eos=True, **more)


def _gemma() -> Template:
    turn = "<start_of_turn>{}\n{{}}<end_of_turn>\n<start_of_turn>model\n"
    return Template(
        user=(turn.format("user"),),
        assistant=("{}<end_of_turn>\n",),
        system=("{}\n\n",),
        observation=(turn.format("tool"),),
        prefix=(BOS,),
        stop_words=("<end_of_turn>",),
        replaces_eos=True,
        joins_system=True,
    )


def _llama3() -> Template:
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{{}}<|eot_id|>"
    asked = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return Template(
        user=(turn.format("user") + asked,),
        assistant=("{}<|eot_id|>",),
        system=(turn.format("system"),),
        observation=(turn.format("ipython") + asked,),
        prefix=(BOS,),
        tools="llama3",
        calls="llama3",
        stop_words=("<|eot_id|>", "<|eom_id|>"),
        replaces_eos=True,
    )


def _mistral(space: str = " ") -> Template:
    return Template(
        user=(f"[INST]{space}{{}}[/INST]",),
        assistant=(f"{space}{{}}", EOS),
        system=("{}\n\n",),
        function=(f"[TOOL_CALLS]{space}{{}}", EOS),
        observation=(f'[TOOL_RESULTS]{space}{{"content": {{}}}}[/TOOL_RESULTS]',),
        prefix=(BOS,),
        tools="mistral",
        calls="mistral",
        joins_system=True,
    )


_LLAMA2 = Template(
    user=(BOS, "[INST] {} [/INST]"), system=("<<SYS>>\n{}\n<</SYS>>\n\n",), joins_system=True
)  # fmt: skip
TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        user=("### Instruction:\n{}\n\n### Response:\n",),
        assistant=("{}", EOS, "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
    ),
    "chatml": _chatml(
        observation=("<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n",),
        stop_words=("<|im_end|>", "<|im_start|>"),
        replaces_eos=True,
    ),
    "deepseek": Template(user=("User: {}\n\nAssistant:",), system=("{}\n\n",), prefix=(BOS,)),
    "default": Template(
        user=("Human: {}", EOS, "\nAssistant:"), assistant=("{}", EOS, "\n"), system=("System: {}", EOS, "\n")
    ),
    "empty": Template(assistant=("{}",)),
    "fewshot": Template(assistant=("{}\n\n",), closes_once=True),
    "gemma": _gemma(),
    "granite3": Template(
        user=("<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",),
        assistant=("{}<|end_of_text|>\n",),
        system=("<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n",),
    ),
    "llama2": _LLAMA2,
    "llama3": _llama3(),
    "ministral": _mistral("")._replace(assistant=("{}", EOS)),
    "mistral": _mistral(),
    "olmo": Template(user=("<|user|>\n{}<|assistant|>\n",), prefix=(EOS,)),
    "phi": Template(
        user=("<|user|>\n{}<|end|>\n<|assistant|>\n",),
        assistant=("{}<|end|>\n",),
        system=("<|system|>\n{}<|end|>\n",),
        stop_words=("<|end|>",),
        replaces_eos=True,
    ),
    "phi4": Template(
        user=("<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{}<|im_end|>",),
        stop_words=("<|im_end|>",),
        replaces_eos=True,
    ),
    "qwen": _qwen(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _qwen(thinks=True),
    "smollm": _chatml(),
    "smollm2": _chatml(default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": Template(
        user=("### User:\n{}\n\n### Assistant:\n",),
        assistant=("{}",),
        system=("### System:\n{}\n\n",),
        closes_once=True,
    ),
    "vicuna": Template(
        user=("USER: {} ASSISTANT:",),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "yi": _chatml(),
    "zephyr": Template(
        user=("<|user|>\n{}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
    ),
}
