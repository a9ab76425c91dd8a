"""Specs (frozen dataclasses and named tuples of plain values) as JSON values, and back."""

from dataclasses import fields, is_dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any


def plain(value: Any) -> Any:
    """A JSON value that spells the whole spec.

    Raises:
        TypeError: a field holds something other than numbers, text, None, tuples and specs.
    """
    names = _fields(value)
    if names is not None:
        kind = type(value)
        own = [plain(getattr(value, name)) for name in names]
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": own}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{value!r} is no part of a spec")


def _fields(value: Any) -> list[str] | None:
    if is_dataclass(value):
        return [f.name for f in fields(value)]
    return list(value._fields) if hasattr(value, "_fields") else None


def made(value: Any) -> Any:
    """What `plain` was given. The value has to come from this program: it names classes."""
    if isinstance(value, list):
        return tuple(map(made, value))
    if not isinstance(value, dict):
        return value
    module, _, path = value["class"].partition(":")
    kind = attrgetter(path)(import_module(module))
    return kind(*map(made, value["fields"]))
