"""Single fields of a configuration file: read, checked, and named where they are wrong."""

from collections.abc import Mapping
from typing import Any

LARGEST = 2**31 - 1  # of counts and token ids, which become int32 on the device


def count(raw: Mapping[str, Any], field: str, default: int | None = None, null: int | None = None) -> int:
    """A positive integer; `null` (or else `default`) is what an explicit null means."""
    value = raw.get(field, default)
    if value is None:
        value = default if null is None else null
    if value is None:
        raise ValueError(f"{field} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"{field}={value!r} is not a positive integer of 32 bits")
    return value


def number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A positive number of single precision; an explicit null is `default`."""
    value = default if raw.get(field) is None else raw[field]
    if value is None:
        raise ValueError(f"{field} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e38:
        raise ValueError(f"{field}={value!r} is not a positive number of single precision")
    return float(value)


def numbers(raw: Mapping[str, Any], field: str) -> tuple[float, ...]:
    """A list of positive numbers."""
    values = raw.get(field)
    if not isinstance(values, list) or not 0 < len(values) <= 2**16:
        raise ValueError(f"{field} is not a list of numbers")
    return tuple(number({field: value}, field) for value in values)


def flag(raw: Mapping[str, Any], field: str) -> bool:
    """True or false; absent or null is false."""
    value = raw.get(field) or False
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} is not true or false")
    return value


def token_ids(raw: Mapping[str, Any], field: str, default: int | None = None) -> tuple[int, ...]:
    """A field that holds no id, one id or a list of ids."""
    value = raw.get(field, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= LARGEST for i in ids):
        raise ValueError(f"{field}={value!r} is not a token id or a list of token ids")
    return tuple(ids)


def require_neutral(raw: Mapping[str, Any], field: str, neutral: tuple[Any, ...]) -> None:
    """Refuse a field that has an effect: only absence, null and the `neutral` values have none."""
    value = raw.get(field)
    if value is not None and value not in neutral:
        allowed = ", ".join(repr(v) for v in neutral) or "absent or null"
        raise ValueError(f"{field}={value!r} is not supported; supported: {allowed}")
