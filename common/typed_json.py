"""Values of annotated types to JSON and back, exactly: what a snapshot of state is written in.

Driven by the annotations of dataclasses, so that a field that is added later is kept without anybody thinking of it.
A dataclass is a list of its fields' values in order; a mapping a list of pairs in its own order; a union of dataclasses
names its member. Types with a text form of their own (`str()` and `parse`) are written as that text.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

_Coder = tuple[Callable[[Any], Any], Callable[[Any], Any]]
_PLAIN = (str, int, bool, type(None))


def encode(kind: Any, value: Any) -> Any:
    """`value` of type `kind` as JSON. Raises TypeError for a type that has no JSON form."""
    return coder(kind)[0](value)


def decode(kind: Any, data: Any) -> Any:
    """What `encode` wrote. Raises ValueError, TypeError or LookupError for anything else."""
    return coder(kind)[1](data)


@cache
def coder(kind: Any) -> _Coder:
    """The pair (encode, decode) of a type."""
    if kind is Any or kind in _PLAIN:
        return _same, _same
    if kind is float:
        return _float_out, _float_in
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is tuple:
        return _tuple(arguments)
    if origin in (list, Sequence):
        return _sequence(arguments[0], list)
    if origin is deque:
        return _sequence(arguments[0], deque)
    if origin in (set, frozenset):
        out, back = coder(arguments[0])
        return (lambda items: sorted(map(out, items), key=repr)), (lambda data: origin(map(back, data)))
    if origin in (dict, Mapping):
        return _mapping(*arguments)
    if isinstance(kind, type):
        if issubclass(kind, Enum):
            return (lambda member: member.value), kind
        if hasattr(kind, "parse"):
            return str, kind.parse
        if dataclasses.is_dataclass(kind):
            return _dataclass(kind)
    raise TypeError(f"{kind} has no JSON form")


def _same(value: Any) -> Any:
    return value


def _float_out(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _float_in(data: float | str) -> float:
    return float(data) if isinstance(data, str) else data  # a whole number that was given as one stays one


def _sequence(kind: Any, container: Callable[[Iterable[Any]], Any]) -> _Coder:
    out, back = coder(kind)
    return (lambda items: [out(item) for item in items]), (lambda data: container(back(item) for item in data))


def _tuple(arguments: tuple[Any, ...]) -> _Coder:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence(arguments[0], tuple)
    coders = [coder(kind) for kind in arguments]
    return (
        lambda items: [out(item) for (out, _), item in zip(coders, items, strict=True)],
        lambda data: tuple(back(item) for (_, back), item in zip(coders, data, strict=True)),
    )


def _mapping(key: Any, value: Any) -> _Coder:
    (key_out, key_back), (value_out, value_back) = coder(key), coder(value)
    return (
        lambda items: [[key_out(k), value_out(v)] for k, v in items.items()],
        lambda data: {key_back(k): value_back(v) for k, v in data},
    )


def _dataclass(kind: type) -> _Coder:
    # The annotations are resolved at the first use: a module may not have finished when its types are named.
    @cache
    def parts() -> list[tuple[str, _Coder]]:
        hints = get_type_hints(kind)
        return [(field.name, coder(hints[field.name])) for field in dataclasses.fields(kind)]

    def out(value: Any) -> list[Any]:
        return [field_out(getattr(value, name)) for name, (field_out, _) in parts()]

    def back(data: list[Any]) -> Any:
        fields = parts()
        if len(data) != len(fields):
            raise ValueError(f"{kind.__name__} has {len(fields)} fields, {len(data)} were written")
        values = {name: field_back(item) for (name, (_, field_back)), item in zip(fields, data, strict=True)}
        # Fields that __init__ does not take are set behind it.
        made = kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
        for field in dataclasses.fields(kind):
            if not field.init:
                object.__setattr__(made, field.name, values[field.name])
        return made

    return out, back


def _union(members: tuple[Any, ...]) -> _Coder:
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:  # Optional
        out, back = coder(others[0])
        return (lambda v: None if v is None else out(v)), (lambda d: None if d is None else back(d))
    if all(member in (str, int, float, bool) for member in others):
        return _same, _same
    by_name = {member.__name__: member for member in others}

    def name_out(value: Any) -> Any:
        return None if value is None else [type(value).__name__, encode(type(value), value)]

    def name_back(data: Any) -> Any:
        return None if data is None else decode(by_name[data[0]], data[1])

    return name_out, name_back
