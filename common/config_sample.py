"""Writes a configuration model down as TOML, with each key's description as a comment.

The annotated samples under `systemd/` and the output of every `show-config` come from here, so that neither can
drift from the models in the code.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def to_toml(config: BaseModel, comments: bool = True) -> str:
    """The values of `config` as a TOML document; with `comments` each key carries its field's description."""
    return "\n".join(_table(config, (), comments)).strip() + "\n"


def _table(section: BaseModel, path: tuple[str, ...], comments: bool) -> list[str]:
    lines: list[str] = []
    inner: list[tuple[str, BaseModel]] = []
    tables: list[tuple[str, BaseModel]] = []  # of a list: [[name]] each
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            inner.append((name, value))
            continue
        if isinstance(value, list) and value and all(isinstance(item, BaseModel) for item in value):
            tables += [(name, item) for item in value]
            continue
        if comments and field.description:
            lines += [f"# {line}" for line in textwrap.wrap(field.description, 110)]
        # TOML has no null: an unset key is shown as a comment.
        lines.append(f"# {name} =" if value is None else f"{name} = {_value(value)}")
        if comments:
            lines.append("")
    for name, value in tables:
        lines += [f"[[{'.'.join((*path, name))}]]", *_table(value, (*path, name), comments)]
        if not comments:
            lines.append("")
    for name, value in inner:
        where = (*path, name)
        if comments and (text := (type(value).__doc__ or "").strip()):
            lines += [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 110)]
        lines += [f"[{'.'.join(where)}]", *_table(value, where, comments)]
        if not comments:
            lines.append("")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{json.dumps(str(key))} = {_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)
