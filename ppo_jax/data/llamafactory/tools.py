"""How LLaMA-Factory writes tools, and calls of them, as text (its `tool_format`). Facts, as in `templates`."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ppo_jax.data.chat import current_moment

Tools = Sequence[dict[str, Any]]  # {"type": "function", "function": {...}} or the function itself
Calls = Sequence[tuple[str, Any]]  # (name, arguments)


class ToolFormat(NamedTuple):
    """How tools are described in the system message, and how calls are written as an answer."""

    describe: Callable[[Tools], str]
    write_calls: Callable[[Calls], str]


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return dict(tool["function"]) if tool.get("type") == "function" else tool


def _wrap(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


# -- default ---------------------------------------------------------------------------------------------------------


def _describe_default(tools: Tools) -> str:
    texts = []
    for tool in map(_function, tools):
        given = tool["parameters"]
        lines = [
            _describe_parameter(name, parameter, name in given.get("required", []))
            for name, parameter in given["properties"].items()
        ]
        texts.append(
            f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
            f"Tool Args:\n{''.join(lines)}\n"
        )
    names = ", ".join(_function(tool)["name"] for tool in tools)
    return (
        f"You have access to the following tools:\n{''.join(texts)}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _describe_parameter(name: str, parameter: dict[str, Any], required: bool) -> str:
    kind = f"{parameter.get('type', '')}{', required' if required else ''}"
    choices = f", should be one of [{', '.join(parameter['enum'])}]" if parameter.get("enum") else ""
    item = parameter["items"].get("type", "") if parameter.get("items") else ""
    items = f", where each item should be {item}" if parameter.get("items") else ""
    return f"  - {name} ({kind}): {parameter.get('description', '')}{choices}{items}\n"


def _calls_default(calls: Calls) -> str:
    return "\n".join(f"Action: {name}\nAction Input: {_dump(arguments)}" for name, arguments in calls)


# -- of the families -------------------------------------------------------------------------------------------------


def _describe_llama3(tools: Tools) -> str:
    date = current_moment().strftime("%d %b %Y")
    listed = "".join(_dump(_wrap(tool), indent=4) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function "
        'call. Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{listed}"
    )


def _calls_llama3(calls: Calls) -> str:
    written = [{"name": name, "parameters": arguments} for name, arguments in calls]
    return _dump(written[0] if len(written) == 1 else written)


def _describe_mistral(tools: Tools) -> str:
    return f"[AVAILABLE_TOOLS] {_dump([_wrap(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def _calls_mistral(calls: Calls) -> str:
    return _dump([{"name": name, "arguments": arguments} for name, arguments in calls])


def _describe_qwen(tools: Tools) -> str:
    listed = "".join("\n" + _dump(_wrap(tool)) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _calls_qwen(calls: Calls) -> str:
    written = (_dump({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in written)


FORMATS = {
    "default": ToolFormat(_describe_default, _calls_default),
    "llama3": ToolFormat(_describe_llama3, _calls_llama3),
    "mistral": ToolFormat(_describe_mistral, _calls_mistral),
    "qwen": ToolFormat(_describe_qwen, _calls_qwen),
}
