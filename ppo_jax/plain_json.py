"""JSON that others wrote: read only where it is not nested deeper than anything meant is.

Python's parser goes down one call per level. How many are left depends on who called, and in the last ones whatever
runs besides it (a collector of garbage, an error's handler) fails too; so the depth is counted first, without calls.
"""

import json
import re
from typing import Any

DEPTH = 100
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)  # strings may hold brackets


def loads(data: str | bytes, depth: int = DEPTH) -> Any:
    """The value of a JSON text (bytes: UTF-8, or as `json` detects). ValueError where it is none, or nested deeper."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
    level = 0
    for found in _TOKEN.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if level > depth:
            raise ValueError(f"nested more than {depth} deep")
    return json.loads(text.removeprefix("\ufeff"))
