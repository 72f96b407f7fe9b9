"""Configuration: TOML file < environment < command-line flags, checked by pydantic models.

Unknown keys are refused and every error is reported at once with its path. `DYNAMOLLM_<PART>__KEY__SUBKEY`
in the environment sets `key.subkey` of that part (`NODEAGENT`, `CONTROLLER`, `GATEWAY`).
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError

ENV_PREFIX = "DYNAMOLLM_"


class ConfigModel(BaseModel):
    """Base of every configuration section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Model = TypeVar("Model", bound=ConfigModel)


def load_config(
    model: type[Model],
    part: str,
    path: Path | None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Builds `model` from file, environment and flags, the later winning.

    `part` names the program in the environment prefix, e.g. "nodeagent" -> `DYNAMOLLM_NODEAGENT__…`.
    `overrides` maps dotted paths ("listen.port") to values; None values are ignored.
    Raises UserError that lists every problem with its path.
    """
    data: dict[str, Any] = _read_toml(path) if path is not None else {}
    env = os.environ if environment is None else environment
    prefix = f"{ENV_PREFIX}{part.upper()}__"
    for name, text in sorted(env.items()):
        if name.startswith(prefix):
            _set(data, name.removeprefix(prefix).lower().split("__"), _parse(text))
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(data, dotted.split("."), value)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        where = str(path) if path is not None else "configuration"
        lines = [f"{'.'.join(str(part) for part in item['loc']) or '(top)'}: {_say(item)}" for item in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines) + ".", "Correct the named keys and try again.") from None


def _say(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    return str(item["msg"]).removeprefix("Value error, ")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.", "Create it or name another with --config.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a configuration file.", "Name a TOML file.") from None
    except PermissionError:
        raise UserError(f"{path}: cannot be read by this user.", "Check its owner and mode.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.", "Correct the named line.") from None


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{'.'.join(keys)}: {key} is a value, not a section.", "Check flag or environment.")
        data = inner
    data[keys[-1]] = value


def _parse(text: str) -> Any:
    """Environment values are JSON where they parse as JSON (numbers, lists, true), else plain strings."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
